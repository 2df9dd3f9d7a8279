"""Recovery of the true dictionary and of its supports against mean L0, per synthetic source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from saeflow.figures import captions, style
from saeflow.figures.figure import Drawing, Figure
from saeflow.figures.fronts import compared, draw_fronts, saes_of
from saeflow.figures.needs import Need
from saeflow.tables import compare
from saeflow.tables.load import Tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_METRICS = ("matched_feature_cosine", "support_f1")
_CHANCE = "matched_feature_cosine_chance"


def draw(tables: Tables, options: Mapping[str, Any]) -> Drawing:
    """Draw two fronts per source; the true mean L0 is a dashed line."""
    rows = saes_of(compared(tables, options, _METRICS[0], "recovery"))
    sources = compare.panels_of(rows)
    panels = [(panel, metric) for panel in sources for metric in _METRICS]
    figure, data = draw_fronts(tables, rows, panels, of_truth=True)
    true = [
        f"{held['true_l0_mean'].iloc[0]:.3g} ({compare.panel_title(panel)})"
        for panel in sources
        if "true_l0_mean" in (held := compare.one_panel(rows, panel))
    ]
    chance = _draw_chance(figure.axes, panels, rows)
    caption = (
        "Recovery of the known dictionary of synthetic activations against the mean number of active "
        "latents per sample: cosine similarity of matched decoder directions and true features "
        "(Hungarian matching, averaged over the true features), and micro-averaged F1 of the recovered "
        "supports. "
        + (f"The dashed line marks the true mean L0: {captions.listed(true)}. " if true else "")
        + (
            f"Dotted: the matched cosine of random directions, {captions.listed(chance)}. "
            if chance
            else ""
        )
        + f"{captions.seed_sentence(rows)} {captions.budget_sentence(rows)} "
        f"{captions.rows_sentence(rows)}"
    )
    return Drawing(figure, data, " ".join(caption.split()))


def _draw_chance(
    axes: Sequence[Axes], panels: Sequence[tuple[compare.Panel, str]], rows: pd.DataFrame
) -> list[str]:
    """Draw what random directions reach, where it was measured; returns it in words."""
    said = []
    for ax, (panel, metric) in zip(axes, panels, strict=False):
        held = compare.one_panel(rows, panel)
        if metric == _METRICS[0] and _CHANCE in held and held[_CHANCE].notna().any():
            value = float(held[_CHANCE].mean())
            ax.axhline(value, color=style.FAINT, lw=0.9, ls=":", zorder=1)
            said.append(f"{value:.2f} ({compare.panel_title(panel)})")
    return said


FIGURE = Figure(
    title="Recovery of a known dictionary",
    draw=draw,
    needs=Need(
        "a synthetic source with SAEs",
        lambda asked: asked.source(lambda kind: kind.has_true_dictionary),
    ),
)
