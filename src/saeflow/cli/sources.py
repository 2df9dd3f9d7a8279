"""Jobs that make what a source reads: its model, its inputs, its labelled images."""

from pathlib import Path
from typing import Annotated

import typer

from saeflow import provenance
from saeflow.cli.arguments import (
    Key,
    Out,
    SourceFolder,
    SourceJson,
    Threads,
    interruptible,
    parse_json,
    set_threads,
)


def fetch(
    model: Annotated[str, typer.Option(help="`model` and `hook_points`, as JSON.")],
    out: Out,
    threads: Threads = 1,
    like: Annotated[
        Path | None, typer.Option(help="Folder of the same model, which another source fetched.")
    ] = None,
    key: Key = "",
) -> None:
    """Fetch (or train) a source's model, and check that it has the hook points."""
    from saeflow.sources.models import fetch_model, pinned, take_model

    values = parse_json("--model", model)
    if "trained" in values["model"]:
        set_threads(threads)
    with (
        interruptible(),
        provenance.job(
            out, name="fetch", params=values, external=pinned(values["model"]), key=key
        ) as job,
    ):
        if like is None:
            notes = fetch_model(values["model"], values["hook_points"], job.path, threads)
            job.details["notes"] = notes
        else:
            provenance.check(like)
            take_model(like, values["hook_points"], job.path)


def prepare(
    source: SourceJson,
    rows: Annotated[str, typer.Option(help="Rows asked for, by split, as JSON.")],
    folder: SourceFolder,
    threads: Threads = 1,
    key: Key = "",
) -> None:
    """Make what a source reads: token ids of its text, pixels of its images, or its true dictionary."""
    from saeflow.sources import external_inputs, prepare_inputs

    values, counts = parse_json("--source", source), parse_json("--rows", rows)
    model = folder / "model"
    with (
        interruptible(),
        provenance.job(
            folder / "inputs",
            name="prepare",
            inputs=[model] if "model" in values else [],
            external=external_inputs(values),
            params={"source": values, "rows": counts},
            key=key,
        ) as job,
    ):
        job.details["read"] = prepare_inputs(values, counts, model, job.path, threads)


def label(
    labelled: Annotated[str, typer.Option(help="One entry of evaluation.labelled_sets, as JSON.")],
    folder: SourceFolder,
    out: Out,
    threads: Threads = 1,
    key: Key = "",
) -> None:
    """Decode the images of a labelled set as a source's model sees them."""
    from saeflow.sources.images import images_digests
    from saeflow.sources.labelled import prepare_labelled

    values, model = parse_json("--labelled", labelled), folder / "model"
    external = images_digests(values["train"]) | images_digests(values["test"])
    with (
        interruptible(),
        provenance.job(
            out,
            name="label",
            inputs=[model],
            external=external,
            params={"labelled": values},
            key=key,
        ) as job,
    ):
        job.details["read"] = prepare_labelled(values, model, job.path, threads)
