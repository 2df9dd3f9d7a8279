"""Training: one SAE a job, or runtime.saes_per_job of one store in one pass over its batches; and SAEs of other libraries.

Expects results/stores/SOURCE/train (and the probes of results/complexity that runs use); leaves
results/saes/RUN with weights, config and steps.csv. A job that is killed goes on from its last checkpoints
when it is started again. How many SAEs a job trains changes no result and no key (saeflow.jobs.groups). SAEs of a stream
(stores.NAME.keep_windows) are trained on one window after the other, a job each, from checkpoint to checkpoint in
results/saes/RUN.stream; an SAE's own job writes the result after the last window.
"""


rule train_group:
    input:
        lambda w: sorted({one for job in TRAINED.members[w.group] for one in job.inputs}),
    output:
        temp(touch("results/saes.groups/{group}.done")),
    log:
        "logs/train_group/{group}.log",
    benchmark:
        "logs/benchmarks/train_group/{group}.tsv"
    conda:
        environment("train")
    threads: threads("train")
    resources:
        gpu=gpus(),
    params:
        task=lambda w: task(*TRAINED.members[w.group]),
    shell:
        f"{launcher()} -m saeflow train {{params.task:q}} --ahead --threads {{threads}} 2>&1 | tee {{log}}"


rule train_window:
    input:
        before=lambda w: trained_on(w.group, int(w.draw) - 1) if int(w.draw) else [],
        window=lambda w: window(source_of(w.group), "train", first_draw(w.group) + int(w.draw)),
        first=lambda w: facts(source_of(w.group), "train", first_draw(w.group)),
        learned=lambda w: ancient(learned_before(w.group)),
    output:
        temp(touch("results/saes.groups/{group}.{draw}.done")),
    log:
        "logs/train_window/{group}_{draw}.log",
    benchmark:
        "logs/benchmarks/train_window/{group}_{draw}.tsv"
    conda:
        environment("train")
    threads: threads("train")
    resources:
        gpu=gpus(),
    params:
        task=lambda w: task(*STREAMED.members[w.group]),
    shell:
        f"{launcher()} -m saeflow train {{params.task:q}} --window {{input.window}} --draw {{wildcards.draw}}"
        " --first {input.first} --threads {threads} 2>&1 | tee {log}"


rule train_sae:
    input:
        lambda w: jobs.sae(w.run).inputs,
        group=lambda w: trained_before(jobs.sae(w.run)),
    output:
        weights="results/saes/{run}/weights.safetensors",
        config="results/saes/{run}/config.json",
        steps="results/saes/{run}/steps.csv",
        record="results/saes/{run}/provenance.json",
    log:
        "logs/train_sae/{run}.log",
    benchmark:
        "logs/benchmarks/train_sae/{run}.tsv"
    wildcard_constraints:
        run="[^/]+/[^/]+/[^/]+/(?!imported-)[^/]+",
    conda:
        environment("train")
    threads: threads("train")
    resources:
        gpu=gpus(),
    params:
        task=lambda w: task(jobs.sae(w.run)),
    shell:
        f"{launcher()} -m saeflow train {{params.task:q}} --threads {{threads}} 2>&1 | tee {{log}}"


rule import_sae:
    input:
        lambda w: jobs.sae(w.run).inputs,
    output:
        weights="results/saes/{run}/weights.safetensors",
        config="results/saes/{run}/config.json",
        record="results/saes/{run}/provenance.json",
    log:
        "logs/import_sae/{run}.log",
    benchmark:
        "logs/benchmarks/import_sae/{run}.tsv"
    wildcard_constraints:
        run="[^/]+/[^/]+/[^/]+/imported-[^/]+",
    conda:
        environment("train")
    params:
        key=lambda w: jobs.sae(w.run).key,
        folder=lambda w: plan.imports[w.run].folder,
        library=lambda w: plan.imports[w.run].library,
        store=lambda w: plan.imports[w.run].store,
    shell:
        "python -m saeflow import {params.folder:q} --library {params.library} --store {params.store}"
        " --name {wildcards.run} --key {params.key} --out results/saes/{wildcards.run} 2>&1 | tee {log}"
