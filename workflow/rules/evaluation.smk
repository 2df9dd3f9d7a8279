"""Evaluation: every SAE and every baseline on held-out activations and with the model in the loop.

Expects results/saes and results/stores; leaves results/evaluations (a table a run, and what runs are
measured on) and results/tables.
"""


rule prepare_labelled:
    input:
        model=model_record,
    output:
        record="results/evaluations/{source}/labelled/{labelled}/provenance.json",
    log:
        "logs/prepare_labelled/{source}_{labelled}.log",
    conda:
        environment("model")
    threads: threads("extract")
    params:
        key=lambda w: plan.key_labelled(w.source, w.labelled),
        labelled=lambda w: json.dumps(plan.labelled_set(w.labelled)),
    shell:
        "python -m saeflow label --labelled {params.labelled:q} --threads {threads} --key {params.key}"
        " --folder results/sources/{wildcards.source}"
        " --out results/evaluations/{wildcards.source}/labelled/{wildcards.labelled} 2>&1 | tee {log}"


rule evaluate_clean:
    input:
        model=model_record,
        inputs="results/sources/{source}/inputs/provenance.json",
        stores=expand(
            "results/stores/{{source}}/{split}/provenance.json", split=["train", "evaluation"]
        ),
        labelled=lambda w: [
            f"results/evaluations/{w.source}/labelled/{name}/provenance.json"
            for name in plan.labelled(w.source)
        ],
    output:
        record="results/evaluations/{source}/{hook_point}/clean/provenance.json",
    log:
        "logs/evaluate_clean/{source}_{hook_point}.log",
    conda:
        environment("model")
    threads: threads("evaluate")
    resources:
        gpu=gpus(),
    params:
        key=lambda w: plan.key_clean(w.source, w.hook_point),
        source=lambda w: json.dumps(plan.source(w.source)),
        evaluation=lambda w: json.dumps(plan.evaluation(w.source)),
    shell:
        "python -m saeflow clean --source {params.source:q} --hook-point {wildcards.hook_point}"
        " --evaluation {params.evaluation:q} --threads {threads} --key {params.key}"
        " --folder results/sources/{wildcards.source}"
        " --held-out results/stores/{wildcards.source}/evaluation --train results/stores/{wildcards.source}/train"
        " --labelled results/evaluations/{wildcards.source}/labelled"
        " --out results/evaluations/{wildcards.source}/{wildcards.hook_point}/clean 2>&1 | tee {log}"


rule evaluate_clean_on:
    input:
        model=lambda w: f"results/sources/{w.other}/model/provenance.json",
        inputs="results/sources/{other}/inputs/provenance.json",
        train="results/stores/{source}/train/provenance.json",
        held_out="results/stores/{other}/evaluation/provenance.json",
    output:
        record="results/evaluations/{source}/{hook_point}/on/{other}/provenance.json",
    log:
        "logs/evaluate_clean_on/{source}_{hook_point}_{other}.log",
    conda:
        environment("model")
    threads: threads("evaluate")
    resources:
        gpu=gpus(),
    params:
        key=lambda w: plan.key_clean_on(w.source, w.hook_point, w.other),
        source=lambda w: json.dumps(plan.source(w.other)),
        evaluation=lambda w: json.dumps(plan.evaluation(w.other)),
    shell:
        "python -m saeflow clean --source {params.source:q} --hook-point {wildcards.hook_point}"
        " --evaluation {params.evaluation:q} --threads {threads} --key {params.key}"
        " --folder results/sources/{wildcards.other}"
        " --held-out results/stores/{wildcards.other}/evaluation --train results/stores/{wildcards.source}/train"
        " --labelled results/evaluations/{wildcards.other}/labelled"
        " --out results/evaluations/{wildcards.source}/{wildcards.hook_point}/on/{wildcards.other} 2>&1 | tee {log}"


rule estimate_dimension:
    input:
        "results/stores/{source}/evaluation/provenance.json",
    output:
        record="results/evaluations/{source}/{hook_point}/dimension/provenance.json",
    log:
        "logs/estimate_dimension/{source}_{hook_point}.log",
    conda:
        environment("model")
    params:
        key=lambda w: plan.key_dimension(w.source, w.hook_point),
        settings=json.dumps(plan.dimension()),
    shell:
        "python -m saeflow dimension --store results/stores/{wildcards.source}/evaluation"
        " --hook-point {wildcards.hook_point} --settings {params.settings:q} --key {params.key}"
        " --out results/evaluations/{wildcards.source}/{wildcards.hook_point}/dimension 2>&1 | tee {log}"


rule evaluate_sae:
    input:
        lambda w: evaluating_inputs([w.run]),
        group=lambda w: done_in_group(w.run, plan.evaluation_groups, EVALUATED, is_evaluated),
    output:
        metrics="results/evaluations/{run}/metrics.csv",
        histograms="results/evaluations/{run}/histograms.csv",
        record="results/evaluations/{run}/provenance.json",
    log:
        "logs/evaluate_sae/{run}.log",
    conda:
        environment("model")
    threads: threads("evaluate")
    resources:
        gpu=gpus(),
    params:
        told=lambda w: evaluating([w.run], "results/evaluations"),
    shell:
        "python -m saeflow evaluate {params.told} --group='{input.group}' --threads {threads} 2>&1 | tee {log}"


rule evaluate_group:
    input:
        lambda w: evaluating_inputs(unevaluated(w.group)),
    output:
        temp(touch(f"{EVALUATED}/{{group}}.done")),
    log:
        "logs/evaluate_group/{group}.log",
    conda:
        environment("model")
    threads: threads("evaluate")
    resources:
        gpu=gpus(),
    params:
        told=lambda w: evaluating(unevaluated(w.group), f"{EVALUATED}/{w.group}"),
    shell:  # an SAE that cannot be measured (exit code 2) is left to its own job, which says so
        "(python -m saeflow evaluate {params.told} --threads {threads} || [ $? -eq 2 ]) 2>&1 | tee {log}"


rule show_latents:
    input:
        lambda w: evaluating_inputs([w.run]),
    output:
        page="results/evaluations/latents/{run}/latents.html",
        record="results/evaluations/latents/{run}/provenance.json",
    log:
        "logs/show_latents/{run}.log",
    conda:
        environment("model")
    threads: threads("evaluate")
    resources:
        gpu=gpus(),
    params:
        key=lambda w: plan.key_latents(w.run),
        evaluation=lambda w: json.dumps(plan.evaluation(plan.evaluated[w.run].source)),
        settings=lambda w: json.dumps(plan.latents()),
        mark=plan.mark,
    shell:
        "python -m saeflow latents --sae results/saes/{wildcards.run} --results results"
        " --evaluation {params.evaluation:q} --settings {params.settings:q} --threads {threads}"
        " --mark={params.mark:q}"
        " --key {params.key} --out results/evaluations/latents/{wildcards.run} 2>&1 | tee {log}"


rule interpret_sae:
    input:
        lambda w: evaluating_inputs([w.run]),
    output:
        probing="results/evaluations/interpretability/{run}/probing.csv",
        detection="results/evaluations/interpretability/{run}/detection.csv",
        absorption="results/evaluations/interpretability/{run}/absorption.csv",
        record="results/evaluations/interpretability/{run}/provenance.json",
    log:
        "logs/interpret_sae/{run}.log",
    conda:
        environment("model")
    threads: threads("evaluate")
    resources:
        gpu=gpus(),
    params:
        key=lambda w: plan.key_interpretation(w.run),
        evaluation=lambda w: json.dumps(plan.evaluation(plan.evaluated[w.run].source)),
        settings=lambda w: json.dumps(plan.interpretability()),
    shell:
        "python -m saeflow interpret --sae results/saes/{wildcards.run} --results results"
        " --evaluation {params.evaluation:q} --settings {params.settings:q} --threads {threads}"
        " --key {params.key} --out results/evaluations/interpretability/{wildcards.run} 2>&1 | tee {log}"


rule evaluate_baselines:
    input:
        lambda w: evaluation_inputs(w.source, w.hook_point) + other_inputs(w.source, w.hook_point),
    output:
        metrics="results/evaluations/{source}/{hook_point}/baselines/metrics.csv",
        histograms="results/evaluations/{source}/{hook_point}/baselines/histograms.csv",
        record="results/evaluations/{source}/{hook_point}/baselines/provenance.json",
    log:
        "logs/evaluate_baselines/{source}_{hook_point}.log",
    conda:
        environment("model")
    threads: threads("evaluate")
    resources:
        gpu=gpus(),
    params:
        key=lambda w: plan.key_baselines(w.source, w.hook_point),
        ranks=json.dumps(plan.pca_ranks()),
        evaluation=lambda w: json.dumps(plan.evaluation(w.source)),
    shell:
        "python -m saeflow baselines --store {wildcards.source}/{wildcards.hook_point}"
        " --ranks {params.ranks:q} --results results --evaluation {params.evaluation:q}"
        " --threads {threads} --key {params.key}"
        " --out results/evaluations/{wildcards.source}/{wildcards.hook_point}/baselines 2>&1 | tee {log}"


rule compare_seeds:
    input:
        saes=lambda w: [f"results/saes/{run}/provenance.json" for run in plan.seeds[w.setting]],
        stores=lambda w: [
            f"results/stores/{plan.runs[plan.seeds[w.setting][0]].source}/{split}/provenance.json"
            for split in ("train", "evaluation")
        ],
    output:
        stability="results/evaluations/stability/{setting}/stability.csv",
        record="results/evaluations/stability/{setting}/provenance.json",
    log:
        "logs/compare_seeds/{setting}.log",
    conda:
        environment("model")
    threads: threads("evaluate")
    resources:
        gpu=gpus(),
    params:
        key=lambda w: plan.key_stability(w.setting),
        saes=lambda w: " ".join(f"--sae=results/saes/{run}" for run in plan.seeds[w.setting]),
        evaluation=json.dumps(plan.row_policy()),
    shell:
        "python -m saeflow stability {params.saes} --results results"
        " --evaluation {params.evaluation:q} --threads {threads} --key {params.key}"
        " --out results/evaluations/stability/{wildcards.setting} 2>&1 | tee {log}"


rule collect_tables:
    input:
        evaluations=EVALUATIONS,
        saes=SAES,
        probes=PROBES,
        stability=STABILITY,
        interpreted=INTERPRETED,
    output:
        tables=expand("results/tables/{table}.csv", table=TABLES),
        json="results/tables/metrics.json",
        record="results/tables/provenance.json",
    log:
        "logs/collect_tables.log",
    conda:
        environment("model")
    params:
        key=plan.key_tables(),
    shell:
        "python -m saeflow collect {input.saes} {input.evaluations} {input.probes} {input.stability} {input.interpreted} --key {params.key}"
        " --out results/tables 2>&1 | tee {log}"
