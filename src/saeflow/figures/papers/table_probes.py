"""Quality of the complexity probes by model and hook point (AdaptiveK)."""

from collections.abc import Mapping
from typing import Any

from saeflow.figures.figure import PaperTable, TableFigure, ordered, without_data
from saeflow.figures.needs import PROBES
from saeflow.tables.load import Tables


def draw(tables: Tables, options: Mapping[str, Any]) -> PaperTable:
    """Make the table."""
    rows = tables.probes[tables.probes["split"] == "evaluation"]
    if rows.empty:
        raise without_data("table_probes", "fitted probes")
    columns = [
        "source",
        "complexity",
        "hook_point",
        "contexts",
        "ridge",
        "rmse",
        "r2",
        "pearson",
        "spearman",
    ]
    caption = (
        "Ridge regression from one activation of a context to its complexity score (0 to 10), on held-out contexts; ridge: the "
        "penalty that cross-validation chose."
    )
    return PaperTable(ordered(rows[columns], columns[:3]), caption)


FIGURE = TableFigure(
    title="Complexity probes",
    draw=draw,
    needs=PROBES,
)
