"""Reconstruction, and the model's loss, against the size of the dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from saeflow.figures import captions, style
from saeflow.figures.figure import Drawing, Figure
from saeflow.figures.needs import SIZES
from saeflow.figures.sizes import METRICS, l0_sentence, sized
from saeflow.tables import compare
from saeflow.tables.load import Tables
from saeflow.tables.schema import MEASURED_IDS

if TYPE_CHECKING:
    from matplotlib.lines import Line2D

_HEIGHT = 2.15  # inches


def draw(tables: Tables, options: Mapping[str, Any]) -> Drawing:
    """NMSE and cross-entropy degradation against the number of latents, a line per entry.

    Raises:
        UserError: no entry has SAEs of two sizes, or runs differ in budget.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, NullLocator

    rows = sized(tables, options, "dictionary_size")
    panels = [
        (panel, metric)
        for panel in compare.panels_of(rows)
        for metric in METRICS
        if metric in rows and compare.one_panel(rows, panel)[metric].notna().any()
    ]
    lines = -(-len(panels) // 2)
    figure = style.new_figure(style.TEXT_WIDTH, _HEIGHT * lines + 0.35)
    axes = figure.subplots(lines, 2, squeeze=False).ravel()
    legend: dict[str, Line2D] = {}
    for ax, (panel, metric) in zip(axes, panels, strict=False):
        held = compare.one_panel(rows, panel)
        ax.grid(True)
        for number, (label, own) in enumerate(_lines(held)):
            look = style.look(own["variant"].iloc[0], own["entry"].iloc[0])
            before = [earlier["variant"].iloc[0] for _, earlier in _lines(held)[:number]]
            dash = style.LINE_STYLES[before.count(own["variant"].iloc[0]) % len(style.LINE_STYLES)]
            points = own.groupby("d_sae")[metric].agg(["mean", "std"])
            stroke: dict[str, Any] = {"color": look.color, "marker": look.marker, "ls": dash}
            ax.errorbar(
                points.index, points["mean"], yerr=points["std"].fillna(0), capsize=1.6, **stroke
            )
            legend.setdefault(label, Line2D([], [], **stroke))
        sizes = sorted(held["d_sae"].unique())
        style.log_axis(ax, "x", sizes[0] / 1.2, sizes[-1] * 1.2)
        ax.xaxis.set_major_locator(FixedLocator(sizes))
        ax.xaxis.set_minor_locator(NullLocator())
        low, high = ax.get_ylim()
        ax.set_ylim(min(0.0, low), high + 0.08 * (high - min(0.0, low)))
        if low < 0:  # reconstructions that the model does better with
            ax.axhline(0, color=style.FAINT, lw=0.8)
        ax.set_title(compare.panel_title(panel))
        ax.set_xlabel("latents")
        ax.set_ylabel(compare.panel_axis(metric, panel).replace(" (", "\n("))
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    style.legend_below(figure, legend)
    caption = (
        "Uncentred normalised error (NMSE) and rise of the model's cross-entropy against the number of latents, for "
        f"entries with SAEs of several sizes. Mean L0: {l0_sentence(rows)}. {captions.seed_sentence(rows)} "
        f"{captions.budget_sentence(rows)} {captions.rows_sentence(rows, cross_entropy=True)}"
    )
    shown = [metric for metric in METRICS if metric in rows]
    return Drawing(figure, rows[[*MEASURED_IDS, "setting", "l0_mean", *shown]], caption)


def _lines(held: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Label and runs of each line of a panel, in the legend's order."""
    found = []
    for line, own in held.groupby("line"):
        look = style.look(own["variant"].iloc[0], own["entry"].iloc[0])
        found.append((style.rank_of(look), str(line), look.label, own))
    found.sort(key=lambda item: item[:2])
    labels = [label for _, _, label, _ in found]
    return [
        (
            label
            if labels.count(label) == 1
            else f"{label} ({line.replace('/', ', ').rstrip(', ')})",
            own,
        )
        for _, line, label, own in found
    ]


FIGURE = Figure(
    title="The size of the dictionary",
    draw=draw,
    needs=SIZES,
)
