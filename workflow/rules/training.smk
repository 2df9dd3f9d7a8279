"""Training: one SAE a job.

Expects results/stores/SOURCE/train (and the probes of results/complexity that runs use); leaves results/saes/RUN with weights, config and steps.csv. A job
that is killed goes on from its last checkpoint when it is started again.
"""


rule train_sae:
    input:
        store=lambda w: f"results/stores/{plan.runs[w.run].source}/train/provenance.json",
        probe=lambda w: [f"{folder}/provenance.json" for folder in probe_folder(w.run)],
    output:
        weights="results/saes/{run}/weights.safetensors",
        config="results/saes/{run}/config.json",
        steps="results/saes/{run}/steps.csv",
        record="results/saes/{run}/provenance.json",
    log:
        "logs/train_sae/{run}.log",
    conda:
        "../../envs/train.yaml"
    threads: threads("train")
    resources:
        gpu=gpus(),
    params:
        key=lambda w: plan.key_sae(w.run),
        run=lambda w: json.dumps(plan.run(w.run)),
        store=lambda w: f"results/stores/{plan.runs[w.run].source}/train",
        probe=lambda w: [f"--probe={folder}" for folder in probe_folder(w.run)],
    shell:
        "python -m saeflow train --store {params.store} --run {params.run:q}"
        " {params.probe} --threads {threads} --key {params.key}"
        " --out results/saes/{wildcards.run} 2>&1 | tee {log}"
