"""The command line: each command reads files, calls one function of the package, writes one result.

Exit codes: 0 done, 1 failed, 2 the user's input is at fault (one line on stderr).
"""

import errno
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saeflow import device, provenance
from saeflow.config import IMPORTED, ROOT, SPLITS, SAEConfig, load_params, scorer_file
from saeflow.errors import UserError
from saeflow.files import file_digest
from saeflow.plan import Plan

if TYPE_CHECKING:
    from saeflow.evaluation import Bench

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

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


def main() -> None:
    """Run the command line with saeflow's exit codes."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("saeflow").setLevel(logging.INFO)
    try:
        app()
    except UserError as error:
        logging.getLogger(__name__).debug("traceback", exc_info=True)
        sys.stderr.write("error: " + " ".join(str(error).split()) + "\n")
        sys.exit(2)
    except Exception as error:
        number = _os_error(error)
        if number not in _NO_ROOM:
            raise
        where = getattr(error, "filename", None)
        sys.stderr.write(
            f"error: {where or 'a file'}: {_NO_ROOM[number]}; nothing half-written is kept for whole. Make "
            "room and run the same command again: it goes on from what is complete.\n"
        )
        sys.exit(1)


def _os_error(error: Exception) -> int | None:
    """The operating system's error number, which safetensors only writes into its message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)$", str(error))
    return int(found[1]) if found else None


_NO_ROOM = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system cannot be written to",
}


def _json(option: str, text: str) -> Any:
    def refuse(constant: str) -> Any:
        raise UserError(f"{option}: expected finite numbers, found {constant}.")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise UserError(f"{option}: expected JSON, found {text[:60]!r} ({error}).") from None


def _machine(runtime: str, threads: int) -> dict[str, Any]:
    """`runtime`, with its device decided for this machine and torch set to so many threads."""
    values = dict(_json("--runtime", runtime))
    _set_threads(threads)
    return {**values, "device": device.resolve(values["device"])}


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _of_each(option: str, number: int, out: list[Path], key: list[str] | None) -> list[str]:
    """A key for each of several results, empty where none were given."""
    keys = key or [""] * number
    if not number == len(out) == len(keys):
        raise UserError(
            f"{option}, --out, --key: expected as many of each, found {number}, {len(out)} and {len(keys)}."
        )
    return keys


def _place(group: str, run: Path, out: Path) -> Path:
    """Where a run's result lies: where its group's job made it, if it is one of a group."""
    return Path(group).with_suffix("").joinpath(*run.parts[-4:]) if group else out


def _model_folders(folder: Path, source: dict[str, Any]) -> list[Path]:
    """The result folders of a source that the steps after it read."""
    return ([folder / "model"] if "model" in source else []) + [folder / "inputs"]


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that what was begun is put away."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@app.command()
def validate(
    params: Annotated[Path, typer.Option(help="Parameter file.")] = Path("params.yaml"),
) -> None:
    """Check a parameter file, and print what it asks for."""
    from saeflow.preflight import check_saes, checked_plan, device_problem

    values = load_params(params)
    try:
        plan = checked_plan(values)
        check_saes(plan)
    except UserError as error:
        raise UserError(f"{params}: {error}") from None
    if problem := device_problem(values["runtime"]):  # the jobs may run on another machine
        logging.getLogger(__name__).warning("%s: %s", params, problem)
    typer.echo(
        f"{params}: {len(plan.sources)} sources, {len(plan.stores)} stores, {len(plan.runs)} SAEs, "
        f"{len(values['figures']['names'])} figures."
    )


@app.command()
def plan(
    params: Annotated[Path, typer.Option(help="Parameter file.")] = Path("params.yaml"),
    rates: Annotated[
        list[Path] | None,
        typer.Option(
            help="What a machine does in a second (several: a column each); default: this CPU's, as `make bench` "
            "measures it, and one H200's."
        ),
    ] = None,
    results: Annotated[Path, typer.Option(help="Where fetched models lie.")] = Path("results"),
) -> None:
    """Print what a run will need: jobs, rows, disk, memory and hours."""
    from saeflow.needs import Needs, Rates, as_text, count_passes

    folder = ROOT / "benchmarks" / "results"
    machines = rates or [folder / "rates.yaml", folder / "rates-h200.yaml"]
    planned = Plan(load_params(params))
    passes = count_passes(planned, results)
    typer.echo(as_text(*(Needs(planned, Rates.read(path), passes) for path in machines)))


@app.command()
def rehearse(
    params: Annotated[list[Path], typer.Argument(help="Parameter files.")],
    out: Annotated[
        Path, typer.Option(help="Written: a folder of each, with its own results and report.")
    ] = Path("rehearsals"),
    cores: Annotated[int, typer.Option(min=0, help="CPU cores for the jobs; 0: all of them.")] = 0,
    every_run: Annotated[
        bool,
        typer.Option(
            help="Train every run, not only the first and the last value of each sweep of numbers."
        ),
    ] = False,
) -> None:
    """Run a parameter file's whole workflow in minutes: small random models, local data, everything scaled down."""
    from saeflow.rehearsal import RehearsalFailed, stage
    from saeflow.rehearsal import rehearse as rehearse_one

    if len({path.stem for path in params}) < len(params):
        raise UserError("params: expected files of different names, found one twice.")
    for path in params:
        load_params(path)  # a mistake in any is said before minutes are spent on the others
    cores = cores or len(os.sched_getaffinity(0))
    with stage() as environment:
        for path in params:
            try:
                said = rehearse_one(path, out / path.stem, cores, environment, every_run=every_run)
            except UserError as error:
                raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
            except RehearsalFailed as failure:
                sys.stderr.write(f"error: {path}: {failure}\n")
                raise typer.Exit(1) from None
            typer.echo(said)


@app.command()
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

    values = _json("--model", model)
    if "trained" in values["model"]:
        _set_threads(threads)
    with (
        _interruptible(),
        provenance.job(
            out, name="fetch", params=values, external=pinned(values["model"]), key=key
        ) as job,
    ):
        if like is None:
            fetch_model(values["model"], values["hook_points"], job.path, threads)
        else:
            provenance.check(like)
            take_model(like, values["hook_points"], job.path)


@app.command()
def prepare(
    source: SourceJson,
    rows: Annotated[str, typer.Option(help="Rows asked for, by split, as JSON.")],
    folder: SourceFolder,
    threads: Threads = 1,
    key: Key = "",
) -> None:
    """Make what a source reads: token ids of its text, pixels of its images, or its true dictionary."""
    from saeflow.sources import external_inputs, prepare_inputs

    values, counts = _json("--source", source), _json("--rows", rows)
    model = folder / "model"
    with (
        _interruptible(),
        provenance.job(
            folder / "inputs",
            name="prepare",
            inputs=[model] if "model" in values else [],
            external=external_inputs(values),
            params={"source": values, "rows": counts},
            key=key,
        ) as job,
    ):
        prepare_inputs(values, counts, model, job.path, threads)


@app.command()
def label(
    labelled: Annotated[str, typer.Option(help="One entry of evaluation.labelled_sets, as JSON.")],
    folder: SourceFolder,
    out: Out,
    threads: Threads = 1,
    key: Key = "",
) -> None:
    """Decode the images of a labelled set as a source's model sees them."""
    from saeflow.sources.images import images_digests
    from saeflow.sources.vision import prepare_labelled

    values, model = _json("--labelled", labelled), folder / "model"
    external = images_digests(values["train"]) | images_digests(values["test"])
    with (
        _interruptible(),
        provenance.job(
            out,
            name="label",
            inputs=[model],
            external=external,
            params={"labelled": values},
            key=key,
        ) as job,
    ):
        prepare_labelled(values, model, job.path, threads)


@app.command()
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

    values, layout = _json("--source", source), _json("--store", store)
    machine = _machine(runtime, threads)
    with (
        _interruptible(),
        provenance.job(
            out,
            name="extract",
            inputs=_model_folders(folder, values),
            params={"source": values, "store": layout, "split": split, "part": [part, parts]},
            key=key,
            device=machine["device"],
            resumable=True,
        ) as job,
    ):
        reader = open_source(values, folder, machine["device"])
        writers = 1 if machine["device"] == device.CPU else threads  # a GPU outruns one thread
        write_part(reader, split, part, parts, layout, job.path, writers)


@app.command()
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

    values, layout = _json("--source", source), _json("--store", store)
    for part in parts:
        provenance.check(part)
    with (
        _interruptible(),
        provenance.job(
            out,
            name="merge",
            inputs=_model_folders(folder, values),
            params={"source": values, "store": layout, "split": split},
            key=key,
        ) as job,
    ):
        made_from = {
            path.name: provenance.read_record(path)["digest"]
            for path in _model_folders(folder, values)
        }
        contents = finalise(parts, name, values, split, layout, made_from, job.path)
        job.details["content"] = contents


@app.command()
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

    values, chosen = _json("--source", source), _json("--scoring", scoring)
    machine = _machine(runtime, threads)
    with (
        _interruptible(),
        provenance.job(
            out,
            name="score",
            inputs=_model_folders(folder, values),
            external=scoring_digests(chosen),
            params={"source": values, "scoring": chosen},
            key=key,
            device=machine["device"],
        ) as job,
    ):
        score_contexts(chosen, values, folder, machine["device"], job.path)


@app.command()
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

    chosen = _json("--scoring", scoring)
    with (
        _interruptible(),
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


@app.command()
def train(
    store: Annotated[Path, typer.Option(help="Folder of the training split's stores.")],
    run: Annotated[
        list[str], typer.Option(help="One run of `saes`, as JSON; several: in one pass.")
    ],
    runtime: RuntimeJson,
    threads: Threads,
    out: Annotated[list[Path], typer.Option(help="Written: the result folder of each run.")],
    probes: Annotated[
        Path | None, typer.Option(help="Folder of the source's complexities, with their probes.")
    ] = None,
    saes: Annotated[
        Path | None,
        typer.Option(help="Folder of trained SAEs, for runs that take their k from one."),
    ] = None,
    key: Keys = None,
    group: Group = "",
) -> None:
    """Train SAEs on one store, one or several in one pass over its batches."""
    configs = [SAEConfig.from_dict(_json("--run", text)) for text in run]
    keys = _of_each("--run", len(run), out, key)
    if len({(config.source, config.hook_point) for config in configs}) > 1:
        raise UserError("--run: expected runs of one store, found several. Train them one by one.")
    is_there = [
        os.environ.get("RANK", "0") == "0"
        and provenance.take(_place(group, Path(config.name), folder), folder, name)
        for config, folder, name in zip(configs, out, keys, strict=True)
    ]
    if all(is_there) and os.environ.get("WORLD_SIZE", "1") == "1":
        return  # without waiting for torch: most jobs only take what their group has trained
    from saeflow.saes import Ranks
    from saeflow.stores import open_store
    from saeflow.training import train_group

    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of torchrun
    machine = _machine(runtime, max(1, threads // here))
    machine["logging"] = {"folder": "logs", **machine.get("logging", {})}
    ranks = Ranks.from_environment(machine["ranks"]["split"], machine["device"])
    left = [
        (config, folder, name)
        for config, folder, name, there in zip(configs, out, keys, is_there, strict=True)
        if not ranks.agree(int(there), False)[0]
    ]
    if not left:
        return
    reader = open_store(store / f"{configs[0].hook_point}.zarr")
    wanted = [
        (_with_k(config, _guide_of(config, saes), reader), folder, name, _probe_of(config, probes))
        for config, folder, name in left
    ]
    with ExitStack() as stack:
        jobs: list[provenance.Job] = []
        for config, folder, name, probe in wanted if ranks.rank == 0 else ():
            making = provenance.job(
                folder,
                name="train",
                inputs=[store, *filter(None, [probe, _guide_of(config, saes)])],
                params={"run": asdict(config), "precision": machine["precision"]},
                key=name,
                seed=config.seed,
                device=machine["device"],
                resumable=True,
                checked=not jobs,  # one check serves all
            )
            jobs.append(stack.enter_context(making))
        ranks.wait()  # for the folders
        tasks = [
            (config, provenance.partial_of(folder), probe) for config, folder, _, probe in wanted
        ]
        contents = train_group(reader, tasks, machine, ranks)
        for job, content in zip(jobs, contents, strict=False):
            job.details["content"] = content


def _guide_of(config: SAEConfig, saes: Path | None) -> Path | None:
    """The folder of the SAE that a run takes its k from, if any."""
    if config.guide is None:
        return None
    if saes is None:
        raise UserError(f"--saes: {config.name} takes its k from {config.guide}; say where it is.")
    return saes / config.guide


def _with_k(config: SAEConfig, guide: Path | None, store: Any) -> SAEConfig:
    """The run with the k that its guide found, where it has one."""
    if guide is None:
        return config
    from saeflow.saes import load
    from saeflow.training import with_found_k

    provenance.check(guide)
    return with_found_k(config, load(guide), store)


def _probe_of(config: SAEConfig, folder: Path | None) -> Path | None:
    """The folder of the probe that a run uses, if any."""
    name = config.options.get("complexity")
    if name is None:
        return None
    if folder is None:
        raise UserError(
            f"--probes: {config.name} reads the complexity {name!r}; say where its probe is."
        )
    return folder / name / "probes" / config.hook_point


@app.command()
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
    values, metrics = _json("--source", source), _json("--evaluation", evaluation)
    machine = _machine(runtime, threads)
    sets = {name: labelled / name for name in metrics.get("labelled_sets", {})}
    with (
        _interruptible(),
        provenance.job(
            out,
            name="clean",
            inputs=[
                *_model_folders(folder, values),
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
        if values["kind"] == "vision":
            from saeflow.evaluation.zero_shot import write_labelled

            cards = metrics["concept_cards"]
            prompts = cards["prompts"] if cards else []
            write_labelled(values, folder, sets, prompts, hook_point, machine["device"], job.path)
            return
        from saeflow.evaluation.splice import write_clean
        from saeflow.stores import open_store

        mean = open_store(train / f"{hook_point}.zarr").mean
        write_clean(
            values, folder, hook_point, mean, metrics["ce_contexts"], machine["device"], job.path
        )


@app.command()
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

    chosen = _json("--settings", settings)
    params = {"hook_point": hook_point, "dimension": chosen}
    with (
        _interruptible(),
        provenance.job(out, name="dimension", inputs=[store], params=params, key=key) as job,
    ):
        write_dimensions(open_store(store / f"{hook_point}.zarr"), chosen, job.path)


@app.command()
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
    keys = _of_each("--sae", len(sae), out, key)
    left = [
        (folder, made, name)
        for folder, made, name in zip(sae, out, keys, strict=True)
        if not provenance.take(_place(group, folder, made), made, name)
    ]
    if not left:
        return  # without waiting for torch, like `train`
    from saeflow.evaluation import Bench, benches, evaluate_sae
    from saeflow.saes import load, read_config

    metrics, machine = _json("--evaluation", evaluation), _machine(runtime, threads)
    measured_on: list[Bench] = []
    refused: list[UserError] = []
    for folder, made, name in left:
        try:
            provenance.check(folder)
            config = read_config(folder)
            if not measured_on:
                store = (config["source"], config["hook_point"])
                found = benches(results, *store, metrics, machine["device"])
                for path in _read_by(found):  # once for all
                    provenance.check(path)
                measured_on = found
            with (
                _interruptible(),
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


def _read_by(benches: "list[Bench]") -> list[Path]:
    """The result folders that some benches read, each once."""
    return list(dict.fromkeys(path for bench in benches for path in bench.inputs))


@app.command()
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
    from saeflow.evaluation import Bench, collect_latents
    from saeflow.figures.latents import write_page
    from saeflow.saes import load, read_config

    metrics, machine = _json("--evaluation", evaluation), _machine(runtime, threads)
    chosen = _json("--settings", settings)
    provenance.check(sae)
    config = read_config(sae)
    bench = Bench(results, config["source"], config["hook_point"], metrics, machine["device"])
    with (
        _interruptible(),
        provenance.job(
            out,
            name="latents",
            inputs=list(dict.fromkeys([sae, *bench.inputs, *bench.shown])),
            params={**metrics, "latents": chosen, "mark": mark},
            key=key,
            device=machine["device"],
        ) as job,
    ):
        arrays, facts = collect_latents(load(sae), config, bench, chosen, job.path)
        shown = {**facts, "before": chosen["before"], "mark": mark}
        write_page(arrays, shown, job.path / "latents.html")


@app.command("interpret")
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
    from saeflow.evaluation import Bench
    from saeflow.evaluation.interpret import interpret
    from saeflow.saes import load, read_config

    metrics, machine = _json("--evaluation", evaluation), _machine(runtime, threads)
    chosen = _json("--settings", settings)
    own = scorer_file(chosen)
    provenance.check(sae)
    config = read_config(sae)
    bench = Bench(results, config["source"], config["hook_point"], metrics, machine["device"])
    with (
        _interruptible(),
        provenance.job(
            out,
            name="interpret",
            inputs=list(dict.fromkeys([sae, *bench.inputs, *bench.shown])),
            external={os.path.relpath(own): file_digest(own)} if own else None,
            params={**metrics, "interpretability": chosen},
            key=key,
            device=machine["device"],
        ) as job,
    ):
        interpret(load(sae), config, bench, chosen, job.path)


@app.command()
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
    from saeflow.evaluation import benches, evaluate_baselines

    metrics, machine = _json("--evaluation", evaluation), _machine(runtime, threads)
    source, _, hook_point = store.partition("/")
    measured_on = benches(results, source, hook_point, metrics, machine["device"])
    pca_ranks = _json("--ranks", ranks)
    with (
        _interruptible(),
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


@app.command()
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
    from saeflow.evaluation import Bench
    from saeflow.evaluation.stability import write_stability
    from saeflow.saes import load, read_config

    policy, machine = _json("--evaluation", evaluation), _machine(runtime, threads)
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
    bench = Bench(results, first["source"], first["hook_point"], policy, machine["device"])
    stores = [results / "stores" / first["source"] / split for split in SPLITS]
    with (
        _interruptible(),
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
            bench.check_fits(config)
        saes = {config["seed"]: load(path) for config, path in zip(configs, sae, strict=True)}
        write_stability(saes, first, bench, job.path)


@app.command()
def collect(
    records: Annotated[
        list[Path],
        typer.Argument(help="Records of trained SAEs, probes, evaluations and compared seeds."),
    ],
    out: Out,
    key: Key = "",
) -> None:
    """Gather the tables of all runs."""
    from saeflow.evaluation.tables import collect as collect_tables

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


@app.command()
def draw(
    figure: Annotated[str, typer.Argument(help="A key of saeflow.figures.FIGURES.")],
    tables: Annotated[Path, typer.Option(help="Folder of the tables.")],
    figures: Annotated[str, typer.Option(help="`figures`, as JSON.")],
    out: Out,
    key: Key = "",
) -> None:
    """Draw one figure from the tables."""
    from saeflow.figures import draw as draw_figure

    options = _json("--figures", figures)
    with provenance.job(out, name="draw", inputs=[tables], params=options, key=key) as job:
        draw_figure(figure, tables, options, job.path)


@app.command()
def report(
    names: Annotated[list[str], typer.Argument(help="Figures, in order.")],
    results: Annotated[Path, typer.Option(help="The results folder.")],
    out: Annotated[Path, typer.Option(help="Written: the report, one HTML file.")],
    page: Annotated[
        list[str] | None, typer.Option(help="Runs with a page of latent cards, to link to.")
    ] = None,
    mark: Mark = "",
    key: Key = "",
) -> None:
    """Write the report: tables, figures and where everything came from."""
    from saeflow.figures.report import write_report

    folders = [results / "figures" / name for name in names]
    pages = {run: results / "evaluations" / "latents" / run for run in page or []}
    write_report(results / "tables", folders, _records(results, folders), out, pages, mark)
    inputs = [results / "tables", *folders, *pages.values()]
    provenance.record_file(
        out, name="report", inputs=inputs, params={"names": names, "mark": mark}, key=key
    )


def _records(results: Path, figures: list[Path]) -> list[Path]:
    """The records of everything that the figures were made from."""
    seen: set[str] = set()
    links = (link for folder in figures for link in provenance.trace(folder, lambda _: None, seen))
    return sorted({provenance.record_path(Path(link.result)) for link in links})


@app.command()
def trace(
    file: Annotated[Path, typer.Argument(help="A result: a figure, table, SAE, store.")],
) -> None:
    """Print what a result was made from, down to models and data, and check every digest."""
    from saeflow.sources import external_digest

    for link in provenance.trace(file, external_digest):
        rest = "(above)" if link.seen else link.facts
        typer.echo(f"{'  ' * link.depth}{link.result}  [{link.job} {link.digest[:12]}]  {rest}")
    typer.echo(f"{file}: every link holds.")


Library = Annotated[str, typer.Option(help="saelens or dictionary_learning.")]


@app.command()
def export(
    sae: Annotated[Path, typer.Argument(help="Folder of a trained SAE.")],
    library: Annotated[str, typer.Option(help="saelens, dictionary_learning, or hub.")],
    out: Out,
    store: Annotated[
        Path | None,
        typer.Option(
            help="Held-out store (SOURCE/evaluation/HOOK_POINT.zarr), to calibrate a threshold on."
        ),
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="Folder of its metrics, for the hub's model card.")
    ] = None,
) -> None:
    """Write a trained SAE as another library's files, or as a folder for the Hugging Face hub."""
    from saeflow.exchange import export_sae
    from saeflow.stores import open_store

    held_out = None if store is None else open_store(store)
    inputs = [sae, *filter(None, [store and store.parent, evaluation])]
    params = {"library": library}
    with provenance.job(out, name="export", inputs=inputs, params=params) as job:
        cost = export_sae(sae, library, job.path, held_out, evaluation)
        job.details["calibrated"] = cost or None
    if cost:
        typer.echo(
            f"one threshold, {cost['threshold']:.4g}, in the place of a k for each input: FVU {cost['fvu_own']:.4f} "
            f"becomes {cost['fvu_exported']:.4f}, L0 {cost['l0_mean_own']:.2f} {cost['l0_mean_exported']:.2f}"
        )


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="What the other library saved.")],
    library: Library,
    store: Annotated[str, typer.Option(help="SOURCE/HOOK_POINT it is evaluated on.")],
    out: Out,
    name: Annotated[
        str,
        typer.Option(help="Its run's name; default: SOURCE/HOOK_POINT/FOLDER/imported-LIBRARY."),
    ] = "",
    key: Key = "",
) -> None:
    """Take over another library's SAE, so that `saeflow evaluate` and `saeflow.load` know it."""
    from saeflow.exchange import import_sae

    source, _, hook_point = store.partition("/")
    if not (source and hook_point):
        raise UserError(f"--store: expected SOURCE/HOOK_POINT, found {store!r}.")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give what {library} saved.")
    run = name or f"{store}/{out.name}/{IMPORTED}{library}"
    about = {
        "name": run, "entry": run.split("/")[2], "source": source, "hook_point": hook_point, "seed": 0,
    }  # fmt: skip
    external = {
        str(path): provenance.file_digest(path)
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    params = {"library": library, "store": store}
    with provenance.job(out, name="import", params=params, external=external, key=key) as job:
        import_sae(folder, library, about, job.path)


@app.command()
def verify(
    results: Annotated[
        list[Path] | None, typer.Argument(help="Results; default: all of results/.")
    ] = None,
) -> None:
    """Check every file of every result against its record, and read every store through."""
    from saeflow.stores import verify as verify_store

    count = 0
    for root in results or [Path("results")]:
        if not root.exists():
            raise UserError(f"{root}: no such file or folder. Give a result, or run the workflow.")
        for result in provenance.results_under(root) or [provenance.result_of(root)]:
            provenance.check(result)
            for store in sorted(result.glob("*.zarr")):
                verify_store(store)
            count += 1
    typer.echo(f"{count} results are as they were made.")
