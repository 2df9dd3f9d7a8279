"""Sources: the model and the inputs it reads.

Expects nothing but params.yaml; leaves results/sources/SOURCE/model (a Hugging Face folder, where the
source has a model) and results/sources/SOURCE/inputs (token ids, pixels or the true dictionary).
"""


rule fetch_model:
    input:
        like=lambda w: same_model(w.source, RECORD),
    output:
        record="results/sources/{source}/model/provenance.json",
    log:
        "logs/fetch_model/{source}.log",
    conda:
        environment("model")
    threads: lambda w: threads("train") if "trained" in plan.model(w.source)["model"] else 1
    params:
        key=lambda w: plan.key_model(w.source),
        model=lambda w: json.dumps(plan.model(w.source)),
        like=lambda w: "".join(f"--like={folder}" for folder in same_model(w.source)),
    shell:
        "python -m saeflow fetch --model {params.model:q} {params.like} --threads {threads}"
        " --key {params.key} --out results/sources/{wildcards.source}/model 2>&1 | tee {log}"


rule prepare_inputs:
    input:
        model=model_record,
    output:
        record="results/sources/{source}/inputs/provenance.json",
    log:
        "logs/prepare_inputs/{source}.log",
    conda:
        environment("model")
    threads: lambda w: threads("extract") if plan.kind(w.source).prepares_in_parallel else 1
    params:
        key=lambda w: plan.key_inputs(w.source),
        source=lambda w: json.dumps(plan.source(w.source)),
        rows=lambda w: json.dumps(plan.rows(w.source)),
    shell:
        "python -m saeflow prepare --source {params.source:q} --rows {params.rows:q} --key {params.key}"
        " --threads {threads} --folder results/sources/{wildcards.source} 2>&1 | tee {log}"
