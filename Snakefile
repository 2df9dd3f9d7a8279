"""saeflow: activations -> sparse autoencoders -> tables -> figures. Targets below; steps in workflow/rules."""

if not workflow.overwrite_configfiles:  # a preset replaces the parameters, it does not add to them

    configfile: "params.yaml"


# On a cluster each job asks for its own GPU: a limit of this machine's (profiles/default) is not one of the cluster's.
resource_scopes:
    gpu="local",


include: "workflow/rules/common.smk"
include: "workflow/rules/streams.smk"
include: "workflow/rules/sources.smk"
include: "workflow/rules/stores.smk"
include: "workflow/rules/complexity.smk"
include: "workflow/rules/training.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/figures.smk"


localrules:
    all,
    inputs,
    extract,
    train,
    evaluate,
    figures,


rule all:
    default_target: True
    input:
        "results/report.html",


rule inputs:  # all that may need a network
    input:
        INPUTS,


rule extract:
    input:
        STORES,


rule train:
    input:
        SAES,


rule evaluate:
    input:
        "results/tables/provenance.json",
        PAGES,


rule figures:
    input:
        FIGURES,
        "results/report.html",
