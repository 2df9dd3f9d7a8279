"""Sources: the model and the inputs it reads.

Expects nothing but params.yaml; leaves results/sources/SOURCE/model (a Hugging Face folder, where the
source has a model) and results/sources/SOURCE/inputs (token ids, pixels or the true dictionary).
"""


rule fetch_model:
    input:
        lambda w: jobs.model(w.source).inputs,
    output:
        record="results/sources/{source}/model/provenance.json",
    log:
        "logs/fetch_model/{source}.log",
    benchmark:
        "logs/benchmarks/fetch_model/{source}.tsv"
    conda:
        environment("model")
    threads: lambda w: threads("train") if "trained" in plan.source(w.source)["model"] else 1
    params:
        task=lambda w: task(jobs.model(w.source)),
    shell:
        "python -m saeflow fetch {params.task:q} --threads {threads} 2>&1 | tee {log}"


rule prepare_inputs:
    input:
        lambda w: jobs.inputs(w.source).inputs,
    output:
        record="results/sources/{source}/inputs/provenance.json",
    log:
        "logs/prepare_inputs/{source}.log",
    benchmark:
        "logs/benchmarks/prepare_inputs/{source}.tsv"
    conda:
        environment("model")
    threads: lambda w: threads("extract") if plan.kind(w.source).prepares_in_parallel else 1
    params:
        task=lambda w: task(jobs.inputs(w.source)),
    shell:
        "python -m saeflow prepare {params.task:q} --threads {threads} 2>&1 | tee {log}"
