"""Quality of the complexity probes by model and hook point (AdaptiveK)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from saeflow.figures.figure import PaperTable, TableFigure, ordered, without_data
from saeflow.figures.needs import PROBES
from saeflow.tables.load import Tables
from saeflow.tables.schema import Column


def draw(tables: Tables, options: Mapping[str, Any]) -> PaperTable:
    """Make the table."""
    rows = tables.probes[tables.probes["split"] == "evaluation"].copy()
    if rows.empty:
        raise without_data("table_probes", "fitted probes")
    columns = [
        "source",
        "complexity",
        "hook_point",
        "score",
        "contexts",
        "units",
        "ridge",
        "at_edge",
        "rmse",
        "r2",
        "r2_low",
        "r2_high",
        "pearson",
        "spearman",
    ]
    rows["score"] = np.where(rows["r2_low"] > 0, "read", "not read")
    caption = (
        "Ridge regression from one activation of a context to its complexity score (0 to 10), on held-out documents; ridge: the "
        "penalty that cross-validation chose, with documents held out whole. Where the 95 % interval of R² over documents is not above 0 "
        "the score is not read: an AdaptiveK SAE with this probe has a k that carries no information about it."
    )
    return PaperTable(ordered(rows[columns], columns[:3]), caption)


FIGURE = TableFigure(
    title="Complexity probes",
    draw=draw,
    needs=PROBES,
    columns={
        "score": Column(
            definition="Whether the probe reads the score.", kind="word", label="score is"
        )
    },
)
