"""Reconstruction, the model's loss and the number of active latents over the blocks of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from saeflow.errors import UserError
from saeflow.figures import captions, style
from saeflow.figures.figure import Drawing, Figure
from saeflow.figures.needs import DEPTH
from saeflow.tables import compare
from saeflow.tables.load import Tables
from saeflow.tables.schema import MEASURED_IDS, axis_label

if TYPE_CHECKING:
    from matplotlib.lines import Line2D

_HOOK_POINT = r"^(?P<tower>vision\.)?blocks\.(?P<block>\d+)\.(?P<place>\w+)$"
_METRICS = ("fvu", "ce_degradation", "l0_mean", "k_hat_mean")
_HEIGHT = 2.0  # inches


def draw(tables: Tables, options: Mapping[str, Any]) -> Drawing:
    """Each metric against the block, a line per setting, a row of panels per source and place.

    Raises:
        UserError: no SAE reads a block of a model, or runs of one hook point differ in budget.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    rows = tables.wide[compare.is_sae(tables.wide)].copy()
    where = rows["hook_point"].str.extract(_HOOK_POINT)
    rows["block"] = where["block"].astype(float)
    rows["place"] = where["tower"].fillna("") + where["place"]
    rows = rows[rows["block"].notna()]
    if rows.empty:
        raise UserError(
            "figures.names: depth needs SAEs of a model's blocks, the tables have none. Take depth out of figures.names "
            "in params.yaml, or add a source with hook_points: [blocks.*.resid_post]."
        )
    compare.check_budgets(tables, rows, options)
    shown = [metric for metric in _METRICS if metric in rows and rows[metric].notna().any()]
    panels = list(rows.groupby(["source", "evaluated_on", "place"]))
    figure = style.new_figure(style.TEXT_WIDTH, _HEIGHT * len(panels) + 0.35)
    axes = figure.subplots(len(panels), len(shown), squeeze=False)
    legend: dict[str, Line2D] = {}
    for line, ((source, on, place), held) in zip(axes, panels, strict=True):
        labels = _labels(held)
        for ax, metric in zip(line, shown, strict=True):
            ax.grid(True)
            for number, (label, own) in enumerate(labels.items()):
                look = style.look(own["variant"].iloc[0], own["entry"].iloc[0])
                dash = style.LINE_STYLES[number % len(style.LINE_STYLES)]
                stroke: dict[str, Any] = {"color": look.color, "marker": look.marker, "ls": dash}
                points = own.groupby("block")[metric].agg(["mean", "std"]).dropna(subset=["mean"])
                ax.errorbar(
                    points.index,
                    points["mean"],
                    yerr=points["std"].fillna(0),
                    capsize=1.6,
                    **stroke,
                )
                legend.setdefault(label, Line2D([], [], **stroke))
            ax.set_xlabel("block")
            ax.set_ylabel(axis_label(metric).replace(" (", "\n("))
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        title = str(source) if source == on else f"{source} on {on}"
        line[0].set_title(f"{title}, {place}", loc="left")
    style.legend_below(figure, legend)
    caption = (
        f"{captions.listed([axis_label(metric).partition(' (')[0] for metric in shown])} of SAEs over the blocks of the model "
        f"({rows['hook_point'].nunique()} hook points). {captions.seed_sentence(rows)} {captions.budget_sentence(rows)} "
        f"{captions.rows_sentence(rows, cross_entropy='ce_degradation' in shown)}"
    )
    data = rows[[*MEASURED_IDS, "setting", "block", *shown]].sort_values(["source", "block", "run"])
    return Drawing(figure, data.reset_index(drop=True), caption)


def _labels(held: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The runs of each line by its label: the variant, and the setting where a variant has several."""
    settings = held.groupby(["entry", "setting"], sort=True)
    looks = {key: style.look(own["variant"].iloc[0], own["entry"].iloc[0]) for key, own in settings}
    names = [look.label for look in looks.values()]
    found = {}
    for key, own in sorted(settings, key=lambda one: style.rank_of(looks[one[0]])):
        label = looks[key].label
        apart = ", ".join(own[name].iloc[0] for name in ("entry", "setting"))
        found[label if names.count(label) == 1 else f"{label} ({apart})"] = own
    return found


FIGURE = Figure(title="Over the model's depth", draw=draw, needs=DEPTH)
