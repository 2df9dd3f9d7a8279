"""Options and helpers that commands share."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from saeflow import device
from saeflow.errors import UserError

Key = Annotated[str, typer.Option(help="The workflow's key of this job, for its record.")]
Keys = Annotated[
    list[str] | None, typer.Option("--key", help="The workflow's key of each, for its record.")
]
Group = Annotated[
    str, typer.Option(help="GROUP.done where it was made with others, under GROUP/RUN.")
]
Out = Annotated[Path, typer.Option(help="Written: the result folder.")]
SourceJson = Annotated[str, typer.Option(help="One entry of `sources`, as JSON.")]
StoreJson = Annotated[str, typer.Option(help="One entry of `stores`, as JSON.")]
EvaluationJson = Annotated[str, typer.Option(help="`evaluation`, as JSON.")]
RuntimeJson = Annotated[str, typer.Option(envvar="SAEFLOW_RUNTIME", help="`runtime`, as JSON.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]
Mark = Annotated[str, typer.Option(help="Printed in the page's head, such as REHEARSAL.")]
SourceFolder = Annotated[Path, typer.Option(help="The source's folder: model/ and inputs/.")]
Split = Annotated[str, typer.Option(help="train or evaluation.")]


def parse_json(option: str, text: str) -> Any:
    """Read an option's value from JSON.

    Raises:
        UserError: the text is not JSON, or holds NaN or an infinite number.
    """

    def refuse(constant: str) -> Any:
        raise UserError(f"{option}: expected finite numbers, found {constant}.")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise UserError(f"{option}: expected JSON, found {text[:60]!r} ({error}).") from None


def machine_of(runtime: str, threads: int) -> dict[str, Any]:
    """`runtime`, with its device decided for this machine and torch set to so many threads."""
    values = dict(parse_json("--runtime", runtime))
    set_threads(threads)
    return {**values, "device": device.resolve(values["device"])}


def set_threads(threads: int) -> None:
    """Let torch use so many CPU threads."""
    import torch

    torch.set_num_threads(threads)


def keys_of_each(option: str, number: int, out: list[Path], key: list[str] | None) -> list[str]:
    """A key for each of several results, empty where none were given."""
    keys = key or [""] * number
    if not number == len(out) == len(keys):
        raise UserError(
            f"{option}, --out, --key: expected as many of each, found {number}, {len(out)} and {len(keys)}."
        )
    return keys


def place_of(group: str, run: Path, out: Path) -> Path:
    """Where a run's result lies: where its group's job made it, if it is one of a group."""
    return Path(group).with_suffix("").joinpath(*run.parts[-4:]) if group else out


def model_folders(folder: Path, source: dict[str, Any]) -> list[Path]:
    """The result folders of a source that the steps after it read."""
    return ([folder / "model"] if "model" in source else []) + [folder / "inputs"]


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
