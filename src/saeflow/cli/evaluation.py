"""Jobs that evaluate SAEs and baselines, and gather their tables."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saeflow import provenance
from saeflow.cli.arguments import (
    EvaluationJson,
    Group,
    Key,
    Keys,
    Mark,
    Out,
    RuntimeJson,
    SourceFolder,
    SourceJson,
    Threads,
    interruptible,
    keys_of_each,
    machine_of,
    model_folders,
    parse_json,
    place_of,
)
from saeflow.config import SPLITS, scorer_file
from saeflow.errors import UserError
from saeflow.files import file_digest

if TYPE_CHECKING:
    from saeflow.evaluation import Setup


def clean(
    source: SourceJson,
    hook_point: Annotated[str, typer.Option(help="Where the SAEs read.")],
    evaluation: EvaluationJson,
    runtime: RuntimeJson,
    threads: Threads,
    folder: SourceFolder,
    held_out: Annotated[Path, typer.Option(help="The source's evaluation split.")],
    train: Annotated[
        Path, typer.Option(help="Training split that SAEs learn from, with its mean.")
    ],
    labelled: Annotated[Path, typer.Option(help="Folder of its labelled sets, where it has any.")],
    out: Out,
    key: Key = "",
) -> None:
    """Run the model once on evaluation inputs: the clean side that every SAE is compared with."""
    from saeflow.evaluation.in_model import clean_writer
    from saeflow.stores import open_store

    values, metrics = parse_json("--source", source), parse_json("--evaluation", evaluation)
    machine = machine_of(runtime, threads)
    sets = {name: labelled / name for name in metrics.get("labelled_sets", {})}
    with (
        interruptible(),
        provenance.job(
            out,
            name="clean",
            inputs=[
                *model_folders(folder, values),
                train,
                held_out,
                *sets.values(),
            ],
            params={
                "source": values,
                "hook_point": hook_point,
                **{
                    name: metrics[name]
                    for name in ("ce_contexts", "concept_cards")
                    if name in metrics
                },
            },
            key=key,
            device=machine["device"],
        ) as job,
    ):
        mean = open_store(train / f"{hook_point}.zarr").mean
        write_clean = clean_writer(values)
        write_clean(values, folder, hook_point, mean, metrics, sets, machine["device"], job.path)


def dimension(
    store: Annotated[Path, typer.Option(help="Folder of the evaluation split's stores.")],
    hook_point: Annotated[str, typer.Option(help="Which activations.")],
    settings: Annotated[str, typer.Option(help="`dimension` of `evaluation`, as JSON.")],
    out: Out,
    key: Key = "",
) -> None:
    """Estimate the local intrinsic dimension of evaluation rows."""
    from saeflow.evaluation.dimension import write_dimensions
    from saeflow.stores import open_store

    chosen = parse_json("--settings", settings)
    params = {"hook_point": hook_point, "dimension": chosen}
    with (
        interruptible(),
        provenance.job(out, name="dimension", inputs=[store], params=params, key=key) as job,
    ):
        write_dimensions(open_store(store / f"{hook_point}.zarr"), chosen, job.path)


def evaluate(
    sae: Annotated[
        list[Path], typer.Option(help="Folder of a trained SAE; several of one store: in turn.")
    ],
    results: Annotated[Path, typer.Option(help="The results folder, with stores and sources.")],
    evaluation: EvaluationJson,
    runtime: RuntimeJson,
    threads: Threads,
    out: Annotated[list[Path], typer.Option(help="Written: the result folder of each SAE.")],
    key: Keys = None,
    group: Group = "",
) -> None:
    """Measure SAEs of one store on held-out activations and with the model in the loop."""
    keys = keys_of_each("--sae", len(sae), out, key)
    left = [
        (folder, made, name)
        for folder, made, name in zip(sae, out, keys, strict=True)
        if not provenance.take(place_of(group, folder, made), made, name)
    ]
    if not left:
        return  # without waiting for torch, like `train`
    from saeflow.evaluation import Setup, evaluate_sae, setups
    from saeflow.saes import load, read_config

    metrics, machine = parse_json("--evaluation", evaluation), machine_of(runtime, threads)
    measured_on: list[Setup] = []
    refused: list[UserError] = []
    for folder, made, name in left:
        try:
            provenance.check(folder)
            config = read_config(folder)
            if not measured_on:
                store = (config["source"], config["hook_point"])
                found = setups(results, *store, metrics, machine["device"])
                for path in _read_by(found):  # once for all
                    provenance.check(path)
                measured_on = found
            with (
                interruptible(),
                provenance.job(
                    made,
                    name="evaluate",
                    inputs=[folder, *_read_by(measured_on)],
                    params=metrics,
                    key=name,
                    seed=config["seed"],
                    device=machine["device"],
                    checked=False,
                ) as job,
            ):
                evaluate_sae(load(folder), config, measured_on, job.path)
        except UserError as error:  # the others are measured all the same
            refused.append(error)
    if refused:
        raise refused[0]


def _read_by(measured_on: "list[Setup]") -> list[Path]:
    """The result folders that measurements of some setups read, each once."""
    return list(dict.fromkeys(path for setup in measured_on for path in setup.read))


def latents(
    sae: Annotated[Path, typer.Option(help="Folder of a trained SAE.")],
    results: Annotated[Path, typer.Option(help="The results folder, with stores and sources.")],
    evaluation: EvaluationJson,
    settings: Annotated[str, typer.Option(help="`evaluation.latents`, as JSON.")],
    runtime: RuntimeJson,
    threads: Threads,
    out: Out,
    mark: Mark = "",
    key: Key = "",
) -> None:
    """Write a page with a card for every latent of an SAE."""
    from saeflow.evaluation import Setup, collect_latents
    from saeflow.figures.latents import write_page
    from saeflow.saes import load, read_config

    metrics, machine = parse_json("--evaluation", evaluation), machine_of(runtime, threads)
    chosen = parse_json("--settings", settings)
    provenance.check(sae)
    config = read_config(sae)
    setup = Setup(results, config["source"], config["hook_point"], metrics, machine["device"])
    with (
        interruptible(),
        provenance.job(
            out,
            name="latents",
            inputs=list(dict.fromkeys([sae, *setup.read, setup.folders.inputs])),
            params={**metrics, "latents": chosen, "mark": mark},
            key=key,
            device=machine["device"],
        ) as job,
    ):
        arrays, facts = collect_latents(load(sae), config, setup, chosen, job.path)
        shown = {**facts, "before": chosen["before"], "mark": mark}
        write_page(arrays, shown, job.path / "latents.html")


def interpret_(
    sae: Annotated[Path, typer.Option(help="Folder of a trained SAE.")],
    results: Annotated[Path, typer.Option(help="The results folder, with stores and sources.")],
    evaluation: EvaluationJson,
    settings: Annotated[str, typer.Option(help="`evaluation.interpretability`, as JSON.")],
    runtime: RuntimeJson,
    threads: Threads,
    out: Out,
    key: Key = "",
) -> None:
    """Probe an SAE's latents for what its source knows, score how well single ones are predicted, measure absorption."""
    from saeflow.evaluation import Setup
    from saeflow.evaluation.interpret import interpret
    from saeflow.saes import load, read_config

    metrics, machine = parse_json("--evaluation", evaluation), machine_of(runtime, threads)
    chosen = parse_json("--settings", settings)
    own = scorer_file(chosen)
    provenance.check(sae)
    config = read_config(sae)
    setup = Setup(results, config["source"], config["hook_point"], metrics, machine["device"])
    with (
        interruptible(),
        provenance.job(
            out,
            name="interpret",
            inputs=list(dict.fromkeys([sae, *setup.read, setup.folders.inputs])),
            external={os.path.relpath(own): file_digest(own)} if own else None,
            params={**metrics, "interpretability": chosen},
            key=key,
            device=machine["device"],
        ) as job,
    ):
        interpret(load(sae), config, setup, chosen, job.path)


def baselines(
    store: Annotated[str, typer.Option(help="SOURCE/HOOK_POINT.")],
    ranks: Annotated[str, typer.Option(help="PCA ranks, as JSON.")],
    results: Annotated[Path, typer.Option(help="The results folder, with stores and sources.")],
    evaluation: EvaluationJson,
    runtime: RuntimeJson,
    threads: Threads,
    out: Out,
    key: Key = "",
) -> None:
    """Measure what any SAE must beat: identity, mean, PCA."""
    from saeflow.evaluation import evaluate_baselines, setups

    metrics, machine = parse_json("--evaluation", evaluation), machine_of(runtime, threads)
    source, _, hook_point = store.partition("/")
    measured_on = setups(results, source, hook_point, metrics, machine["device"])
    pca_ranks = parse_json("--ranks", ranks)
    with (
        interruptible(),
        provenance.job(
            out,
            name="baselines",
            inputs=_read_by(measured_on),
            params={**metrics, "pca_ranks": pca_ranks},
            key=key,
            device=machine["device"],
        ) as job,
    ):
        evaluate_baselines(pca_ranks, measured_on, job.path)


def stability(
    sae: Annotated[list[Path], typer.Option(help="Folder of a trained SAE; one for each seed.")],
    results: Annotated[Path, typer.Option(help="The results folder, with stores.")],
    evaluation: Annotated[str, typer.Option(help="Row policy of `evaluation`, as JSON.")],
    runtime: RuntimeJson,
    threads: Threads,
    out: Out,
    key: Key = "",
) -> None:
    """Compare SAEs that differ in their seed only."""
    from saeflow.evaluation import Setup
    from saeflow.evaluation.stability import write_stability
    from saeflow.saes import load, read_config

    policy, machine = parse_json("--evaluation", evaluation), machine_of(runtime, threads)
    for folder in sae:
        provenance.check(folder)
    configs = [read_config(folder) for folder in sae]
    if len({config["name"].removesuffix(f"-seed{config['seed']}") for config in configs}) != 1:
        raise UserError(
            "--sae: expected SAEs that differ in their seed only, found several settings."
        )
    if len(configs) < 2 or len({config["seed"] for config in configs}) < len(configs):
        raise UserError("--sae: expected two or more SAEs of different seeds. Give each once.")
    first = configs[0]
    setup = Setup(results, first["source"], first["hook_point"], policy, machine["device"])
    stores = [results / "stores" / first["source"] / split for split in SPLITS]
    with (
        interruptible(),
        provenance.job(
            out,
            name="stability",
            inputs=[*sae, *stores],
            params=policy,
            key=key,
            device=machine["device"],
        ) as job,
    ):
        for config in configs:
            setup.check_fits(config)
        saes = {config["seed"]: load(path) for config, path in zip(configs, sae, strict=True)}
        write_stability(saes, first, setup, job.path)


def collect(
    records: Annotated[
        list[Path],
        typer.Argument(help="Records of trained SAEs, probes, evaluations and compared seeds."),
    ],
    out: Out,
    key: Key = "",
) -> None:
    """Gather the tables of all runs."""
    from saeflow.tables.collect import collect as collect_tables

    folders = [path.parent for path in records]
    apart = ("train", "probe", "stability", "interpret")
    by_job: dict[str, list[Path]] = {name: [] for name in apart}
    for path in folders:
        by_job.setdefault(provenance.read_record(path)["job"], []).append(path)
    trained, probes, compared, interpreted = (by_job.pop(name) for name in apart)
    others = {*trained, *probes, *compared, *interpreted}
    evaluated = [path for path in folders if path not in others]
    with provenance.job(out, name="collect", inputs=folders, key=key) as job:
        collect_tables(evaluated, trained, probes, job.path, compared, interpreted)
