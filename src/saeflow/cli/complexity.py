"""Jobs that score how complex contexts are, and fit probes to the scores."""

from saeflow.cli.arguments import RuntimeJson, Task, Threads, job_of, machine_of, source_folder
from saeflow.config import SPLITS
from saeflow.jobs import read_task


def score(task: Task, runtime: RuntimeJson, threads: Threads) -> None:
    """Score how complex the contexts of a source are."""
    from saeflow.complexity.scorers import score_contexts, scoring_digests

    asked = read_task(task)
    scoring, source = asked.params["scoring"], asked.params["source"]
    machine = machine_of(runtime, threads)
    external = scoring_digests(scoring)
    with job_of(asked, "score", external=external, device=machine["device"]) as job:
        score_contexts(scoring, source, source_folder(asked), machine["device"], job.path)


def probe(task: Task) -> None:
    """Fit the probe that reads complexity from activations."""
    from saeflow.complexity.probe import fit_probe
    from saeflow.complexity.scorers import SCORES
    from saeflow.stores import open_store

    asked = read_task(task)
    source, _, hook_point = asked.params["store"].partition("/")
    about = {
        "source": source, "hook_point": hook_point, "complexity": asked.params["complexity"],
    }  # fmt: skip
    with job_of(asked, "probe") as job:
        fit_probe(
            asked.one("scores") / SCORES,
            {
                split: open_store(asked.one(split) / f"{hook_point}.zarr")
                for split in SPLITS
                if asked.optional(split)
            },
            asked.params["range"],
            about,
            job.path,
        )
