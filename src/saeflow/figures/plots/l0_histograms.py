"""Histogram of active latents per token of each setting, seeds pooled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from saeflow.figures import style
from saeflow.figures.figure import Drawing, Figure
from saeflow.figures.ridges import Ridge, bins_with, closing, draw_ridges, histograms_of
from saeflow.tables import compare
from saeflow.tables.load import Tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(tables: Tables, options: Mapping[str, Any]) -> Drawing:
    """Histogram of active latents per token of each setting, seeds pooled.

    Raises:
        UserError: no SAE has one, or runs differ in budget.
    """
    from matplotlib.ticker import MaxNLocator

    rows, bins = histograms_of(tables, options, "l0", "l0_histograms")

    def finish(ax: Axes, panel: compare.Panel, ridges: list[Ridge]) -> None:
        low, high = _l0_limits(compare.one_panel(bins, panel))
        if high / low > 8:
            style.l0_axis(ax, low, high)
        else:
            ax.set_xlim(low, high)
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for ridge in ridges:
            mean = ridge.rows["l0_mean"].mean()
            ax.plot(mean, ridge.base, marker="|", ms=5, mew=1.0, color=style.INK, zorder=9)
        held = compare.one_panel(rows, panel)
        if "true_l0_mean" in held and held["true_l0_mean"].notna().any():
            true = held["true_l0_mean"].mean()
            ax.axvline(true, color=style.INK, lw=0.8, ls=(0, (4, 2)), zorder=8)
        ax.set_xlabel(compare.panel_axis("l0", panel))

    figure = draw_ridges(rows, bins, finish, shift=-0.5, pad=5)
    true = rows["true_l0_mean"].notna().any() if "true_l0_mean" in rows else False
    caption = (
        "Number of active latents per token on held-out rows, one line per setting: share of rows per "
        "bin, each scaled to its largest bin. Ticks mark means. "
        + ("The dashed line marks the true mean of the synthetic source. " if true else "")
        + closing(rows)
    )
    return Drawing(figure, bins_with(rows, bins, ["l0_mean"]), caption)


def _l0_limits(bins: pd.DataFrame) -> tuple[float, float]:
    """Limits that hold all but the lowest 0.1 % of the rows of every setting."""
    lows = []
    for _, run in bins.groupby("run"):
        below = run["count"].cumsum() / run["count"].sum()
        lows.append(float(run.loc[below > 0.001, "left"].min()))
    high = float(bins.loc[bins["count"] > 0, "right"].max())
    return max(0.6, min(lows) / 1.3), high * 1.15


FIGURE = Figure(title="Active latents per input", draw=draw)
