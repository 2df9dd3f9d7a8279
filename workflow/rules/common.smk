"""What the rules share: the validated parameters, the plan of jobs with their keys, paths."""

import atexit
import json
import os
import shlex
import sys
import time
from base64 import urlsafe_b64encode
from pathlib import Path

import snakemake.persistence.file
from snakemake.settings.types import DeploymentMethod
from snakemake.utils import listfiles

sys.path.insert(0, str(Path(workflow.basedir) / "src"))

from saeflow.config import check_params
from saeflow.device import has_gpu
from saeflow.errors import UserError
from saeflow.failures import failures
from saeflow.preflight import (
    check_inputs,
    check_saes,
    check_targets,
    checked_plan,
    device_problem,
    take_results,
    warnings,
)
from saeflow.tables.schema import TABLES

if "{" in os.getcwd():
    # Snakemake 9 looks for its locks with the whole path as a pattern of wildcards.
    snakemake.persistence.file.listfiles = lambda path: listfiles(os.path.relpath(path))

try:
    parameter_files = workflow.overwrite_configfiles or ["params.yaml"]
    config.update(check_params(config, parameter_files))
    plan = checked_plan(config)
    check_targets(plan, sys.argv[1:])  # Snakemake tells the targets later, as an exception
except UserError as error:
    print(*(f"error: {line}" for line in error.lines), sep="\n", file=sys.stderr)
    sys.exit(2)

# A rule runs this project's package with the environment's own interpreter.
package = Path(workflow.basedir) / "src"
prefix = f"export PYTHONPATH={shlex.quote(str(package))}; "
# What a job needs to know of the machine is no parameter of the job: it changes no result.
prefix = f"{prefix}export SAEFLOW_RUNTIME={shlex.quote(json.dumps(config['runtime']))}; "
has_conda = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
if not has_conda:
    programs = os.environ.get(
        "SAEFLOW_PROGRAMS", str(Path(sys.executable).parent)
    )  # set by rehearse
    prefix = f"{prefix}export PATH={shlex.quote(programs)}:$PATH; "
# Snakemake reads the prefix as a format string.
shell.prefix(f"set -euo pipefail; {prefix}".replace("{", "{{").replace("}", "}}"))


onstart:
    # What takes torch to know, once before the first job and not for a plan.
    try:
        check_inputs(plan)
        check_saes(plan)
        for warning in warnings(plan):
            print(f"warning: {warning}", file=sys.stderr)
        if (
            workflow.local_exec
            and not has_conda
            and (problem := device_problem(config["runtime"]))
        ):
            raise UserError(problem)
        take_results(parameter_files)
    except UserError as error:
        print(*(f"error: {line}" for line in error.lines), sep="\n", file=sys.stderr)
        sys.exit(2)
    # An output of a stage that DVC knows, also where no entry of `complexity` fills it.
    Path("results/complexity").mkdir(parents=True, exist_ok=True)
    # File times decide nothing here, but Snakemake fails a job whose input seems to be from the future: what was
    # made while a clock was ahead is from now.
    for pattern in (RECORD, "*.parts/*", "*.parts/*/.snakemake_timestamp"):
        for path in Path("results").rglob(pattern):
            if path.stat().st_mtime > time.time():
                os.utime(path)


onerror:
    # What went wrong, in one line a failed job, below all that Snakemake has to say of it.
    for line in failures(map(Path, log)):
        atexit.register(print, line, file=sys.stderr, flush=True)


wildcard_constraints:
    source="[a-z0-9._-]+",
    other="[a-z0-9._-]+",
    hook_point="[A-Za-z0-9._-]+",
    complexity="[a-z0-9._-]+",
    labelled="[a-z0-9._-]+",
    split="train|evaluation",
    part="[0-9]+",
    parts="[0-9]+",
    group="[0-9]+",
    figure="(?!table_)[a-z0-9_]+",
    table="table_[a-z0-9_]+",
    run="[^/]+/[^/]+/(?!on/)[^/]+/[^/]+",  # on/ is what evaluation.also_on needs
    setting="[^/]+/[^/]+/[^/]+/[^/]+",


RECORD = "provenance.json"
INPUTS = [
    *(f"results/sources/{source}/inputs/{RECORD}" for source in plan.sources),
    *(
        f"results/evaluations/{source}/labelled/{name}/{RECORD}"
        for source in plan.sources
        for name in plan.labelled(source)
    ),
]
STORES = [
    f"results/stores/{source}/{split}/{RECORD}"
    for source in plan.sources
    for split in plan.splits(source)
]
SAES = [f"results/saes/{run}/{RECORD}" for run in plan.runs]
IMPORTS = [f"results/saes/{run}/{RECORD}" for run in plan.imports]
EVALUATIONS = [
    *(f"results/evaluations/{run}/{RECORD}" for run in plan.evaluated),
    *(
        f"results/evaluations/{source}/{hook_point}/baselines/{RECORD}"
        for source, hook_point in plan.stores
    ),
]
PAGES = [f"results/evaluations/latents/{run}/{RECORD}" for run in plan.pages]
PROBES = [
    f"results/complexity/{source}/{name}/probes/{hook_point}/{RECORD}"
    for source, hook_point, name in plan.probes
]
STABILITY = [f"results/evaluations/stability/{setting}/{RECORD}" for setting in plan.seeds]
INTERPRETED = [f"results/evaluations/interpretability/{run}/{RECORD}" for run in plan.interpreted]
TRAINED, EVALUATED = "results/saes.groups", "results/evaluations.groups"
FIGURES = [f"results/figures/{figure}/{RECORD}" for figure in config["figures"]["names"]]


def environment(name):
    """The file of a conda environment, whose path Snakemake reads as a pattern of wildcards."""
    path = str(Path(workflow.basedir, "envs", f"{name}.yaml"))
    return path.replace("{", "{{").replace("}", "}}")


def threads(step):
    return config["runtime"]["threads"][step]


def gpus():
    """GPUs of a job that runs a model or trains; `auto` asks for one where this machine has one."""
    asked = config["runtime"]["device"]
    return int(has_gpu() if asked == "auto" else asked != "cpu")


def model_record(wildcards):
    """The record of the source's model, where it has one."""
    return (
        f"results/sources/{wildcards.source}/model/{RECORD}"
        if plan.has_model(wildcards.source)
        else []
    )


def same_model(source, file=""):
    """The folder (or a file in it) of the same model that another source fetches, as a list."""
    other = plan.same_model(source)
    return [str(Path(f"results/sources/{other}/model", file))] if other else []


def clean_record(source, hook_point):
    """The record of the clean side of the model in the loop."""
    return f"results/evaluations/{source}/{hook_point}/clean/{RECORD}"


def probe_folder(run):
    """The folder of the probe that a run uses, if any, as a list."""
    config, name = plan.runs[run], plan.complexity(run)
    return [f"results/complexity/{config.source}/{name}/probes/{config.hook_point}"] if name else []


def evaluation_inputs(source, hook_point):
    """The records of what an SAE of one store is measured on."""
    splits = [f"results/stores/{source}/{split}/{RECORD}" for split in ("train", "evaluation")]
    model = [clean_record(source, hook_point)] if plan.has_model(source) else []
    folder = f"results/evaluations/{source}/{hook_point}/dimension"
    dimension = [f"{folder}/{RECORD}"] if plan.has_dimension(source) else []
    return [*splits, *model, *dimension]


def other_inputs(source, hook_point):
    """The records of what an SAE of one store is measured on beside it: `evaluation.also_on`."""
    found = []
    for other in plan.others(source):
        found += [f"results/stores/{other}/evaluation/{RECORD}"]
        found += [f"results/sources/{other}/inputs/{RECORD}"]
        if not plan.kind(other).has_labelled_sets:
            found += [f"results/evaluations/{source}/{hook_point}/on/{other}/{RECORD}"]
        if plan.has_dimension(other):
            found += [f"results/evaluations/{other}/{hook_point}/dimension/{RECORD}"]
    return found


def is_current(folder, key):
    """Whether a result with this key is there, of a job that Snakemake saw end (else it runs again)."""
    record = Path(folder, RECORD)
    if not record.exists() or json.loads(record.read_text()).get("key") != key:
        return False
    marker = urlsafe_b64encode(str(record).encode()).decode()  # as Snakemake names it
    return not Path(".snakemake/incomplete", marker).exists()


def is_forced():
    """Whether jobs were asked for again although their results are there."""
    return bool(workflow.dag_settings.forceall or workflow.dag_settings.forcerun)


def parts(wildcards):
    """The parts of a split; none where its store is there, however many jobs made it."""
    source, split = wildcards.source, wildcards.split
    made = [
        is_current(f"results/stores/{source}/{split}", plan.key_store(source, split)),
        is_current(f"results/sources/{source}/inputs", plan.key_inputs(source)),
        not plan.has_model(source)
        or is_current(f"results/sources/{source}/model", plan.key_model(source)),
    ]
    if all(made) and not is_forced():
        return []
    count = config["runtime"]["extraction_jobs"]
    return [f"results/stores/{source}/{split}.parts/{part}-of-{count}" for part in range(count)]


def launcher():
    """What starts training: python, or torchrun for several processes."""
    ranks = config["runtime"]["ranks"]["count"]
    if ranks == 1:
        return "python"
    return f"torchrun --standalone --nproc-per-node={ranks}"


def training(runs, folder):
    """What training some runs of one store is told."""
    source = plan.runs[runs[0]].source
    each = (
        f"--run={shlex.quote(json.dumps(plan.run(run)))} --key={plan.key_sae(run)} --out={folder}/{run}"
        for run in runs
    )
    stores = (
        f"--store=results/stores/{source}/train --probes=results/complexity/{source}"
        " --saes=results/saes"
    )
    return " ".join([stores, *each])


def training_inputs(runs):
    """The records of what some runs of one store read."""
    store = f"results/stores/{plan.runs[runs[0]].source}/train/{RECORD}"
    probes = {f"{folder}/{RECORD}" for run in runs for folder in probe_folder(run)}
    guides = {plan.runs[run].guide for run in runs} - {None}
    return [store, *sorted(probes), *(f"results/saes/{guide}/{RECORD}" for guide in sorted(guides))]


def is_trained(run):
    return is_current(f"results/saes/{run}", plan.key_sae(run)) and not is_forced()


def is_evaluated(run):
    return is_current(f"results/evaluations/{run}", plan.key_evaluation(run)) and not is_forced()


def untrained(group):
    """The runs of a group that are still to be trained."""
    return [run for run in plan.training_groups[int(group)] if not is_trained(run)]


def unevaluated(group):
    """The runs of a group that are still to be evaluated."""
    return [run for run in plan.evaluation_groups[int(group)] if not is_evaluated(run)]


def done_in_group(run, groups, folder, is_there):
    """What says that a group's job has made a run's result, where it is to."""
    if config["runtime"]["saes_per_job"] == 1 or is_there(run):
        return []
    group = next(i for i, runs in enumerate(groups) if run in runs)
    return f"{folder}/{group}.done"


def evaluating(runs, folder):
    """What evaluating some runs of one store is told."""
    source = plan.evaluated[runs[0]].source
    each = (
        f"--sae=results/saes/{run} --key={plan.key_evaluation(run)} --out={folder}/{run}"
        for run in runs
    )
    evaluation = (
        f"--results=results --evaluation={shlex.quote(json.dumps(plan.evaluation(source)))}"
    )
    return " ".join([evaluation, *each])


def evaluating_inputs(runs):
    """The records of what evaluating some runs of one store reads."""
    store = plan.evaluated[runs[0]]
    saes = [f"results/saes/{run}/{RECORD}" for run in runs]
    place = (store.source, store.hook_point)
    return saes + evaluation_inputs(*place) + other_inputs(*place)
