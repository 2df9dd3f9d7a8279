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
from saeflow.files import read_json, write_json
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
    from saeflow.stores import join

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
    if window is not None or n_windows(layout, chosen) == 1:
        _merge(asked, folders, window, out)
    elif layout.get("is_streamed"):
        _remember(asked, folders)
    else:
        _check_windows(asked, folders)
        with job_of(asked, "merge") as job:
            job.details["content"] = join(folders, values["hook_points"], job.path)


def _merge(asked: jobs.Task, parts: list[Path], window: int | None, out: Path | None) -> None:
    """Merge the parts of a split, or of a window of it into its own folder, with the window's facts beside it."""
    from saeflow.stores import finalise, window_facts

    values, layout, split = (asked.params[key] for key in ("source", "store", "split"))
    made, windows = asked, n_windows(layout, split)
    if window is not None:
        if out is None or window >= windows:
            raise UserError(
                f"--window: expected a window below {windows} and its folder as --out, found {window} and {out}."
            )
        made = replace(asked, out=out, params=asked.params | {"window": window})
    for part in parts:
        provenance.check(part)
    with job_of(made, "merge") as job:
        made_from = {path.name: provenance.read_record(path)["digest"] for path in asked.inputs}
        job.details["content"] = finalise(
            parts, asked.params["name"], values, split, layout, made_from, job.path, window or 0
        )
    if out is not None and window is not None:
        facts = window_facts(out, values["hook_points"])
        write_json(out.with_name(f"{out.name}.json"), {"key": asked.key, "facts": facts})


def _remember(asked: jobs.Task, facts: list[Path]) -> None:
    """Make the store of a stream: what is known of its windows, which are gone."""
    from saeflow.stores import remember

    _check_count(asked, facts)
    found = [read_json(path) for path in facts]
    for path, one in zip(facts, found, strict=True):
        if one["key"] != asked.key:
            raise UserError(
                f"{path}: expected a window of {asked.out}, found one of other parameters or code. Delete it and run the "
                "extraction again."
            )
    with job_of(asked, "merge") as job:
        job.details["content"] = remember([one["facts"] for one in found], job.path)


def _check_count(asked: jobs.Task, windows: list[Path]) -> None:
    expected = n_windows(asked.params["store"], asked.params["split"])
    if len(windows) != expected:
        raise UserError(f"{asked.out}: expected its {expected} windows, found {len(windows)}.")


def _check_windows(asked: jobs.Task, folders: list[Path]) -> None:
    """Refuse folders that are not the windows of a split, each once and in order, made as the split is to be."""
    _check_count(asked, folders)
    for number, folder in enumerate(folders):
        provenance.check(folder)
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
