"""Jobs that score how complex contexts are, and fit probes to the scores."""

from pathlib import Path
from typing import Annotated

import typer

from saeflow import provenance
from saeflow.cli.arguments import (
    Key,
    Out,
    RuntimeJson,
    SourceFolder,
    SourceJson,
    Threads,
    interruptible,
    machine_of,
    model_folders,
    parse_json,
)
from saeflow.config import SPLITS


def score(
    scoring: Annotated[str, typer.Option(help="One entry of `complexity`, as JSON.")],
    source: SourceJson,
    folder: SourceFolder,
    runtime: RuntimeJson,
    threads: Threads,
    out: Out,
    key: Key = "",
) -> None:
    """Score how complex the contexts of a source are."""
    from saeflow.complexity.scorers import score_contexts, scoring_digests

    values, chosen = parse_json("--source", source), parse_json("--scoring", scoring)
    machine = machine_of(runtime, threads)
    with (
        interruptible(),
        provenance.job(
            out,
            name="score",
            inputs=model_folders(folder, values),
            external=scoring_digests(chosen),
            params={"source": values, "scoring": chosen},
            key=key,
            device=machine["device"],
        ) as job,
    ):
        score_contexts(chosen, values, folder, machine["device"], job.path)


def probe(
    scores: Annotated[Path, typer.Option(help="Folder that `score` wrote.")],
    scoring: Annotated[str, typer.Option(help="One entry of `complexity`, as JSON.")],
    name: Annotated[str, typer.Option(help="The name of that entry.")],
    hook_point: Annotated[str, typer.Option(help="Which activations the probe reads.")],
    stores: Annotated[Path, typer.Option(help="The source's stores: train/ and evaluation/.")],
    out: Out,
    key: Key = "",
) -> None:
    """Fit the probe that reads complexity from activations."""
    from saeflow.complexity.probe import fit_probe
    from saeflow.complexity.scorers import SCORES
    from saeflow.stores import open_store

    chosen = parse_json("--scoring", scoring)
    with (
        interruptible(),
        provenance.job(
            out,
            name="probe",
            inputs=[scores, *(stores / split for split in SPLITS)],
            params={"scoring": chosen, "hook_point": hook_point},
            key=key,
        ) as job,
    ):
        fit_probe(
            scores / SCORES,
            {split: open_store(stores / split / f"{hook_point}.zarr") for split in SPLITS},
            chosen["range"],
            {"source": stores.name, "hook_point": hook_point, "complexity": name},
            job.path,
        )
