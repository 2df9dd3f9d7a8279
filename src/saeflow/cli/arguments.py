"""Options and helpers that commands share."""

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from saeflow import device, jobs, provenance
from saeflow.errors import UserError
from saeflow.files import parse_json

Task = Annotated[
    list[str],
    typer.Argument(
        metavar="TASK", help="What to make of what: JSON (docs/keys.md), long ones in pieces."
    ),
]
Tasks = Annotated[
    list[str],
    typer.Argument(
        metavar="TASKS",
        help="One result or several of one store: JSON (docs/keys.md), long ones in pieces.",
    ),
]
TaskOrOptions = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[TASK]",
        help="The workflow's form: JSON (docs/keys.md), long ones in pieces. Without it, options.",
    ),
]
SourceJson = Annotated[
    str | None, typer.Option(help="Without a TASK: one entry of `sources`, as JSON.")
]
SourceFolder = Annotated[
    Path | None, typer.Option(help="Without a TASK: the source's folder, with model/ and inputs/.")
]
OutOrTask = Annotated[
    Path | None, typer.Option(help="Without a TASK: the result folder, which is written.")
]
Ahead = Annotated[
    bool,
    typer.Option("--ahead", help="Leave each missing result beside its place, for its own job."),
]
Key = Annotated[str, typer.Option(help="The workflow's key of this job, for its record.")]
Out = Annotated[Path, typer.Option(help="Written: the result folder.")]
RuntimeJson = Annotated[str, typer.Option(envvar="SAEFLOW_RUNTIME", help="`runtime`, as JSON.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]
_ENTRIES = {
    "model": "fetched",
    "source": "source",
    "rows": "rows",
    "store": "store",
    "labelled": "labelled_set",
}
"""Options that hold JSON, each with its definition in the schema of the parameters."""


def stated(**options: Any) -> list[Any]:
    """Return the options of a command that was given no task.

    Texts are read as JSON. An entry of the parameters is checked, and gets its defaults, as in a parameter file.

    Raises:
        UserError: one is missing, or an entry has mistakes: a line each.
    """
    from saeflow.config.schema import conform_entry

    names = {name: f"--{name.replace('_', '-')}" for name in options}
    missing = [names[name] for name, value in options.items() if value is None]
    if missing:
        raise UserError(
            f"expected a TASK, or {', '.join(names.values())}; missing: {', '.join(missing)}."
        )
    values = []
    for name, value in options.items():
        parsed = parse_json(names[name], value) if isinstance(value, str) else value
        if name in _ENTRIES:
            parsed = conform_entry(names[name], parsed, _ENTRIES[name])
        values.append(parsed)
    return values


def read_of_source(source: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Return the results of a source that extraction and merging read, by their role."""
    model = {"model": folder / "model"} if "model" in source else {}
    return {**model, "inputs": folder / "inputs"}


def machine_of(runtime: str, threads: int) -> dict[str, Any]:
    """`runtime`, with its device decided for this machine and torch set to so many threads."""
    values = dict(parse_json("--runtime", runtime))
    set_threads(threads)
    return {**values, "device": device.resolve(values["device"])}


def set_threads(threads: int) -> None:
    """Let torch use so many CPU threads."""
    import torch

    torch.set_num_threads(threads)


@contextmanager
def job_of(task: jobs.Task, command: str, **options: Any) -> Iterator[provenance.Job]:
    """Make the result of a task; `saeflow.provenance.job` describes the options."""
    with (
        interruptible(),
        provenance.job(
            task.out, name=command, inputs=task.inputs, params=task.params, key=task.key, **options
        ) as job,
    ):
        yield job


def is_made(task: jobs.Task, *, ahead: bool) -> bool:
    """Tell whether a task's result is there; `saeflow.jobs.groups` says how it comes there.

    Args:
        task: one of a group, or any.
        ahead: asked by the job of the group. Otherwise by the result's own job, which takes what that one left.
    """
    if not ahead:
        return provenance.take_ready(task.out, task.key)
    places = (task.out, provenance.ready_of(task.out))
    return any(provenance.is_current(place, task.key) for place in places)


def placed(task: jobs.Task, *, ahead: bool) -> jobs.Task:
    """The task with the folder that is written: of a group's job, the one where results wait to be taken."""
    return replace(task, out=provenance.ready_of(task.out)) if ahead else task


def source_folder(task: jobs.Task) -> Path:
    """The folder of a source, which holds the model and the inputs that a task reads."""
    return task.one("inputs").parent


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that what was begun is put away."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
