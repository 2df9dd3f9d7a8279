"""Complexity: scores of contexts, and the probe that reads them from activations.

Expects results/sources and results/stores; leaves results/complexity/SOURCE/NAME/scores and
results/complexity/SOURCE/NAME/probes/HOOK_POINT, for the runs whose options name a complexity.
"""


rule score_contexts:
    input:
        lambda w: jobs.scores(w.source, w.complexity).inputs,
    output:
        record="results/complexity/{source}/{complexity}/scores/provenance.json",
    log:
        "logs/score_contexts/{source}_{complexity}.log",
    benchmark:
        "logs/benchmarks/score_contexts/{source}_{complexity}.tsv"
    conda:
        environment("model")
    threads: threads("evaluate")
    resources:
        gpu=gpus(),
    params:
        task=lambda w: task(jobs.scores(w.source, w.complexity)),
    shell:
        "python -m saeflow score {params.task:q} --threads {threads} 2>&1 | tee {log}"


rule fit_probe:
    input:
        lambda w: jobs.probe(w.source, w.hook_point, w.complexity).inputs,
    output:
        record="results/complexity/{source}/{complexity}/probes/{hook_point}/provenance.json",
    log:
        "logs/fit_probe/{source}_{complexity}_{hook_point}.log",
    benchmark:
        "logs/benchmarks/fit_probe/{source}_{complexity}_{hook_point}.tsv"
    conda:
        environment("model")
    params:
        task=lambda w: task(jobs.probe(w.source, w.hook_point, w.complexity)),
    shell:
        "python -m saeflow probe {params.task:q} 2>&1 | tee {log}"
