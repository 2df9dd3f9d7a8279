"""Complexity: scores of contexts, and the probe that reads them from activations.

Expects results/sources and results/stores; leaves results/complexity/SOURCE/NAME/scores and
results/complexity/SOURCE/NAME/HOOK_POINT, for the runs whose options name a complexity.
"""


rule score_contexts:
    input:
        model=model_record,
        inputs="results/sources/{source}/inputs/provenance.json",
    output:
        record="results/complexity/{source}/{complexity}/scores/provenance.json",
    log:
        "logs/score_contexts/{source}_{complexity}.log",
    conda:
        environment("model")
    threads: threads("evaluate")
    resources:
        gpu=gpus(),
    params:
        key=lambda w: plan.key_scores(w.source, w.complexity),
        source=lambda w: json.dumps(plan.source(w.source)),
        scoring=lambda w: json.dumps(plan.scoring(w.complexity)),
    shell:
        "python -m saeflow score --scoring {params.scoring:q} --source {params.source:q}"
        " --folder results/sources/{wildcards.source} --threads {threads} --key {params.key}"
        " --out results/complexity/{wildcards.source}/{wildcards.complexity}/scores 2>&1 | tee {log}"


rule fit_probe:
    input:
        scores="results/complexity/{source}/{complexity}/scores/provenance.json",
        stores=expand(
            "results/stores/{{source}}/{split}/provenance.json", split=["train", "evaluation"]
        ),
    output:
        record="results/complexity/{source}/{complexity}/probes/{hook_point}/provenance.json",
    log:
        "logs/fit_probe/{source}_{complexity}_{hook_point}.log",
    conda:
        environment("model")
    params:
        key=lambda w: plan.key_probe(w.source, w.hook_point, w.complexity),
        scoring=lambda w: json.dumps(plan.scoring(w.complexity)),
    shell:
        "python -m saeflow probe --scoring {params.scoring:q} --name {wildcards.complexity}"
        " --scores results/complexity/{wildcards.source}/{wildcards.complexity}/scores"
        " --hook-point {wildcards.hook_point} --stores results/stores/{wildcards.source}"
        " --key {params.key}"
        " --out results/complexity/{wildcards.source}/{wildcards.complexity}/probes/{wildcards.hook_point}"
        " 2>&1 | tee {log}"
