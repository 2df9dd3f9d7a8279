"""Reconstruction, and the model's loss, against the size of the dictionary."""

import re
from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from saeflow.errors import UserError
from saeflow.evaluation.tables import MEASURED_IDS
from saeflow.figures import captions, style
from saeflow.figures import tables as read
from saeflow.figures.drawing import Drawing

METRICS = ("nmse", "ce_degradation")
_HEIGHT = 2.15  # inches


def dictionary_size(tables: read.Tables, options: Mapping[str, Any]) -> Drawing:
    """NMSE and cross-entropy degradation against the number of latents, a line per entry.

    Raises:
        UserError: no entry has SAEs of two sizes, or runs differ in budget.
    """
    rows = sized(tables, options, "dictionary_size")
    panels = [
        (panel, metric)
        for panel in read.panels_of(rows)
        for metric in METRICS
        if metric in rows and read.one_panel(rows, panel)[metric].notna().any()
    ]
    lines = -(-len(panels) // 2)
    figure = style.new_figure(style.TEXT_WIDTH, _HEIGHT * lines + 0.35)
    axes = figure.subplots(lines, 2, squeeze=False).ravel()
    legend: dict[str, Line2D] = {}
    for ax, (panel, metric) in zip(axes, panels, strict=False):
        held = read.one_panel(rows, panel)
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
        ax.set_ylim(0, 1.08 * ax.get_ylim()[1])
        ax.set_title(read.panel_title(panel))
        ax.set_xlabel("latents")
        ax.set_ylabel(read.metric_label(metric, panel).replace(" (", "\n("))
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    figure.legend(
        legend.values(),
        legend,
        loc="outside lower center",
        ncols=style.legend_columns(list(legend), style.TEXT_WIDTH),
    )
    caption = (
        "Uncentred normalised error (NMSE) and rise of the model's cross-entropy against the number of latents, for "
        f"entries with SAEs of several sizes. Mean L0: {l0_sentence(rows)}. {captions.seed_sentence(rows)} "
        f"{captions.budget_sentence(rows)} {captions.rows_sentence(rows, cross_entropy=True)}"
    )
    shown = [metric for metric in METRICS if metric in rows]
    return Drawing(figure, rows[[*MEASURED_IDS, "setting", "l0_mean", *shown]], caption)


def sized(tables: read.Tables, options: Mapping[str, Any], figure: str) -> pd.DataFrame:
    """The runs of entries that have several sizes, with `line`: what differs in size and seed only.

    Raises:
        UserError: there are none, or they differ in budget.
    """
    rows = tables.wide[read.is_sae(tables.wide)].copy()
    rows["line"] = [
        f"{entry}/{re.sub(r'^d[0-9]+-?', '', setting)}"
        for entry, setting in zip(rows["entry"], rows["setting"], strict=True)
    ]
    keys = [*read.Panel._fields, "line"]
    if len(rows):
        rows = rows[rows.groupby(keys)["d_sae"].transform("nunique") > 1]
    if rows.empty:
        raise UserError(
            f"figures.names: {figure} needs an entry of saes with several d_sae, the tables have none. Give one "
            f"d_sae: [SMALL, LARGE] in params.yaml, or take {figure} out of figures.names."
        )
    read.check_budgets(tables, rows, options)
    return rows


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


def l0_sentence(rows: pd.DataFrame) -> str:
    """The span of mean L0 of each variant."""
    spans = []
    for variant, own in rows.groupby("variant", sort=False):
        low, high = own["l0_mean"].min(), own["l0_mean"].max()
        span = f"{low:.3g}" if high - low < 0.05 else f"{low:.3g} to {high:.3g}"
        spans.append(f"{style.look(str(variant)).label} {span}")
    return ", ".join(spans)
