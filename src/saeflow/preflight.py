"""Everything that can be known of a run before its first job, and is refused there."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saeflow import device
from saeflow.complexity.scorers import check_scoring
from saeflow.errors import UserError
from saeflow.figures import check_figures
from saeflow.plan import Plan
from saeflow.sources import check_source
from saeflow.sources.text import rows_per_context

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


def device_problem(runtime: Mapping[str, Any]) -> str | None:
    """Say in one line why this machine cannot run on `runtime.device`, or return None."""
    asked = runtime["device"]
    problem = device.missing(asked, runtime["ranks"]["count"])
    return None if problem is None else device.refusal(asked, problem)


def _check_rows(plan: Plan, source: str) -> None:
    """Refuse an evaluation that asks for more than the evaluation split will hold."""
    params, evaluation = plan.params["sources"][source], plan.params["evaluation"]
    rows = plan.rows(source)["evaluation"]
    each = {
        "text": lambda: rows_per_context(params),
        "synthetic": lambda: 1,
        "vision": lambda: 1 if params["tokens"] == "cls" else None,  # else the model knows
    }[params["kind"]]()
    contexts = None if each is None else math.ceil(rows / each)
    wanted = evaluation["ce_contexts"]
    if params["kind"] == "text" and contexts is not None and wanted > contexts:
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
