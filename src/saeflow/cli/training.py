"""The job that trains SAEs."""

import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from saeflow import jobs, provenance
from saeflow.cli.arguments import Ahead, RuntimeJson, Tasks, Threads, is_made, machine_of, placed
from saeflow.config import SAEConfig
from saeflow.errors import UserError
from saeflow.files import read_json

Wanted = list[tuple[jobs.Task, SAEConfig]]


def train(
    tasks: Tasks,
    runtime: RuntimeJson,
    threads: Threads,
    ahead: Ahead = False,
    window: Annotated[
        Path | None,
        typer.Option(
            help="With --draw and --first: go on with training on this window alone, and leave a checkpoint."
        ),
    ] = None,
    draw: Annotated[
        int | None, typer.Option(min=0, help="With --window: its number in the whole training.")
    ] = None,
    first: Annotated[
        Path | None, typer.Option(help="With --window: the facts of the first window, as JSON.")
    ] = None,
) -> None:
    """Train SAEs on one store, one or several in one pass over its batches."""
    asked = jobs.read_tasks(tasks)
    configs = [SAEConfig.from_dict(task.params["run"]) for task in asked]
    if len({(config.source, config.hook_point) for config in configs}) > 1:
        raise UserError("TASKS: expected runs of one store, found several. Train them one by one.")
    is_first = os.environ.get("RANK", "0") == "0"
    is_there = [is_first and is_made(task, ahead=ahead or window is not None) for task in asked]
    if all(is_there) and os.environ.get("WORLD_SIZE", "1") == "1":
        return  # without waiting for torch: most jobs only take what their group has trained
    from saeflow.saes import Ranks

    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of torchrun
    machine = machine_of(runtime, max(1, threads // here))
    machine["logging"] = {"folder": "logs", **machine.get("logging", {})}
    ranks = Ranks.from_environment(machine["ranks"]["split"], machine["device"])
    wanted = [
        (placed(task, ahead=ahead), config)
        for task, config, there in zip(asked, configs, is_there, strict=True)
        if not ranks.agree(int(there), False)[0]
    ]
    if not wanted:
        return
    if window is None:
        _train(wanted, machine, ranks)
    else:
        _train_on(_drawn(window, draw, first, wanted[0][1].hook_point), wanted, machine, ranks)


def _train(wanted: Wanted, machine: dict[str, Any], ranks: Any) -> None:
    """Train SAEs to their end; those of a stream were trained on its last window."""
    from saeflow.stores import WindowByWindow, open_store
    from saeflow.training import train_group
    from saeflow.training.between_windows import taken_over

    is_first = ranks.rank == 0
    if is_first and machine.get("saes_per_job") == 1:  # there are no groups, or none any more
        for task, _ in wanted:
            provenance.take_unfinished(task.out)
    asked, config = wanted[0]
    store = open_store(asked.one("train") / f"{config.hook_point}.zarr")
    reader: Any = store
    if store.has_rows and asked.params.get("by_window"):
        reader = WindowByWindow(store)
        for size in _batch_sizes(wanted):
            reader.log(size)
    rows = reader.first if isinstance(reader, WindowByWindow) else store

    def found(config: SAEConfig, task: jobs.Task) -> SAEConfig:
        if store.has_rows:
            return _with_k(config, task, rows)
        return _with_noted_k(config, task, provenance.stream_of(task.out))

    with ExitStack() as stack:
        making: list[provenance.Job] = []
        for task, config in wanted if is_first else ():
            job = provenance.job(
                task.out,
                name="train",
                inputs=task.inputs,
                params=task.params,
                key=task.key,
                seed=config.seed,
                device=machine["device"],
                resumable=True,
                checked=not making,  # one check serves all
            )
            making.append(stack.enter_context(job))
        if not store.has_rows:
            for made, (task, _) in zip(making, wanted, strict=False):
                seconds = taken_over(provenance.stream_of(task.out), task.key, made.path)
                made.before_s = sum(seconds.values())
        ranks.wait()  # for the folders
        trained = [
            (found(config, task), provenance.partial_of(task.out), task.optional("probe"))
            for task, config in wanted
        ]
        results = train_group(reader, trained, machine, ranks)
        for made, one in zip(making, results, strict=False):
            made.details["content"], made.share = one.content, one.share
    for task, _ in wanted if is_first else ():
        shutil.rmtree(provenance.stream_of(task.out), ignore_errors=True)


def _train_on(drawn: Any, wanted: Wanted, machine: dict[str, Any], ranks: Any) -> None:
    """Go on with training on one window of a stream, from checkpoint to checkpoint."""
    from saeflow.training import train_part
    from saeflow.training.between_windows import add_seconds, note_k, noted_k, open_state

    began = time.monotonic()
    for size in _batch_sizes(wanted):
        drawn.log(size)
    states = [provenance.stream_of(task.out) for task, _ in wanted]
    if ranks.rank == 0:
        for state, (task, config) in zip(states, wanted, strict=True):
            open_state(state, task.key)
            if drawn.number == 0 and noted_k(state) is None and task.optional("guide"):
                note_k(state, _with_k(config, task, drawn.window).options["k"])
    ranks.wait()  # for the folders
    runs = [
        (_with_noted_k(config, task, state), state, task.optional("probe"))
        for state, (task, config) in zip(states, wanted, strict=True)
    ]
    shares = train_part(drawn, runs, machine, ranks)
    if ranks.rank == 0:
        for state, share in zip(states, shares, strict=True):
            add_seconds(state, drawn.number, share * (time.monotonic() - began))


def _drawn(window: Path, draw: int | None, first: Path | None, hook_point: str) -> Any:
    """Open a window for training."""
    from saeflow.stores import DrawnWindow, open_store

    if first is None or draw is None:
        raise UserError(
            f"--window: expected --draw and --first beside it, found {draw} and {first}."
        )
    provenance.check(window)
    facts = read_json(first)
    if facts["key"] != provenance.read_record(window)["key"]:
        raise UserError(
            f"{first}: expected facts of the store that {window} is a window of, found those of another. Delete the folder "
            f"{window.parent}, and run the workflow again."
        )
    store = open_store(window / f"{hook_point}.zarr")
    return DrawnWindow(store, draw, facts["facts"][hook_point])


def _batch_sizes(wanted: Wanted) -> list[int]:
    return sorted({config.training.batch_size for _, config in wanted})


def _with_k(config: SAEConfig, task: jobs.Task, store: Any) -> SAEConfig:
    """Put the k that a run's guide found into its configuration, where it has a guide."""
    guide = task.optional("guide")
    if guide is None:
        return config
    from saeflow.saes import load
    from saeflow.training import with_found_k

    provenance.check(guide)
    return with_found_k(config, load(guide), store)


def _with_noted_k(config: SAEConfig, task: jobs.Task, state: Path) -> SAEConfig:
    """Put the k that a run's guide found on the first window of a stream into its configuration, where it has a guide."""
    from saeflow.training import with_k
    from saeflow.training.between_windows import noted_k

    if task.optional("guide") is None:
        return config
    k = noted_k(state)
    if k is None:
        raise UserError(
            f"{state}: expected the k that {config.guide} found on the first window, found none: the state after that window "
            "is gone. Delete results/saes.groups, and run the workflow again."
        )
    return with_k(config, k)
