"""Everything that can be known of a run before its first job, and is refused there."""

import math
import os
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from saeflow import device
from saeflow.complexity.scorers import check_scoring
from saeflow.errors import UserError
from saeflow.figures import check_figures
from saeflow.files import read_json, write_json
from saeflow.plan import Plan
from saeflow.sources import check_source
from saeflow.sources.documents import check_files
from saeflow.sources.model_checks import check_source_model

OWNER = Path("results/.parameters.json")
"""Names the parameter file whose results lie beside it."""
_ANY_WIDTH = 4
"""No option depends on the width of the activations, which only the model knows."""
_SMALL = 1 << 20
"""Latents up to which an SAE of that width is built in memory; above, without (which takes seconds to set up)."""


def checked_plan(params: Mapping[str, Any]) -> Plan:
    """The plan of valid parameters whose parts fit each other; loads no model code.

    Raises:
        UserError: a source, a scorer, a figure, a number of rows or of ranks that a later job would refuse.
    """
    for name, source in params["sources"].items():
        check_source(name, source, Path("results/sources") / name)
    plan = Plan(params)
    check_figures(params, plan.runs.values())
    for source, _, name in plan.probes:
        check_scoring(name, plan.scoring(name), params["sources"][source])
    for source in plan.sources:
        _check_rows(plan, source)
        _check_windows(plan, source)
        _check_stream(plan, source)
        _check_leaks(plan, source)
    _check_budgets(plan)
    return plan


def check_saes(plan: Plan) -> None:
    """Build every SAE, as its training will, and check configs of imported ones; imports torch, which takes seconds.

    Raises:
        UserError: options that a variant refuses, a decoder that cannot be frozen, latents that ranks cannot divide,
            or an imported SAE that saeflow has no place for.
    """
    import torch

    from saeflow.exchange import check_import
    from saeflow.saes import build

    found: dict[str, str] = {}  # a mistake of an entry is one of all its runs
    for one in plan.imports.values():
        try:
            check_import(Path(one.folder), one.library, one.hook_point)
        except UserError as error:
            found.setdefault(one.entry, f"saes.{one.entry}.import: {error}")
    ranks = plan.params["runtime"]["ranks"]
    for run in plan.runs.values():
        options = dict(run.options) | ({"k": 1} if run.guide else {})
        try:
            with torch.device("cpu" if run.d_sae <= _SMALL else "meta"):
                sae = build(run.variant, _ANY_WIDTH, run.d_sae, options)
            if not run.training.train_decoder:
                sae.freeze_decoder()
            if ranks["split"] == "latents" and ranks["count"] > 1:
                sae.check_divisible()
        except UserError as error:
            found.setdefault(run.entry, f"saes.{run.entry} ({run.name}): {error}")
    if found:
        raise UserError(*found.values())


_MANY_PASSES = 10
_LATE = {
    "lr_warmup_steps": "its learning rate never reaches lr",
    "threshold_start_step": "the threshold that replaces k after training is an average over its first steps too",
}
"""Settings in steps, and what comes of one that training does not reach."""


def warnings(plan: Plan) -> list[str]:
    """Yield warnings of what is allowed and seldom meant: baselines without rows, sorted windows, rows that are read very often,
    settings that training is too short for.
    """
    found: dict[tuple[str, int, int], list[str]] = {}
    for run in plan.runs.values():
        rows = plan.rows(run.source)["train"]
        if run.training.tokens > _MANY_PASSES * rows:
            found.setdefault((run.source, rows, run.training.tokens), []).append(run.entry)
    without = [
        f"stores.{source}.keep_windows: the PCA baselines of {source} are left out, since the rows of its training split are "
        "deleted. keep_windows all keeps them."
        for source in plan.sources
        if plan.is_streamed(source) and plan.params["evaluation"]["pca_ranks"]
    ]
    without += [
        f"complexity.{name}: its probe at {source}/{hook_point} is fitted to half of the held-out documents, on which SAEs are "
        "evaluated too, since the training split is read window by window. stores.NAME.keep_windows null fits it to training rows."
        for source, hook_point, name in plan.probes
        if plan.goes_by_window(source)
    ]
    without += [
        f"stores.{source}.window_rows: windows hold images in the order of their data set, which may be sorted by class, and the "
        f"mean and scale of the store are those of the first window. Set sources.{source}.images.shuffle_seed."
        for source in plan.sources
        if plan.windows(source, "train") > 1
        and plan.params["sources"][source].get("images", {}).get("shuffle_seed", 0) is None
    ]
    late = {
        f"saes.{run.entry}: {key} is {value}, and training has {run.training.steps} steps of batch_size {run.training.batch_size}, "
        f"so that {_LATE[key]}. Lower it, or raise tokens."
        for run in plan.runs.values()
        for key in _LATE
        if (value := run.settings.get(key, 0)) >= run.training.steps
    }
    return (
        without
        + sorted(late)
        + [
            f"{', '.join(f'saes.{entry}' for entry in dict.fromkeys(entries))}: training passes {tokens / rows:,.0f} times "
            f"over the {rows:,} rows of stores.{source}.train_rows (tokens {tokens:,}). More rows may serve better."
            for (source, rows, tokens), entries in found.items()
        ]
    )


def check_inputs(plan: Plan) -> None:
    """Check that each file of text is there and begins with text in its column, and what local files tell of a model.

    It reads the first rows of each file, and builds a model of shapes alone.

    Raises:
        UserError: a file does not, or a model lacks a hook point or its tokenizer a token.
    """
    for name in plan.sources:
        source = plan.params["sources"][name]
        if "model" in source:
            try:
                check_source_model(source, Path("results/sources") / name)
            except UserError as error:
                raise error.within(f"sources.{name}") from None
        text = source.get("text", {})
        if "files" in text:
            try:
                check_files(text)
            except UserError as error:
                raise error.within(f"sources.{name}.text") from None


def device_problem(runtime: Mapping[str, Any]) -> str | None:
    """Say in one line why this machine cannot run on `runtime.device`, or return None."""
    asked = runtime["device"]
    problem = device.missing(asked, runtime["ranks"]["count"])
    return None if problem is None else device.refusal(asked, problem)


_OF_RUN = re.compile(
    r"results/(?:saes|evaluations(?:/latents|/interpretability)?)/(?P<run>[^/]+/[^/]+/(?!on/)[^/]+/[^/]+)/[^/]+"
)
_OF_SOURCE = re.compile(r"results/(?:sources|stores)/(?P<source>[^/]+)/.+")


def check_targets(plan: Plan, targets: Iterable[str]) -> None:
    """Check the runs and sources that files asked of snakemake are of.

    Args:
        targets: of a command line; what is no file of the results is passed over.

    Raises:
        UserError: there is no such run or source.
    """
    for target in targets:
        for what, pattern, known in (
            ("run", _OF_RUN, list(plan.evaluated)),
            ("source", _OF_SOURCE, list(plan.params["sources"])),
        ):
            found = pattern.fullmatch(target)
            if found and found[what] not in known:
                near = get_close_matches(found[what], known, 1, 0)
                raise UserError(
                    f"{target}: expected a {what} of the parameters, found {found[what]}. The nearest is {near[0]}. Fix the "
                    "name (`snakemake -n` lists all jobs)."
                )


def take_results(files: Iterable[Path | str]) -> None:
    """Note that the results here are those of some parameter files.

    Raises:
        UserError: they are those of others, see `check_owner`.
    """
    names = check_owner(files)
    OWNER.parent.mkdir(exist_ok=True)
    write_json(OWNER, names)


def check_owner(files: Iterable[Path | str]) -> list[str]:
    """Check that the results here, if there are any, are those of some parameter files.

    Args:
        files: as snakemake was told them.

    Returns:
        Their paths from here.

    Raises:
        UserError: they are those of others: tables and the report would be replaced, old figures stay.
    """
    names = [os.path.relpath(path) for path in files]
    owner = read_json(OWNER) if OWNER.exists() else names
    if owner != names:
        raise UserError(
            f"results: expected the parameter file that they were made from, {', '.join(map(str, owner))}, found "
            f"{', '.join(names)}. Give each file a folder of its own: add `--directory FOLDER` (of `saeflow run`, `--folder FOLDER`), or move results away. "
            f"(If the file was only renamed, delete {OWNER}.)"
        )
    return names


def _check_rows(plan: Plan, source: str) -> None:
    """Refuse an evaluation that asks for more than the evaluation split will hold."""
    params, evaluation = plan.params["sources"][source], plan.params["evaluation"]
    rows = plan.rows(source)["evaluation"]
    kind = plan.kind(source)
    each = kind.rows_per_context(params)
    contexts = None if each is None else math.ceil(rows / each)
    wanted = evaluation["ce_contexts"]
    if kind.predicts_contexts and contexts is not None and (wanted or 0) > contexts:
        raise UserError(
            f"evaluation.ce_contexts: expected at most {contexts} (stores.{source}.evaluation_rows: {rows} rows, "
            f"{each} of each context), found {wanted}. Lower it, or raise evaluation_rows."
        )
    if plan.has_dimension(source):
        chosen = evaluation["dimension"]
        count = min([chosen["rows"], *([contexts * each] if contexts and each else [])])
        if count <= 2 * max(chosen["neighbours"]):
            raise UserError(
                f"evaluation.dimension.neighbours: expected less than half of the {count} rows that are sampled of "
                f"{source}, found {max(chosen['neighbours'])}. Sample more rows, or lower it."
            )


def _check_windows(plan: Plan, source: str) -> None:
    """Refuse windows larger than the split, or too small for a context or a batch."""
    store, where = plan.params["stores"][source], f"stores.{source}.window_rows"
    if store["window_rows"] is None or "train" not in plan.splits(source):
        return
    rows, windows = store["train_rows"], plan.windows(source, "train")
    if store["window_rows"] > rows:
        raise UserError(
            f"{where}: expected at most train_rows ({rows}), found {store['window_rows']}. Lower it, or set it to null."
        )
    each = plan.kind(source).rows_per_context(plan.params["sources"][source])
    if each is not None and store["window_rows"] < each:
        raise UserError(
            f"{where}: expected at least the {each} rows of a context, found {store['window_rows']}. Raise it."
        )
    of_runs = [run.training.batch_size for run in plan.runs.values() if run.source == source]
    if of_runs and rows // windows < max(of_runs):
        raise UserError(
            f"{where}: expected windows of at least one batch ({max(of_runs)} rows), found {windows} windows of "
            f"{rows // windows} rows (window_rows {store['window_rows']}). Raise it."
        )


def _check_stream(plan: Plan, source: str) -> None:
    """Refuse what reads the training split of a stream after training, when its windows are gone."""
    where = f"stores.{source}.keep_windows"
    if not plan.goes_by_window(source):
        return
    if "train" not in plan.splits(source) or plan.windows(source, "train") == 1:
        raise UserError(
            f"{where}: expected a training split of several windows, found one. Set window_rows, or keep_windows to null."
        )
    if not plan.is_streamed(source):
        return
    if readers := plan.readers_of_rows(source):
        raise UserError(
            f"{where}: expected nothing that reads rows of the training split after training, when its windows are gone, found "
            f"{readers[0]}. Take it out, or set keep_windows to all."
        )


def _check_leaks(plan: Plan, source: str) -> None:
    """Refuse SAEs measured on what they were trained on: another source of the same text or images, split otherwise."""
    own = plan.params["sources"][source]
    for other in plan.others(source):
        theirs = plan.params["sources"][other]
        same = _collections(own) & _collections(theirs)
        if same and theirs["evaluation_share"] > own["evaluation_share"]:
            raise UserError(
                f"evaluation.also_on.{source}: {other} reads what {source} is trained on ({min(same)}), and its "
                f"evaluation_share {theirs['evaluation_share']} is above {own['evaluation_share']}, so that SAEs would be "
                "measured on their training data. Give both the same evaluation_share, or other data."
            )


def _collections(source: Mapping[str, Any]) -> set[str]:
    """Names of the texts or images that a source reads."""
    chosen = source.get("text") or source.get("images") or {}
    if "files" in chosen:
        return {str(Path(name).resolve()) for name in chosen["files"]}
    if "dataset" in chosen:
        return {f"{chosen['dataset']} {chosen['name']} {chosen['split']}"}
    return {f"{key} {chosen[key]}" for key in ("bundled", "folder", "scenes") if key in chosen}


def _check_budgets(plan: Plan) -> None:
    """Refuse a budget of less than one step, and numbers that the ranks do not divide."""
    ranks = plan.params["runtime"]["ranks"]
    for run in plan.runs.values():
        where, training = f"saes.{run.entry}", run.training
        if training.tokens < training.batch_size:
            raise UserError(
                f"{where}: expected training tokens for at least one step of batch_size {training.batch_size}, found "
                f"tokens {training.tokens}. Raise training.tokens, or lower training.batch_size."
            )
        what, number = (
            ("batch_size", training.batch_size)
            if ranks["split"] == "batch"
            else ("d_sae", run.d_sae)
        )
        if number % ranks["count"]:
            raise UserError(
                f"{where}.{what}: expected a multiple of the {ranks['count']} ranks that divide it "
                f"(runtime.ranks), found {number}. Change one of them."
            )
