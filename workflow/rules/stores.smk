"""Stores: activations of every hook point of a source, shuffled, in Zarr.

Expects results/sources/SOURCE; leaves results/stores/SOURCE/SPLIT/HOOK_POINT.zarr. A split is one window, or several
(stores.NAME.window_rows), which are extracted one after the other: the blocks of a window are deleted once it is merged,
before the next one begins. Each is extracted by runtime.extraction_jobs independent jobs, whose number does not change
the result. With a number as stores.NAME.keep_windows the training split is a stream: SAEs are trained on one window after the
other (workflow/rules/training.smk), each window is deleted once all were trained on it, which is when the window keep_windows
later is extracted, and the store keeps its attributes without rows.
"""


rule extract_part:
    input:
        # Snakemake compares the time of an input with that of the store where the part itself is gone. Only the
        # rule that writes the store decides whether it is written again.
        lambda w: ancient(jobs.store(w.source, w.split).inputs),
        before=lambda w: ancient(extracted_after(w.source, w.split, int(w.window))),
    output:
        part=temp(directory("results/stores/{source}/{split}.parts/{window}/{part}-of-{parts}")),
    log:
        "logs/extract_part/{source}_{split}_{window}_{part}-of-{parts}.log",
    benchmark:
        "logs/benchmarks/extract_part/{source}_{split}_{window}_{part}-of-{parts}.tsv"
    conda:
        environment("model")
    threads: threads("extract")
    resources:
        gpu=gpus(),
    params:
        task=lambda w: task(jobs.store(w.source, w.split)),
        window=lambda w: int(w.window) % plan.windows(w.source, w.split),
    shell:
        "python -m saeflow extract {params.task:q} --window {params.window} --part {wildcards.part}"
        " --parts {wildcards.parts} --out {output.part} --threads {threads} 2>&1 | tee {log}"


rule merge_window:
    input:
        lambda w: ancient(jobs.store(w.source, w.split).inputs),
        parts=lambda w: parts(w.source, w.split, w.window),
    output:
        window=temp(directory("results/stores/{source}/{split}.windows/{window}")),
        facts=temp("results/stores/{source}/{split}.windows/{window}.json"),
    log:
        "logs/merge_window/{source}_{split}_{window}.log",
    benchmark:
        "logs/benchmarks/merge_window/{source}_{split}_{window}.tsv"
    conda:
        environment("model")
    params:
        task=lambda w: tasks([jobs.store(w.source, w.split)]),
        window=lambda w: int(w.window) % plan.windows(w.source, w.split),
    shell:
        "python -m saeflow merge {params.task:q} {input.parts} --window {params.window} --out {output.window}"
        " 2>&1 | tee {log}"


rule merge_parts:
    input:
        lambda w: jobs.store(w.source, w.split).inputs,
        parts=lambda w: merged_from(w.source, w.split),
    output:
        record="results/stores/{source}/{split}/provenance.json",
    log:
        "logs/merge_parts/{source}_{split}.log",
    benchmark:
        "logs/benchmarks/merge_parts/{source}_{split}.tsv"
    conda:
        environment("model")
    params:
        task=lambda w: tasks([jobs.store(w.source, w.split)]),  # whole: folders follow it
    shell:
        "python -m saeflow merge {params.task:q} {input.parts} 2>&1 | tee {log}"
