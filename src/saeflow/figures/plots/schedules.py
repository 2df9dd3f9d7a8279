"""Schedules: what every scheduled or learned setting of training did, one panel per quantity."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from saeflow.errors import UserError
from saeflow.figures import captions, style
from saeflow.figures.figure import Drawing, Figure
from saeflow.figures.needs import TRAINED
from saeflow.figures.series import (
    Places,
    Series,
    each_setting,
    in_order,
    places_of,
    series_of,
    stroke,
)
from saeflow.tables import compare
from saeflow.tables.load import Tables
from saeflow.tables.schema import IDS, axis_label

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

QUANTITIES = (
    "k",
    "k_hat",
    "temperature",
    "l1_weight",
    "l0_weight",
    "p",
    "theta",
    "threshold",
    "score_scale",
    "alpha",
    "deviation",
)
_COLUMNS, _COLUMNS_OF_DETAILS = 5, 3
_HEIGHT, _TITLE, _BELOW = 1.6, 0.3, 0.65
"""Inches: of a row at most, of a source's name, and of the legend below."""
_LOG_FROM = 6.0


def draw(tables: Tables, options: Mapping[str, Any]) -> Drawing:
    """Every quantity of QUANTITIES that some run logged and that moved, over training tokens.

    Raises:
        UserError: none did, or runs differ in budget.
    """
    steps = compare.of_one_size(tables.training)
    panels = [
        (panel, quantity)
        for panel in compare.panels_of(steps)
        for quantity in QUANTITIES
        if quantity in steps and _moves(compare.one_panel(steps, panel), quantity)
    ]
    if not panels:
        raise UserError(
            "figures.names: schedules needs a setting that changes in training, training.csv has none. "
            "Take schedules out of figures.names in params.yaml."
        )
    wide = tables.wide
    compare.check_budgets(tables, wide[wide["run"].isin(steps["run"])], options)
    blocks = {panel: [q for own, q in panels if own == panel] for panel, _ in panels}
    places = places_of(tables)
    series = {panel: series_of(compare.one_panel(steps, panel)) for panel in blocks}
    pages = [{panel: quantities} for panel, quantities in blocks.items()] if len(blocks) > 1 else []
    shown = {quantity for _, quantity in panels}
    ids = ["k_target" if column == "k" else column for column in IDS]
    data = steps[[*ids, "setting", "step", "tokens_seen", *(q for q in QUANTITIES if q in shown)]]
    caption = (
        "What schedules and learning did to the settings of training, one line a setting (its first "
        "seed), darker shades for more active latents; quantities that no run of a source changes are "
        f"not drawn. {captions.size_sentence(steps)} {captions.budget_sentence(steps)}"
    )
    figure = _page(blocks, series, places, _COLUMNS)
    details = tuple(_page(page, series, places, _COLUMNS_OF_DETAILS) for page in pages)
    return Drawing(figure, data, caption, details)


def _page(
    blocks: Mapping[compare.Panel, list[str]],
    series: Mapping[compare.Panel, list[Series]],
    places: Places,
    columns: int,
) -> Canvas:
    """A page with the quantities of some sources, one below the other."""
    lines = {panel: -(-len(quantities) // columns) for panel, quantities in blocks.items()}
    room = style.PAGE_HEIGHT - _BELOW - _TITLE * len(blocks)
    row = min(_HEIGHT, room / sum(lines.values()))
    heights = [row * count + _TITLE for count in lines.values()]
    figure = style.new_figure(style.TEXT_WIDTH, sum(heights) + _BELOW)
    ratios = [*heights, _BELOW]
    parts = figure.subfigures(len(ratios), 1, squeeze=False, height_ratios=ratios).ravel()
    drawn: dict[str, Artist] = {}
    for part, (panel, quantities) in zip(parts[:-1], blocks.items(), strict=True):
        part.suptitle(compare.panel_title(panel), x=0.01, ha="left", fontsize=8, fontweight="bold")
        axes = part.subplots(lines[panel], columns, squeeze=False).ravel()
        for ax, quantity in zip(axes, quantities, strict=False):
            _panel(ax, series[panel], quantity, places, drawn)
            ax.set_title("\n".join(textwrap.wrap(axis_label(quantity), 105 // columns)), fontsize=7)
        for ax in axes[len(quantities) :]:
            ax.set_axis_off()
        for ax in axes[: len(quantities)][-columns:]:
            ax.set_xlabel(compare.panel_axis("tokens_seen", panel))
    legend = in_order(drawn, places)
    per_line = style.legend_columns(list(legend), style.TEXT_WIDTH)
    parts[-1].legend(legend.values(), legend, loc="center", ncols=per_line)
    return figure


def _moves(steps: pd.DataFrame, quantity: str) -> bool:
    return any(run[quantity].dropna().nunique() > 1 for _, run in steps.groupby("run"))


def _panel(
    ax: Axes, series: list[Series], quantity: str, places: Places, drawn: dict[str, Artist]
) -> None:
    from matplotlib.lines import Line2D

    values = []
    for one in series:
        if not _moves(one.rows, quantity):
            continue
        look = stroke(one, places) | {"marker": ""}
        settings = [held for _, held in each_setting(one.rows)]
        settings.sort(key=lambda held: held.groupby("run").tail(1)["l0"].mean())
        colors = style.shades(one.look.color, len(settings))
        for held, color in zip(settings, colors, strict=True):
            run = held[held["run"] == held["run"].iloc[0]]
            ax.plot(run["tokens_seen"], run[quantity], **look | {"color": color, "lw": 1.0})
            values.append(run[quantity].dropna())
        drawn.setdefault(one.label, Line2D([], [], **look))
    found = pd.concat(values)
    low, high = float(found.min()), float(found.max())
    if low > 0 and high / low > _LOG_FROM:
        style.log_axis(ax, "y", low / 1.3, high * 1.3)
    else:
        ax.set_ylim(bottom=min(0.0, low), top=high * 1.08 if high > 0 else 0.1)
        style.even_ticks(ax.yaxis, 4)
    style.even_ticks(ax.xaxis, 3)
    ax.set_xlim(left=0)
    ax.grid(True)


FIGURE = Figure(title="Schedules", draw=draw, needs=TRAINED)
