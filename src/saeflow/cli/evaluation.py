"""Jobs that evaluate SAEs and baselines, and gather their tables."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeflow import jobs, provenance
from saeflow.cli.arguments import (
    Ahead,
    RuntimeJson,
    Task,
    Tasks,
    Threads,
    is_made,
    job_of,
    machine_of,
    placed,
    source_folder,
)
from saeflow.config import scorer_file
from saeflow.errors import UserError
from saeflow.files import file_digest
from saeflow.jobs import read_task

if TYPE_CHECKING:
    from saeflow.evaluation import Setup


def clean(task: Task, runtime: RuntimeJson, threads: Threads) -> None:
    """Run the model once on evaluation inputs: the clean side that every SAE is compared with."""
    from saeflow.evaluation.in_model import clean_writer
    from saeflow.stores import open_store

    asked, machine = read_task(task), machine_of(runtime, threads)
    source, hook_point = asked.params["source"], asked.params["hook_point"]
    labelled = {
        role.removeprefix("labelled/"): asked.one(role)
        for role in asked.reads
        if role.startswith("labelled/")
    }
    with job_of(asked, "clean", device=machine["device"]) as job:
        mean = open_store(asked.one("train") / f"{hook_point}.zarr").mean
        job.details["notes"] = clean_writer(source)(
            source, source_folder(asked), hook_point, mean, asked.params, labelled, machine["device"], job.path
        )  # fmt: skip


def dimension(task: Task) -> None:
    """Estimate the local intrinsic dimension of evaluation rows."""
    from saeflow.evaluation.dimension import write_dimensions
    from saeflow.stores import open_store

    asked = read_task(task)
    with job_of(asked, "dimension") as job:
        place = {name: asked.params[name] for name in ("source", "hook_point")}
        store = open_store(asked.one("evaluation") / f"{place['hook_point']}.zarr")
        write_dimensions(store, place, asked.params["dimension"], job.path)


def evaluate(tasks: Tasks, runtime: RuntimeJson, threads: Threads, ahead: Ahead = False) -> None:
    """Measure SAEs of one store on held-out activations and with the model in the loop."""
    left = [
        placed(task, ahead=ahead)
        for task in jobs.read_tasks(tasks)
        if not is_made(task, ahead=ahead)
    ]
    if not left:
        return  # without waiting for torch, like `train`
    from saeflow.evaluation import Setup, evaluate_sae, setups
    from saeflow.saes import load, read_config

    machine = machine_of(runtime, threads)
    measured_on: list[Setup] = []
    refused: list[UserError] = []
    for task in left:
        sae = task.one("sae")
        try:
            provenance.check(sae)
            config = read_config(sae)
            if not measured_on:
                for path in task.inputs:  # once for all
                    provenance.check(path)
                store = (config["source"], config["hook_point"])
                settings = task.params["evaluation"]
                measured_on = setups(_folders(task), *store, settings, machine["device"])
            with job_of(
                task, "evaluate", seed=config["seed"], device=machine["device"], checked=False
            ) as job:
                evaluate_sae(load(sae), config, measured_on, job.path)
        except UserError as error:  # the others are measured all the same
            refused.append(error)
    if refused:
        raise refused[0]


def latents(task: Task, runtime: RuntimeJson, threads: Threads) -> None:
    """Write a page with a card for every latent of an SAE."""
    from saeflow.evaluation import collect_latents
    from saeflow.figures.latents import write_page
    from saeflow.saes import load

    asked, machine = read_task(task), machine_of(runtime, threads)
    settings = asked.params["latents"]
    with job_of(asked, "latents", device=machine["device"]) as job:
        sae = asked.one("sae")
        config, setup = _setup(asked, sae, machine["device"])
        arrays, facts = collect_latents(load(sae), config, setup, settings, job.path)
        shown = {**facts, "before": settings["before"], "mark": asked.params["mark"]}
        write_page(arrays, shown, job.path / "latents.html")


def interpret_(task: Task, runtime: RuntimeJson, threads: Threads) -> None:
    """Probe an SAE's latents for what its source knows, score how well single ones are predicted, measure absorption."""
    from saeflow.evaluation.interpret import interpret
    from saeflow.saes import load

    asked, machine = read_task(task), machine_of(runtime, threads)
    settings = asked.params["interpretability"]
    own = scorer_file(settings)
    external = {os.path.relpath(own): file_digest(own)} if own else None
    with job_of(asked, "interpret", external=external, device=machine["device"]) as job:
        sae = asked.one("sae")
        config, setup = _setup(asked, sae, machine["device"])
        job.details |= interpret(load(sae), config, setup, settings, job.path)


def baselines(task: Task, runtime: RuntimeJson, threads: Threads) -> None:
    """Measure what any SAE must beat: identity, mean, PCA."""
    from saeflow.evaluation import evaluate_baselines, setups

    asked, machine = read_task(task), machine_of(runtime, threads)
    params = asked.params
    source, _, hook_point = params["store"].partition("/")
    with job_of(asked, "baselines", device=machine["device"]) as job:
        measured_on = setups(
            _folders(asked), source, hook_point, params["evaluation"], machine["device"]
        )
        evaluate_baselines(params["pca_ranks"], measured_on, job.path)


def stability(task: Task, runtime: RuntimeJson, threads: Threads) -> None:
    """Compare SAEs that differ in their seed only."""
    from saeflow.evaluation.stability import write_stability
    from saeflow.saes import load, read_config

    asked, machine = read_task(task), machine_of(runtime, threads)
    folders = asked.many("saes")
    with job_of(asked, "stability", device=machine["device"]) as job:
        configs = [read_config(folder) for folder in folders]
        if len({config["name"].removesuffix(f"-seed{config['seed']}") for config in configs}) != 1:
            raise UserError(
                "TASK: expected SAEs that differ in their seed only, found several settings."
            )
        if len(configs) < 2 or len({config["seed"] for config in configs}) < len(configs):
            raise UserError("TASK: expected two or more SAEs of different seeds. Give each once.")
        first, setup = _setup(asked, folders[0], machine["device"])
        for config in configs:
            setup.check_fits(config)
        saes = {config["seed"]: load(path) for config, path in zip(configs, folders, strict=True)}
        write_stability(saes, first, setup, job.path)


def rivals(task: Task) -> None:
    """Compare SAEs that find their own k with those that are trained at the L0 that they found."""
    from saeflow.evaluation.rivals import control_lines, rival_lines
    from saeflow.tables.evaluations import write_lines

    asked = read_task(task)
    folders = dict(zip(asked.params["runs"], asked.many("evaluations"), strict=True))
    comparisons, settings = asked.params["rivals"], asked.params["bootstrap"]
    places = [
        (one["source"], one["hook_point"], one["entry"], one["setting"]) for one in comparisons
    ]
    own = dict(zip(reversed(places), reversed(comparisons), strict=True))  # each setting once
    with job_of(asked, "rivals") as job:
        lines = [line for one in comparisons for line in rival_lines(one, folders, settings)]
        lines += [line for one in own.values() for line in control_lines(one, folders, settings)]
        write_lines(job.path, "rivals", lines)


def choose(task: Task) -> None:
    """Choose among the trials of tuned SAEs, and report on other documents, images or samples."""
    from saeflow.evaluation.sweeps import trial_lines
    from saeflow.tables.evaluations import write_lines

    asked = read_task(task)
    folders = dict(zip(asked.params["runs"], asked.many("evaluations"), strict=True))
    sweep, bootstrap = asked.params["sweep"], asked.params["bootstrap"]
    with job_of(asked, "choose") as job:
        settings = asked.params["settings"]
        lines = [line for one in settings for line in trial_lines(one, folders, sweep, bootstrap)]
        write_lines(job.path, "sweeps", lines)


def collect(task: Task) -> None:
    """Gather the tables of all runs."""
    from saeflow.tables.collect import collect as collect_tables

    asked = read_task(task)
    with job_of(asked, "collect") as job:
        collect_tables(
            asked.many("evaluations"), asked.many("saes"), asked.many("probes"), job.path,
            asked.many("stability"), asked.many("interpretations"), asked.many("rivals"), asked.many("sweeps"),
            asked.many("dimensions"),
        )  # fmt: skip


def _setup(task: jobs.Task, sae: Path, device: str) -> "tuple[dict[str, Any], Setup]":
    """Open the configuration of an SAE and the setup of its own store."""
    from saeflow.evaluation import Folders, Setup
    from saeflow.saes import read_config

    config = read_config(sae)
    folders = Folders.of(_folders(task))
    settings = task.params["evaluation"]
    return config, Setup(folders, config["source"], config["hook_point"], settings, device)


def _folders(task: jobs.Task) -> dict[str, Path]:
    return {role: path for role, path in task.reads.items() if isinstance(path, Path)}
