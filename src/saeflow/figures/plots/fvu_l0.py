"""Fraction of variance unexplained against mean L0, one panel per source and hook point."""

from collections.abc import Mapping
from typing import Any

from saeflow.figures import captions
from saeflow.figures.figure import Drawing, Figure
from saeflow.figures.fronts import (
    baseline_sentence,
    compared,
    draw_fronts,
    panels_sentence,
    saes_of,
)
from saeflow.tables import compare, verdict
from saeflow.tables.load import Tables


def draw(tables: Tables, options: Mapping[str, Any]) -> Drawing:
    """Draw a front per panel."""
    rows = compared(tables, options, "fvu", "fvu_l0")
    figure, data = draw_fronts(tables, rows, [(panel, "fvu") for panel in compare.panels_of(rows)])
    caption = (
        f"Fraction of variance unexplained (FVU) against the mean number of active latents per token, "
        f"{panels_sentence(rows)}. {captions.seed_sentence(saes_of(rows))} {baseline_sentence(rows, 'fvu')} "
        f"{captions.budget_sentence(rows)} {captions.rows_sentence(rows)} "
        f"{verdict.unranked_sentence(tables, 'fvu')} {verdict.uninformed_sentence(tables)}"
    )
    return Drawing(figure, data, " ".join(caption.split()))


FIGURE = Figure(title="Reconstruction against sparsity", draw=draw)
