"""Schedules: what every scheduled or learned setting of training did, one panel per quantity."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from saeflow.errors import UserError
from saeflow.evaluation.tables import IDS
from saeflow.figures import captions, style
from saeflow.figures import tables as read
from saeflow.figures.drawing import Drawing

QUANTITIES = {
    "k": "k (or its budget)",
    "k_hat": "mean k̂ of a batch",
    "temperature": "temperature of the soft top-k",
    "l1_weight": "weight of the L1 (or Lₚ) penalty",
    "l0_weight": "weight of the L0 penalty",
    "p": "p of the penalty",
    "theta": "mean threshold (JumpReLU)",
    "threshold": "threshold in use",
    "score_scale": "scale of the scores",
    "alpha": "α of the entmax",
    "deviation": "weight of the probe's deviation",
}
_COLUMNS, _HEIGHT = 3, 1.6
_LOG_FROM = 6.0


def schedules(tables: read.Tables, options: Mapping[str, Any]) -> Drawing:
    """Every quantity of QUANTITIES that some run logged and that moved, over training tokens.

    Raises:
        UserError: none did, or runs differ in budget.
    """
    steps = read.of_one_size(tables.training)
    panels = [
        (panel, quantity)
        for panel in read.panels_of(steps)
        for quantity in QUANTITIES
        if quantity in steps and _moves(read.one_panel(steps, panel), quantity)
    ]
    if not panels:
        raise UserError(
            "figures.names: schedules needs a setting that changes in training, training.csv has none. "
            "Take schedules out of figures.names in params.yaml."
        )
    wide = tables.wide
    read.check_budgets(tables, wide[wide["run"].isin(steps["run"])], options)
    blocks = {panel: [q for own, q in panels if own == panel] for panel, _ in panels}
    lines = {panel: -(-len(quantities) // _COLUMNS) for panel, quantities in blocks.items()}
    heights = [_HEIGHT * count + 0.55 for count in lines.values()]
    figure = style.new_figure(style.TEXT_WIDTH, sum(heights))
    parts = figure.subfigures(len(blocks), 1, squeeze=False, height_ratios=heights).ravel()
    shown = set()
    for part, (panel, quantities) in zip(parts, blocks.items(), strict=True):
        part.suptitle(read.panel_title(panel), x=0.01, ha="left", fontsize=8, fontweight="bold")
        axes = part.subplots(lines[panel], _COLUMNS, squeeze=False).ravel()
        series = read.series_of(read.one_panel(steps, panel))
        drawn: dict[str, Line2D] = {}
        for ax, quantity in zip(axes, quantities, strict=False):
            _panel(ax, series, quantity, drawn)
            ax.set_title(QUANTITIES[quantity])
            ax.set_xlabel(read.metric_label("tokens_seen", panel))
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


def _panel(ax: Axes, series: list[read.Series], quantity: str, drawn: dict[str, Line2D]) -> None:
    values = []
    for one in series:
        if not _moves(one.rows, quantity):
            continue
        settings = [held for _, held in read.each_setting(one.rows)]
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
