"""Jobs that extract activations and merge them into stores."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from saeflow import device, jobs, provenance
from saeflow.cli.arguments import (
    Out,
    OutOrTask,
    RuntimeJson,
    SourceFolder,
    SourceJson,
    TaskOrOptions,
    Threads,
    job_of,
    machine_of,
    read_of_source,
    source_folder,
    stated,
)
from saeflow.config import n_windows
from saeflow.errors import UserError
from saeflow.jobs import read_task

StoreJson = Annotated[
    str | None, typer.Option(help="Without a TASK: one entry of `stores`, as JSON.")
]
Split = Annotated[str | None, typer.Option(help="Without a TASK: train or evaluation.")]


def extract(
    task: TaskOrOptions = None,
    *,
    runtime: RuntimeJson,
    threads: Threads,
    out: Out,
    source: SourceJson = None,
    store: StoreJson = None,
    split: Split = None,
    folder: SourceFolder = None,
    part: Annotated[int, typer.Option(min=0, help="This job's part.")] = 0,
    parts: Annotated[int, typer.Option(min=1, help="Parts in all.")] = 1,
    window: Annotated[int, typer.Option(min=0, help="The window that is extracted.")] = 0,
) -> None:
    """Extract one part of the activations of a split, or of one of its windows."""
    from saeflow.sources import open_source
    from saeflow.stores import write_part

    asked = read_task(task) if task else _stated(source, store, split, folder, out)
    values, layout, chosen = (asked.params[name] for name in ("source", "store", "split"))
    machine = machine_of(runtime, threads)
    chosen_part = {"part": [part, parts], "window": window}
    of_part = replace(asked, out=out, params=asked.params | chosen_part)
    with job_of(of_part, "extract", device=machine["device"], resumable=True) as job:
        reader = open_source(values, source_folder(asked), machine["device"])
        writers = 1 if machine["device"] == device.CPU else threads  # a GPU outruns one thread
        write_part(reader, chosen, part, parts, layout, job.path, writers, window)


def merge(
    task: Annotated[
        str,
        typer.Argument(
            metavar="[TASK]", help="The workflow's form: JSON (docs/keys.md). Without it, options."
        ),
    ],
    parts: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders that `extract` wrote; or, of a split of several windows, those of its windows in order."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Without a TASK: the source's name.")] = None,
    source: SourceJson = None,
    store: StoreJson = None,
    split: Split = None,
    folder: SourceFolder = None,
    out: OutOrTask = None,
    window: Annotated[
        int | None,
        typer.Option(min=0, help="The window that the parts are of; with --out, its folder."),
    ] = None,
) -> None:
    """Put the parts of a split together: shuffled rows, one Zarr store a hook point.

    A split of several windows is put together window by window (--window), then of its windows.
    """
    from saeflow.stores import finalise, join

    folders = list(parts or [])
    if task.startswith("{"):
        asked = read_task(task)
    else:
        folders = [Path(task), *folders]
        asked = _stated(source, store, split, folder, out)
        asked.params["name"] = name
    called, values, layout, chosen = (
        asked.params[key] for key in ("name", "source", "store", "split")
    )
    if not called or not folders:
        raise UserError(
            f"{asked.out}: expected a TASK or --name, and the folders that `extract` wrote, found "
            f"{'no name' if folders else 'no folder'}."
        )
    for part in folders:
        provenance.check(part)
    windows = n_windows(layout, chosen)
    if window is None and windows > 1:
        _check_windows(asked, folders, windows)
        with job_of(asked, "merge") as job:
            job.details["content"] = join(folders, values["hook_points"], job.path)
        return
    if window is not None:
        if out is None or window >= windows:
            raise UserError(
                f"--window: expected a window below {windows} and its folder as --out, found {window} and {out}."
            )
        asked = replace(asked, out=out, params=asked.params | {"window": window})
    with job_of(asked, "merge") as job:
        made_from = {path.name: provenance.read_record(path)["digest"] for path in asked.inputs}
        contents = finalise(
            folders, called, values, chosen, layout, made_from, job.path, window or 0
        )
        job.details["content"] = contents


def _check_windows(asked: jobs.Task, folders: list[Path], windows: int) -> None:
    """Refuse folders that are not the windows of a split, each once and in order, made as the split is to be."""
    if len(folders) != windows:
        raise UserError(f"{asked.out}: expected its {windows} windows, found {len(folders)}.")
    for number, folder in enumerate(folders):
        record = provenance.read_record(folder)
        if record["params"] != asked.params | {"window": number} or record["key"] != asked.key:
            raise UserError(
                f"{folder}: expected window {number} of {asked.out}, found another result, or one of other parameters or "
                "code. Delete it and run the extraction again."
            )


def _stated(
    source: str | None, store: str | None, split: str | None, folder: Path | None, out: Path | None
) -> jobs.Task:
    """Return the task that options state."""
    # A split is a plain word, not JSON.
    values, layout, place, result = stated(source=source, store=store, folder=folder, out=out)
    if split not in ("train", "evaluation"):
        raise UserError(f"--split: expected train or evaluation, found {split!r}.")
    params = {"source": values, "store": layout, "split": split}
    return jobs.Task(result, "", params, read_of_source(values, place))
