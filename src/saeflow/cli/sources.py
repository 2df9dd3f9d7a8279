"""Jobs that make what a source reads: its model, its inputs, its labelled images."""

from saeflow.cli.arguments import Task, Threads, job_of, set_threads
from saeflow.jobs import read_task


def fetch(task: Task, threads: Threads = 1) -> None:
    """Fetch (or train) a source's model, and check that it has the hook points."""
    from saeflow.sources.models import fetch_model, pinned, take_model

    asked = read_task(task)
    model, hook_points = asked.params["model"], asked.params["hook_points"]
    if "trained" in model:
        set_threads(threads)
    with job_of(asked, "fetch", external=pinned(model)) as job:
        like = asked.optional("like")
        if like is None:
            job.details["notes"] = fetch_model(model, hook_points, job.path, threads)
        else:
            take_model(like, hook_points, job.path)


def prepare(task: Task, threads: Threads = 1) -> None:
    """Make what a source reads: token ids of its text, pixels of its images, or its true dictionary."""
    from saeflow.sources import external_inputs, prepare_inputs

    asked = read_task(task)
    source, rows = asked.params["source"], asked.params["rows"]
    with job_of(asked, "prepare", external=external_inputs(source)) as job:
        model = asked.optional("model") or asked.out.parent / "model"
        job.details["read"] = prepare_inputs(source, rows, model, job.path, threads)


def label(task: Task, threads: Threads = 1) -> None:
    """Decode the images of a labelled set as a source's model sees them."""
    from saeflow.sources.images import images_digests
    from saeflow.sources.labelled import prepare_labelled

    asked = read_task(task)
    labelled = asked.params["labelled"]
    external = images_digests(labelled["train"]) | images_digests(labelled["test"])
    with job_of(asked, "label", external=external) as job:
        job.details["read"] = prepare_labelled(labelled, asked.one("model"), job.path, threads)
