"""Histogram of the latents' firing rates of each setting, with dead and dense shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from saeflow.figures import style
from saeflow.figures.figure import Drawing, Figure
from saeflow.figures.ridges import Ridge, bins_with, closing, draw_ridges, histograms_of
from saeflow.tables import compare
from saeflow.tables.load import Tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DENSE = -1.0  # log10 of the firing rate above which a latent is dense (10 %)


def draw(tables: Tables, options: Mapping[str, Any]) -> Drawing:
    """Histogram of the latents' firing rates of each setting, with dead and dense shares.

    Raises:
        UserError: no SAE has one, or runs differ in budget.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter

    rows, bins = histograms_of(tables, options, "log10_firing_rate", "firing_rates")

    def finish(ax: Axes, panel: compare.Panel, ridges: list[Ridge]) -> None:
        held = compare.one_panel(bins, panel)
        low = float(np.floor(held["left"].min())) if len(held) else -4.0
        ax.set_xlim(low, 0)
        ax.xaxis.set_major_locator(FixedLocator(list(np.arange(0, low - 0.5, -2))))
        ax.xaxis.set_major_formatter(FuncFormatter(_power))
        ax.axvline(_DENSE, color=style.INK, lw=0.8, ls=(0, (4, 2)), zorder=8)
        for metric, offset in (("dead_fraction", 28), ("dense_fraction", 58)):
            texts = [(ridges[0].base + 1.05, metric.partition("_")[0])]
            texts += [(ridge.base, _percent(100 * ridge.rows[metric].mean())) for ridge in ridges]
            for base, text in texts:
                ax.annotate(
                    text, (0, base), (offset, 0), xycoords=("data", "data"),
                    textcoords="offset points", ha="right", va="bottom", fontsize=6.5,
                    annotation_clip=False,
                )  # fmt: skip
        ax.set_xlabel(compare.panel_axis("firing_rate", panel))

    figure = draw_ridges(rows, bins, finish, shift=0.0, pad=14)
    caption = (
        "How often latents fire on held-out rows, one line per setting: latents per quarter of a decade, "
        "each scaled to its largest bin. The dashed line marks a rate of 10 %, above which a latent "
        "counts as dense; on the right the shares of latents that never fire (dead, not in the "
        "histogram) and that are dense, means over seeds. " + closing(rows)
    )
    return Drawing(figure, bins_with(rows, bins, ["dead_fraction", "dense_fraction"]), caption)


def _power(exponent: float, _position: int) -> str:
    return f"$10^{{{exponent:.0f}}}$" if exponent < -0.5 else "1"


def _percent(share: float) -> str:
    if 0 < share < 0.1:
        return "<0.1 %"
    return f"{share:.1f} %" if share < 99.95 else "100 %"


FIGURE = Figure(title="How often latents fire", draw=draw)
