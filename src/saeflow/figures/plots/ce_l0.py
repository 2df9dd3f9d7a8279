"""Cross-entropy degradation against mean L0, one panel per source with a language model."""

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
from saeflow.figures.needs import Need
from saeflow.tables import compare, verdict
from saeflow.tables.load import Tables


def draw(tables: Tables, options: Mapping[str, Any]) -> Drawing:
    """Draw a front per panel."""
    rows = compared(tables, options, "ce_degradation", "ce_l0")
    panels = compare.panels_of(rows)
    figure, data = draw_fronts(tables, rows, [(panel, "ce_degradation") for panel in panels])
    clean = [
        f"{held['ce_clean'].iloc[0]:.3f} nats/token ({compare.panel_title(panel)})"
        for panel in panels
        if "ce_clean" in (held := compare.one_panel(rows, panel))
    ]
    caption = (
        f"Rise of the model's cross-entropy when reconstructions take the place of the activations, "
        f"against the mean number of active latents per token, {panels_sentence(rows)}. "
        + (f"Cross-entropy of the unchanged model: {captions.listed(clean)}. " if clean else "")
        + f"{captions.seed_sentence(saes_of(rows))} {baseline_sentence(rows, 'ce_degradation')} "
        f"{captions.budget_sentence(rows)} {captions.rows_sentence(rows, cross_entropy=True)} "
        f"{verdict.unranked_sentence(tables, 'ce_degradation')} {verdict.uninformed_sentence(tables)}"
    )
    return Drawing(figure, data, " ".join(caption.split()))


FIGURE = Figure(
    title="The model's loss against sparsity",
    draw=draw,
    needs=Need(
        "a text source with SAEs", lambda asked: asked.source(lambda kind: kind.predicts_contexts)
    ),
)
