"""Evaluation: every SAE and every baseline on held-out activations and with the model in the loop.

Expects results/saes and results/stores; leaves results/evaluations (a table a run, and what runs are
measured on) and results/tables.
"""


rule prepare_labelled:
    input:
        lambda w: jobs.labelled(w.source, w.labelled).inputs,
    output:
        record="results/evaluations/{source}/labelled/{labelled}/provenance.json",
    log:
        "logs/prepare_labelled/{source}_{labelled}.log",
    benchmark:
        "logs/benchmarks/prepare_labelled/{source}_{labelled}.tsv"
    conda:
        environment("model")
    threads: threads("extract")
    params:
        task=lambda w: task(jobs.labelled(w.source, w.labelled)),
    shell:
        "python -m saeflow label {params.task:q} --threads {threads} 2>&1 | tee {log}"


rule evaluate_clean:
    input:
        lambda w: jobs.clean(w.source, w.hook_point, w.source).inputs,
    output:
        record="results/evaluations/{source}/{hook_point}/clean/provenance.json",
    log:
        "logs/evaluate_clean/{source}_{hook_point}.log",
    benchmark:
        "logs/benchmarks/evaluate_clean/{source}_{hook_point}.tsv"
    conda:
        environment("model")
    threads: threads("evaluate")
    resources:
        gpu=gpus(),
    params:
        task=lambda w: task(jobs.clean(w.source, w.hook_point, w.source)),
    shell:
        "python -m saeflow clean {params.task:q} --threads {threads} 2>&1 | tee {log}"


rule evaluate_clean_on:
    input:
        lambda w: jobs.clean(w.source, w.hook_point, w.other).inputs,
    output:
        record="results/evaluations/{source}/{hook_point}/on/{other}/provenance.json",
    log:
        "logs/evaluate_clean_on/{source}_{hook_point}_{other}.log",
    benchmark:
        "logs/benchmarks/evaluate_clean_on/{source}_{hook_point}_{other}.tsv"
    conda:
        environment("model")
    threads: threads("evaluate")
    resources:
        gpu=gpus(),
    params:
        task=lambda w: task(jobs.clean(w.source, w.hook_point, w.other)),
    shell:
        "python -m saeflow clean {params.task:q} --threads {threads} 2>&1 | tee {log}"


rule estimate_dimension:
    input:
        lambda w: jobs.dimension(w.source, w.hook_point).inputs,
    output:
        record="results/evaluations/{source}/{hook_point}/dimension/provenance.json",
    log:
        "logs/estimate_dimension/{source}_{hook_point}.log",
    benchmark:
        "logs/benchmarks/estimate_dimension/{source}_{hook_point}.tsv"
    conda:
        environment("model")
    params:
        task=lambda w: task(jobs.dimension(w.source, w.hook_point)),
    shell:
        "python -m saeflow dimension {params.task:q} 2>&1 | tee {log}"


rule evaluate_group:
    input:
        lambda w: sorted({one for job in EVALUATED.members[w.group] for one in job.inputs}),
    output:
        temp(touch("results/evaluations.groups/{group}.done")),
    log:
        "logs/evaluate_group/{group}.log",
    benchmark:
        "logs/benchmarks/evaluate_group/{group}.tsv"
    conda:
        environment("model")
    threads: threads("evaluate")
    resources:
        gpu=gpus(),
    params:
        task=lambda w: task(*EVALUATED.members[w.group]),
    shell:  # an SAE that cannot be measured (exit code 2) is left to its own job, which says so
        "(python -m saeflow evaluate {params.task:q} --ahead --threads {threads} || [ $? -eq 2 ]) 2>&1 | tee {log}"


rule evaluate_sae:
    input:
        lambda w: jobs.evaluation(w.run).inputs,
        group=lambda w: done_of("results/evaluations.groups", EVALUATED, jobs.evaluation(w.run)),
    output:
        metrics="results/evaluations/{run}/metrics.csv",
        histograms="results/evaluations/{run}/histograms.csv",
        record="results/evaluations/{run}/provenance.json",
    log:
        "logs/evaluate_sae/{run}.log",
    benchmark:
        "logs/benchmarks/evaluate_sae/{run}.tsv"
    conda:
        environment("model")
    threads: threads("evaluate")
    resources:
        gpu=gpus(),
    params:
        task=lambda w: task(jobs.evaluation(w.run)),
    shell:
        "python -m saeflow evaluate {params.task:q} --threads {threads} 2>&1 | tee {log}"


rule show_latents:
    input:
        lambda w: jobs.latents(w.run).inputs,
    output:
        page=report(
            "results/evaluations/latents/{run}/latents.html",
            caption="../report/latents.rst",
            category="Latents",
            labels={"SAE": "{run}"},
        ),
        record="results/evaluations/latents/{run}/provenance.json",
    log:
        "logs/show_latents/{run}.log",
    benchmark:
        "logs/benchmarks/show_latents/{run}.tsv"
    conda:
        environment("model")
    threads: threads("evaluate")
    resources:
        gpu=gpus(),
    params:
        task=lambda w: task(jobs.latents(w.run)),
    shell:
        "python -m saeflow latents {params.task:q} --threads {threads} 2>&1 | tee {log}"


rule interpret_sae:
    input:
        lambda w: jobs.interpretation(w.run).inputs,
    output:
        probing="results/evaluations/interpretability/{run}/probing.csv",
        detection="results/evaluations/interpretability/{run}/detection.csv",
        absorption="results/evaluations/interpretability/{run}/absorption.csv",
        record="results/evaluations/interpretability/{run}/provenance.json",
    log:
        "logs/interpret_sae/{run}.log",
    benchmark:
        "logs/benchmarks/interpret_sae/{run}.tsv"
    conda:
        environment("model")
    threads: threads("evaluate")
    resources:
        gpu=gpus(),
    params:
        task=lambda w: task(jobs.interpretation(w.run)),
    shell:
        "python -m saeflow interpret {params.task:q} --threads {threads} 2>&1 | tee {log}"


rule evaluate_baselines:
    input:
        lambda w: jobs.baselines(w.source, w.hook_point).inputs,
    output:
        metrics="results/evaluations/{source}/{hook_point}/baselines/metrics.csv",
        histograms="results/evaluations/{source}/{hook_point}/baselines/histograms.csv",
        record="results/evaluations/{source}/{hook_point}/baselines/provenance.json",
    log:
        "logs/evaluate_baselines/{source}_{hook_point}.log",
    benchmark:
        "logs/benchmarks/evaluate_baselines/{source}_{hook_point}.tsv"
    conda:
        environment("model")
    threads: threads("evaluate")
    resources:
        gpu=gpus(),
    params:
        task=lambda w: task(jobs.baselines(w.source, w.hook_point)),
    shell:
        "python -m saeflow baselines {params.task:q} --threads {threads} 2>&1 | tee {log}"


rule compare_seeds:
    input:
        lambda w: jobs.stability(w.setting).inputs,
    output:
        stability="results/evaluations/stability/{setting}/stability.csv",
        record="results/evaluations/stability/{setting}/provenance.json",
    log:
        "logs/compare_seeds/{setting}.log",
    benchmark:
        "logs/benchmarks/compare_seeds/{setting}.tsv"
    conda:
        environment("model")
    threads: threads("evaluate")
    resources:
        gpu=gpus(),
    params:
        task=lambda w: task(jobs.stability(w.setting)),
    shell:
        "python -m saeflow stability {params.task:q} --threads {threads} 2>&1 | tee {log}"


rule compare_rivals:
    input:
        lambda w: jobs.rivals().inputs,
    output:
        rivals="results/evaluations/rivals/rivals.csv",
        record="results/evaluations/rivals/provenance.json",
    log:
        "logs/compare_rivals.log",
    conda:
        environment("model")
    params:
        task=lambda w: task(jobs.rivals()),
    shell:
        "python -m saeflow rivals {params.task:q} 2>&1 | tee {log}"


rule choose_trials:
    input:
        lambda w: jobs.sweeps().inputs,
    output:
        sweeps="results/evaluations/sweeps/sweeps.csv",
        record="results/evaluations/sweeps/provenance.json",
    log:
        "logs/choose_trials.log",
    conda:
        environment("model")
    params:
        task=lambda w: task(jobs.sweeps()),
    shell:
        "python -m saeflow choose {params.task:q} 2>&1 | tee {log}"


rule collect_tables:
    input:
        jobs.tables().inputs,
    output:
        tables=expand("results/tables/{table}.csv", table=TABLES),
        json="results/tables/metrics.json",
        record="results/tables/provenance.json",
    log:
        "logs/collect_tables.log",
    benchmark:
        "logs/benchmarks/collect_tables.tsv"
    conda:
        environment("model")
    params:
        task=task(jobs.tables()),
    shell:
        "python -m saeflow collect {params.task:q} 2>&1 | tee {log}"
