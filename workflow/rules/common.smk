"""What the rules share: the validated parameters, the plan of jobs with their keys, paths."""

import atexit
import json
import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import snakemake.persistence.file
from snakemake.settings.types import DeploymentMethod
from snakemake.utils import listfiles

# A checkout holds the package beside its Snakefile; an installed package holds the Snakefile, and a workflow that
# takes this one as a module has neither: Python finds the package.
project = Path(workflow.basedir)
if not (project / "src").is_dir() and (project.parent / "src/saeflow").is_dir():
    project = project.parent  # workflow/Snakefile
package = project / "src"
if package.is_dir():
    sys.path.insert(0, str(package))

from saeflow.config import ROOT, check_params
from saeflow.device import has_gpu
from saeflow.errors import UserError
from saeflow.failures import failures
from saeflow.figures import find
from saeflow.jobs import Groups, Jobs, arguments, tasks
from saeflow.jobs.code import package_code
from saeflow.preflight import (
    check_inputs,
    check_owner,
    check_saes,
    check_targets,
    checked_plan,
    device_problem,
    take_results,
    warnings,
)
from saeflow.installed import programs_folder
from saeflow.provenance import is_whole
from saeflow.tables.schema import TABLES

if "{" in os.getcwd():
    # Snakemake 9 looks for its locks with the whole path as a pattern of wildcards.
    snakemake.persistence.file.listfiles = lambda path: listfiles(os.path.relpath(path))

try:
    # Of a command, of this project, or of the workflow that took this one as a module (config/README.md).
    parameter_files = workflow.configfiles
    config.update(check_params(config, parameter_files))
    plan = checked_plan(config)
    if workflow.is_main_process:
        check_owner(parameter_files)  # -n too: its list would be of the wrong results
    check_targets(plan, sys.argv[1:])  # Snakemake tells the targets later, as an exception
    jobs = Jobs(plan)
    jobs.work_out_keys()
except UserError as error:
    print(*(f"error: {line}" for line in error.lines), sep="\n", file=sys.stderr)
    sys.exit(2)

# A rule runs this project's package with the environment's own interpreter.
prefix = f"export PYTHONPATH={shlex.quote(str(package))}; " if package.is_dir() else ""
# What a job needs to know of the machine is no parameter of the job: it changes no result.
prefix = f"{prefix}export SAEFLOW_RUNTIME={shlex.quote(json.dumps(config['runtime']))}; "
has_conda = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
if has_conda and not package.is_dir():
    print(
        "error: --use-conda: expected a checkout of saeflow, whose package other environments can read, found an "
        "installed package. Clone saeflow, or leave the option out.",
        file=sys.stderr,
    )
    sys.exit(2)
if not has_conda:
    prefix = f"{prefix}export PATH={shlex.quote(str(programs_folder()))}:$PATH; "
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
    delete_what_streams_left()
    # An output of a stage that DVC knows, also where no entry of `complexity` fills it.
    Path("results/complexity").mkdir(parents=True, exist_ok=True)
    # File times decide nothing here, but Snakemake fails a job whose input seems to be from the future: what was
    # made while a clock was ahead is from now.
    for pattern in ("provenance.json", "*.parts/*/*", "*.windows/*", ".snakemake_timestamp"):
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
    window="[0-9]+",
    draw="[0-9]+",
    part="[0-9]+",
    parts="[0-9]+",
    group="[0-9a-f]+",
    figure="(?!table_)[a-z0-9_]+",
    table="table_[a-z0-9_]+",
    run="[^/]+/[^/]+/(?!on/)[^/]+/[^/]+",  # on/ is what evaluation.also_on needs
    setting="[^/]+/[^/]+/[^/]+/[^/]+",


def records(found):
    """What stands for results: their records."""
    return [job.record for job in found]


def task(*made):
    """What a command is told: the results that it makes, and all that they depend on."""
    return arguments(tasks(made))


INPUTS = records(
    [
        *map(jobs.inputs, plan.sources),
        *(jobs.labelled(source, name) for source in plan.sources for name in plan.labelled(source)),
    ]
)
# The training split of a stream comes to be while SAEs are trained.
STORES = records(
    jobs.store(source, split)
    for source, split in plan.splits_of_sources()
    if split == "evaluation" or not plan.is_streamed(source)
)
SAES = records(map(jobs.sae, plan.evaluated))
PAGES = records(map(jobs.latents, plan.pages))
FIGURES = records(map(jobs.figure, config["figures"]["names"]))


def environment(name):
    """The file of a conda environment, whose path Snakemake reads as a pattern of wildcards."""
    path = str(ROOT / "envs" / f"{name}.yaml")
    return path.replace("{", "{{").replace("}", "}}")


def threads(step):
    return config["runtime"]["threads"][step]


def gpus():
    """GPUs of a job that runs a model or trains; `auto` asks for one where this machine has one."""
    asked = config["runtime"]["device"]
    return int(has_gpu() if asked == "auto" else asked != "cpu")


def parts(source, split, window):
    """The parts of a window of a split. They are temporary: made only where the store is to be made."""
    count = config["runtime"]["extraction_jobs"]
    folder = f"results/stores/{source}/{split}.parts/{window}"
    return [f"{folder}/{part}-of-{count}" for part in range(count)]


def delete_halves():
    """Delete parts and windows that Snakemake was killed while deleting.

    Both are made aside and renamed when whole. A half is of no use, and as it seems newer than what was made from it,
    Snakemake would make that again, from the half.
    """
    for path in Path("results/stores").glob("*/*/*/*-of-*"):
        if re.fullmatch(r"[0-9]+-of-[0-9]+", path.name) and not is_whole(path):
            shutil.rmtree(path)
    for path in Path("results/stores").glob("*/*.windows/[0-9]*"):
        if path.name.isdigit() and not is_whole(path):
            shutil.rmtree(path)


# Before jobs are planned, and not while another run, which holds the lock, may be deleting.
if workflow.is_main_process and not any(Path(".snakemake/locks").glob("*")):
    delete_halves()


def launcher():
    """What starts training: python, or torchrun for several processes."""
    ranks = config["runtime"]["ranks"]["count"]
    if ranks == 1:
        return "python"
    return f"torchrun --standalone --nproc-per-node={ranks}"


# SAEs of one store that one job trains, and that one job evaluates: see saeflow.jobs.groups.
TRAINED = Groups(
    [jobs.sae(run) for run in runs]
    for runs in plan.training_groups
    if not plan.is_streamed(plan.runs[runs[0]].source)
)
EVALUATED = Groups([jobs.evaluation(run) for run in runs] for runs in plan.evaluation_groups)


def done_of(folder, groups, job):
    """What says that the job of a result's group ended, where the result is in a group and not there yet."""
    group = groups.of(job)
    return [] if group is None or job.is_made else f"{folder}/{group}.done"
