"""Schedules: what every scheduled or learned setting of training did, one panel per quantity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from saeflow.errors import UserError
from saeflow.figures import captions, style
from saeflow.figures.figure import Drawing, Figure
from saeflow.figures.series import Series, each_setting, series_of
from saeflow.tables import compare
from saeflow.tables.load import Tables
from saeflow.tables.schema import IDS, axis_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

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
_COLUMNS, _HEIGHT = 3, 1.6
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
    lines = {panel: -(-len(quantities) // _COLUMNS) for panel, quantities in blocks.items()}
    heights = [_HEIGHT * count + 0.55 for count in lines.values()]
    figure = style.new_figure(style.TEXT_WIDTH, sum(heights))
    parts = figure.subfigures(len(blocks), 1, squeeze=False, height_ratios=heights).ravel()
    shown = set()
    for part, (panel, quantities) in zip(parts, blocks.items(), strict=True):
        part.suptitle(compare.panel_title(panel), x=0.01, ha="left", fontsize=8, fontweight="bold")
        axes = part.subplots(lines[panel], _COLUMNS, squeeze=False).ravel()
        series = series_of(compare.one_panel(steps, panel))
        drawn: dict[str, Line2D] = {}
        for ax, quantity in zip(axes, quantities, strict=False):
            _panel(ax, series, quantity, drawn)
            ax.set_title(axis_label(quantity))
            ax.set_xlabel(compare.panel_axis("tokens_seen", panel))
        for ax in axes[len(quantities) :]:
            ax.set_axis_off()
        part.legend(handles=list(drawn.values()), loc="outside lower center", ncols=5)
        shown |= set(quantities)
    ids = ["k_target" if column == "k" else column for column in IDS]
    data = steps[[*ids, "setting", "step", "tokens_seen", *(q for q in QUANTITIES if q in shown)]]
    caption = (
        "What schedules and learning did to the settings of training, one line a setting (its first "
        "seed), darker shades for more active latents; quantities that no run of a source changes are "
        f"not drawn. {captions.size_sentence(steps)} {captions.budget_sentence(steps)}"
    )
    return Drawing(figure, data, caption)


def _moves(steps: pd.DataFrame, quantity: str) -> bool:
    return any(run[quantity].dropna().nunique() > 1 for _, run in steps.groupby("run"))


def _panel(ax: Axes, series: list[Series], quantity: str, drawn: dict[str, Line2D]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    values = []
    for one in series:
        if not _moves(one.rows, quantity):
            continue
        settings = [held for _, held in each_setting(one.rows)]
        settings.sort(key=lambda held: held.groupby("run").tail(1)["l0"].mean())
        colors = style.shades(one.look.color, len(settings))
        for held, color in zip(settings, colors, strict=True):
            run = held[held["run"] == held["run"].iloc[0]]
            ax.plot(run["tokens_seen"], run[quantity], color=color, lw=1.0)
            values.append(run[quantity].dropna())
        drawn.setdefault(one.label, Line2D([], [], color=one.look.color, lw=1.4, label=one.label))
    found = pd.concat(values)
    low, high = float(found.min()), float(found.max())
    if low > 0 and high / low > _LOG_FROM:
        style.log_axis(ax, "y", low / 1.3, high * 1.3)
    else:
        ax.set_ylim(bottom=min(0.0, low), top=high * 1.08 if high > 0 else 0.1)
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.yaxis.set_major_formatter(FuncFormatter(style.plain))
    ax.xaxis.set_major_locator(MaxNLocator(3))
    ax.xaxis.set_major_formatter(FuncFormatter(style.plain))
    ax.set_xlim(left=0)
    ax.grid(True)


FIGURE = Figure(title="Schedules", draw=draw)
