"""Stores: activations of every hook point of a source, shuffled, in Zarr.

Expects results/sources/SOURCE; leaves results/stores/SOURCE/SPLIT/HOOK_POINT.zarr. Each split is
extracted by runtime.extraction_jobs independent jobs, whose number does not change the result.
"""


rule extract_part:
    input:
        model=model_record,
        inputs="results/sources/{source}/inputs/provenance.json",
    output:
        part=temp(directory("results/stores/{source}/{split}.parts/{part}-of-{parts}")),
    log:
        "logs/extract_part/{source}_{split}_{part}-of-{parts}.log",
    conda:
        environment("model")
    threads: threads("extract")
    resources:
        gpu=gpus(),
    params:
        key=lambda w: plan.key_store(w.source, w.split),
        source=lambda w: json.dumps(plan.source(w.source)),
        store=lambda w: json.dumps(plan.store(w.source)),
    shell:
        "python -m saeflow extract --source {params.source:q} --store {params.store:q}"
        " --split {wildcards.split} --part {wildcards.part} --parts {wildcards.parts}"
        " --threads {threads} --key {params.key}"
        " --folder results/sources/{wildcards.source} --out {output.part} 2>&1 | tee {log}"


rule merge_parts:
    input:
        model=model_record,
        inputs="results/sources/{source}/inputs/provenance.json",
        parts=parts,
    output:
        record="results/stores/{source}/{split}/provenance.json",
    log:
        "logs/merge_parts/{source}_{split}.log",
    conda:
        environment("model")
    params:
        key=lambda w: plan.key_store(w.source, w.split),
        name=lambda w: w.source,
        source=lambda w: json.dumps(plan.source(w.source)),
        store=lambda w: json.dumps(plan.store(w.source)),
    shell:
        "python -m saeflow merge {input.parts} --name {params.name} --source {params.source:q}"
        " --store {params.store:q} --split {wildcards.split} --key {params.key}"
        " --folder results/sources/{wildcards.source}"
        " --out results/stores/{wildcards.source}/{wildcards.split} 2>&1 | tee {log}"
