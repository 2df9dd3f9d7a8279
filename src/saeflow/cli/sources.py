"""Jobs that make what a source reads: its model, its inputs, its labelled images."""

from typing import Annotated

import typer

from saeflow import jobs
from saeflow.cli.arguments import (
    OutOrTask,
    SourceFolder,
    SourceJson,
    TaskOrOptions,
    Threads,
    job_of,
    read_of_source,
    set_threads,
    stated,
)
from saeflow.jobs import read_task


def fetch(
    task: TaskOrOptions = None,
    model: Annotated[
        str | None, typer.Option(help="Without a TASK: `model` and `hook_points`, as JSON.")
    ] = None,
    out: OutOrTask = None,
    threads: Threads = 1,
) -> None:
    """Fetch (or train) a source's model, and check that it has the hook points."""
    from saeflow.sources.models import fetch_model, pinned, take_model

    if not task:
        params, folder = stated(model=model, out=out)
        asked = jobs.Task(folder, "", params, {})
    else:
        asked = read_task(task)
    chosen, hook_points = asked.params["model"], asked.params["hook_points"]
    if "trained" in chosen:
        set_threads(threads)
    with job_of(asked, "fetch", external=pinned(chosen)) as job:
        like = asked.optional("like")
        job.details["notes"] = (
            fetch_model(chosen, hook_points, job.path, threads)
            if like is None
            else take_model(like, hook_points, job.path)
        )


def prepare(
    task: TaskOrOptions = None,
    source: SourceJson = None,
    rows: Annotated[
        str | None, typer.Option(help="Without a TASK: rows asked for, by split, as JSON.")
    ] = None,
    folder: SourceFolder = None,
    threads: Threads = 1,
) -> None:
    """Make what a source reads: token ids of its text, pixels of its images, or its true dictionary."""
    from saeflow.sources import external_inputs, prepare_inputs

    if not task:
        values, counts, place = stated(source=source, rows=rows, folder=folder)
        reads = read_of_source(values, place)
        out = reads.pop("inputs")
        asked = jobs.Task(out, "", {"source": values, "rows": counts}, reads)
    else:
        asked = read_task(task)
    values, counts = asked.params["source"], asked.params["rows"]
    with job_of(asked, "prepare", external=external_inputs(values)) as job:
        model = asked.optional("model") or asked.out.parent / "model"
        job.details["read"] = prepare_inputs(values, counts, model, job.path, threads)


def label(
    task: TaskOrOptions = None,
    labelled: Annotated[
        str | None,
        typer.Option(help="Without a TASK: one entry of evaluation.labelled_sets, as JSON."),
    ] = None,
    folder: SourceFolder = None,
    out: OutOrTask = None,
    threads: Threads = 1,
) -> None:
    """Decode the images of a labelled set as a source's model sees them."""
    from saeflow.sources.images import images_digests
    from saeflow.sources.labelled import prepare_labelled

    if not task:
        values, place, result = stated(labelled=labelled, folder=folder, out=out)
        asked = jobs.Task(result, "", {"labelled": values}, {"model": place / "model"})
    else:
        asked = read_task(task)
    values = asked.params["labelled"]
    external = images_digests(values["train"]) | images_digests(values["test"])
    with job_of(asked, "label", external=external) as job:
        job.details["read"] = prepare_labelled(values, asked.one("model"), job.path, threads)
