"""Jobs that extract activations and merge them into stores."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from saeflow import device, provenance
from saeflow.cli.arguments import Out, RuntimeJson, Task, Threads, job_of, machine_of, source_folder
from saeflow.jobs import read_task


def extract(
    task: Task,
    runtime: RuntimeJson,
    threads: Threads,
    out: Out,
    part: Annotated[int, typer.Option(min=0, help="This job's part.")] = 0,
    parts: Annotated[int, typer.Option(min=1, help="Parts in all.")] = 1,
) -> None:
    """Extract one part of a split's activations."""
    from saeflow.sources import open_source
    from saeflow.stores import write_part

    asked = read_task(task)
    source, layout, split = (asked.params[name] for name in ("source", "store", "split"))
    machine = machine_of(runtime, threads)
    of_part = replace(asked, out=out, params={**asked.params, "part": [part, parts]})
    with job_of(of_part, "extract", device=machine["device"], resumable=True) as job:
        reader = open_source(source, source_folder(asked), machine["device"])
        writers = 1 if machine["device"] == device.CPU else threads  # a GPU outruns one thread
        write_part(reader, split, part, parts, layout, job.path, writers)


def merge(
    task: Task,
    parts: Annotated[list[Path], typer.Argument(help="Folders that `extract` wrote.")],
) -> None:
    """Put the parts of a split together: shuffled rows, one Zarr store a hook point."""
    from saeflow.stores import finalise

    asked = read_task(task)
    name, source, layout, split = (
        asked.params[key] for key in ("name", "source", "store", "split")
    )
    for part in parts:
        provenance.check(part)
    with job_of(asked, "merge") as job:
        made_from = {path.name: provenance.read_record(path)["digest"] for path in asked.inputs}
        contents = finalise(parts, name, source, split, layout, made_from, job.path)
        job.details["content"] = contents
