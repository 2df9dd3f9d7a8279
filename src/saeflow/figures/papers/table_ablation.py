"""Architecture x activation of the Sparsemax SAE (Sparsemax SAE, ablation)."""

from collections.abc import Mapping
from typing import Any

from saeflow.figures import captions
from saeflow.figures.figure import PaperTable, TableFigure, ordered, without_data
from saeflow.figures.needs import Need
from saeflow.tables import compare
from saeflow.tables.load import Tables


def draw(tables: Tables, options: Mapping[str, Any]) -> PaperTable:
    """Make the table; seeds of a setting are averaged."""
    chosen = tables.options[tables.options["variant"] == "sparsemax"]
    wanted = ["architecture", "activation", "score_scale"]
    if chosen.empty:
        raise without_data("table_ablation", "SAEs of the variant sparsemax")
    cells = chosen[chosen["option"].isin(wanted)].pivot(
        index="run", columns="option", values="chosen"
    )
    cells = cells.rename_axis(index="trained").reset_index()
    rows = tables.wide.merge(cells, on="trained", suffixes=("", "_option"))
    rows = compare.of_one_size(rows)
    compare.check_budgets(tables, rows, options)
    metrics = [name for name in ("l0_mean", "nmse", "ce_degradation", "zero_shot") if name in rows]
    keys = ["source", "evaluated_on", "entry", "setting", *wanted]
    data = rows.groupby(keys, as_index=False)[metrics].mean()
    caption = (
        "Architecture (mlp: encoder and decoder of their own; shared: cross-attention over shared concepts) and activation "
        f"(weights, scores: two forms of sparsemax; relu). {captions.budget_sentence(rows)} {captions.rows_sentence(rows)}"
    )
    by = ["source", "evaluated_on", "architecture", "activation", "score_scale", "setting"]
    return PaperTable(ordered(data, by), caption)


FIGURE = TableFigure(
    title="Architecture and activation of the Sparsemax SAE",
    draw=draw,
    needs=Need("a run of the variant sparsemax", lambda asked: asked.variant("sparsemax")),
)
