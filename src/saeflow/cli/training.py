"""The job that trains SAEs."""

import os
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from saeflow import provenance
from saeflow.cli.arguments import (
    Group,
    Keys,
    RuntimeJson,
    Threads,
    keys_of_each,
    machine_of,
    parse_json,
    place_of,
)
from saeflow.config import SAEConfig
from saeflow.errors import UserError


def train(
    store: Annotated[Path, typer.Option(help="Folder of the training split's stores.")],
    run: Annotated[
        list[str], typer.Option(help="One run of `saes`, as JSON; several: in one pass.")
    ],
    runtime: RuntimeJson,
    threads: Threads,
    out: Annotated[list[Path], typer.Option(help="Written: the result folder of each run.")],
    probes: Annotated[
        Path | None, typer.Option(help="Folder of the source's complexities, with their probes.")
    ] = None,
    saes: Annotated[
        Path | None,
        typer.Option(help="Folder of trained SAEs, for runs that take their k from one."),
    ] = None,
    key: Keys = None,
    group: Group = "",
) -> None:
    """Train SAEs on one store, one or several in one pass over its batches."""
    configs = [SAEConfig.from_dict(parse_json("--run", text)) for text in run]
    keys = keys_of_each("--run", len(run), out, key)
    if len({(config.source, config.hook_point) for config in configs}) > 1:
        raise UserError("--run: expected runs of one store, found several. Train them one by one.")
    is_there = [
        os.environ.get("RANK", "0") == "0"
        and provenance.take(place_of(group, Path(config.name), folder), folder, name)
        for config, folder, name in zip(configs, out, keys, strict=True)
    ]
    if all(is_there) and os.environ.get("WORLD_SIZE", "1") == "1":
        return  # without waiting for torch: most jobs only take what their group has trained
    from saeflow.saes import Ranks
    from saeflow.stores import open_store
    from saeflow.training import train_group

    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of torchrun
    machine = machine_of(runtime, max(1, threads // here))
    machine["logging"] = {"folder": "logs", **machine.get("logging", {})}
    ranks = Ranks.from_environment(machine["ranks"]["split"], machine["device"])
    left = [
        (config, folder, name)
        for config, folder, name, there in zip(configs, out, keys, is_there, strict=True)
        if not ranks.agree(int(there), False)[0]
    ]
    if not left:
        return
    reader = open_store(store / f"{configs[0].hook_point}.zarr")
    wanted = [
        (_with_k(config, _guide_of(config, saes), reader), folder, name, _probe_of(config, probes))
        for config, folder, name in left
    ]
    with ExitStack() as stack:
        jobs: list[provenance.Job] = []
        for config, folder, name, probe in wanted if ranks.rank == 0 else ():
            making = provenance.job(
                folder,
                name="train",
                inputs=[store, *filter(None, [probe, _guide_of(config, saes)])],
                params={"run": asdict(config), "precision": machine["precision"]},
                key=name,
                seed=config.seed,
                device=machine["device"],
                resumable=True,
                checked=not jobs,  # one check serves all
            )
            jobs.append(stack.enter_context(making))
        ranks.wait()  # for the folders
        tasks = [
            (config, provenance.partial_of(folder), probe) for config, folder, _, probe in wanted
        ]
        found = train_group(reader, tasks, machine, ranks)
        for job, trained in zip(jobs, found, strict=False):
            job.details["content"], job.share = trained.content, trained.share


def _guide_of(config: SAEConfig, saes: Path | None) -> Path | None:
    """The folder of the SAE that a run takes its k from, if any."""
    if config.guide is None:
        return None
    if saes is None:
        raise UserError(f"--saes: {config.name} takes its k from {config.guide}; say where it is.")
    return saes / config.guide


def _with_k(config: SAEConfig, guide: Path | None, store: Any) -> SAEConfig:
    """The run with the k that its guide found, where it has one."""
    if guide is None:
        return config
    from saeflow.saes import load
    from saeflow.training import with_found_k

    provenance.check(guide)
    return with_found_k(config, load(guide), store)


def _probe_of(config: SAEConfig, folder: Path | None) -> Path | None:
    """The folder of the probe that a run uses, if any."""
    name = config.options.get("complexity")
    if name is None:
        return None
    if folder is None:
        raise UserError(
            f"--probes: {config.name} reads the complexity {name!r}; say where its probe is."
        )
    return folder / name / "probes" / config.hook_point
