"""Jobs that extract activations and merge them into stores."""

from pathlib import Path
from typing import Annotated

import typer

from saeflow import device, provenance
from saeflow.cli.arguments import (
    Key,
    Out,
    RuntimeJson,
    SourceFolder,
    SourceJson,
    Split,
    StoreJson,
    Threads,
    interruptible,
    machine_of,
    model_folders,
    parse_json,
)
from saeflow.errors import UserError


def extract(
    source: SourceJson,
    store: StoreJson,
    split: Split,
    folder: SourceFolder,
    runtime: RuntimeJson,
    threads: Threads,
    out: Out,
    part: Annotated[int, typer.Option(min=0, help="This job's part.")] = 0,
    parts: Annotated[int, typer.Option(min=1, help="Parts in all.")] = 1,
    key: Key = "",
) -> None:
    """Extract one part of a split's activations."""
    from saeflow.sources import open_source
    from saeflow.stores import write_part

    values, layout = parse_json("--source", source), parse_json("--store", store)
    machine = machine_of(runtime, threads)
    with (
        interruptible(),
        provenance.job(
            out,
            name="extract",
            inputs=model_folders(folder, values),
            params={"source": values, "store": layout, "split": split, "part": [part, parts]},
            key=key,
            device=machine["device"],
            resumable=True,
        ) as job,
    ):
        reader = open_source(values, folder, machine["device"])
        writers = 1 if machine["device"] == device.CPU else threads  # a GPU outruns one thread
        write_part(reader, split, part, parts, layout, job.path, writers)


def merge(
    name: Annotated[str, typer.Option(help="The source's name.")],
    source: SourceJson,
    store: StoreJson,
    split: Split,
    folder: SourceFolder,
    out: Out,
    parts: Annotated[
        list[Path] | None, typer.Argument(help="Folders that `extract` wrote.")
    ] = None,
    key: Key = "",
) -> None:
    """Put the parts of a split together: shuffled rows, one Zarr store a hook point."""
    from saeflow.stores import finalise

    if not parts:
        raise UserError(
            f"{out}: expected the parts that `extract` wrote, found none: the store was whole when this run began, "
            "but what it is made from was made again. Run the same command once more: it extracts them."
        )

    values, layout = parse_json("--source", source), parse_json("--store", store)
    for part in parts:
        provenance.check(part)
    with (
        interruptible(),
        provenance.job(
            out,
            name="merge",
            inputs=model_folders(folder, values),
            params={"source": values, "store": layout, "split": split},
            key=key,
        ) as job,
    ):
        made_from = {
            path.name: provenance.read_record(path)["digest"]
            for path in model_folders(folder, values)
        }
        contents = finalise(parts, name, values, split, layout, made_from, job.path)
        job.details["content"] = contents
