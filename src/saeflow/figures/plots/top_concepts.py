"""Zero-shot classification through an SAE's few most frequent concepts, against how many concepts are left on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from saeflow.errors import UserError
from saeflow.figures import captions, style
from saeflow.figures.figure import Drawing, Figure
from saeflow.figures.needs import LABELLED
from saeflow.figures.series import (
    Places,
    each_setting,
    places_of,
    series_of,
    setting_label,
    stroke,
)
from saeflow.tables import compare
from saeflow.tables.load import Tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COUNTS = ("1", "5", "10", "50", "all")
PROTOCOLS = {
    "leak_free": "leak-free: concepts of all classes",
    "paper": "paper: concepts of the true class",
}
_PANEL_HEIGHT = 1.9  # inches; less where so many panels would not fit on a page
_BELOW = 0.55  # inches, of the legend
_FAINT = 0.5


def draw(tables: Tables, options: Mapping[str, Any]) -> Drawing:
    """Accuracy against the concepts left on, a point for each n of COUNTS; a row of panels per source and labelled set.

    Raises:
        UserError: no SAE was classified through.
    """
    from matplotlib.lines import Line2D

    rows = tables.classification[compare.is_sae(tables.classification)]
    rows = rows[(rows["concepts"] == "on")]
    if rows.empty:
        raise UserError(
            "figures.names: top_concepts needs labelled images, the tables have none. Take top_concepts out "
            "of figures.names in params.yaml, or give a vision source and evaluation.labelled_sets."
        )
    compare.check_budgets(tables, tables.wide[tables.wide["run"].isin(rows["run"])], options)
    groups = list(rows.groupby(["source", "hook_point", "set"]))
    height = min(_PANEL_HEIGHT, (style.PAGE_HEIGHT - _BELOW) / len(groups))
    figure = style.new_figure(style.TEXT_WIDTH, height * len(groups) + _BELOW)
    axes = figure.subplots(len(groups), 2, squeeze=False, sharex="col", sharey="row")
    legend: dict[str, Any] = {}
    places = places_of(tables)
    for line, (key, held) in zip(axes, groups, strict=True):
        series = _series(held, places)
        for ax, (protocol, title) in zip(line, PROTOCOLS.items(), strict=True):
            for label, drawn, own in series:
                legend.setdefault(label, _curve(ax, own, drawn, protocol))
            clean = held["clean_accuracy"].iloc[0]
            chance = 1 / held["classes"].iloc[0]
            ax.axhline(clean, color=style.INK, lw=0.8, ls="--")
            ax.axhline(chance, color=style.INK, lw=0.8, ls=":")
            kept = rows["kept"][rows["protocol"].isin([protocol, "all"])]
            style.log_axis(ax, "x", kept[kept > 0].min() / 1.2, kept.max() * 1.2)
            ax.set_ylim(0, 1)
            ax.grid(True)
            ax.set_title(
                f"{key[2]} ({title})" if len(groups) == 1 else f"{key[0]}, {key[2]} ({title})"
            )
        line[0].set_ylabel("accuracy")
    for ax in axes[-1]:
        ax.set_xlabel("concepts kept")
    legend["the model as it is"] = Line2D([], [], color=style.INK, lw=0.8, ls="--")
    legend["chance"] = Line2D([], [], color=style.INK, lw=0.8, ls=":")
    legend["permuted labels"] = Line2D([], [], color=style.INK, lw=0.6, alpha=_FAINT)
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=4)
    sets = captions.listed(
        f"{key[2]} ({held['images'].iloc[0]:.0f} images of {held['classes'].iloc[0]:.0f} classes)"
        for key, held in groups
    )
    caption = (
        f"Zero-shot accuracy, mean over classes, with only a few concepts left on in every token: {sets}. Points from left to "
        f"right: the n = {captions.listed(COUNTS[:-1])} most frequent concepts of each class, and all concepts. Leak-free: they are "
        "chosen on training images, and every image keeps the union of all classes' choices. Paper: chosen on the classified images "
        "themselves (activations above 0.2), and each image keeps those of its own true class. Faint: the same with permuted "
        "labels, where only a mask that gives the label away can be above chance. "
        f"{captions.budget_sentence(tables.wide[tables.wide['run'].isin(rows['run'])])}"
    )
    return Drawing(figure, rows.reset_index(drop=True), caption)


def _series(held: pd.DataFrame, places: Places) -> list[tuple[str, dict[str, Any], pd.DataFrame]]:
    """Label, stroke and rows of each setting; settings of one variant are shades of its colour."""
    found = [
        (one, len(settings), rows)
        for one in series_of(held)
        for settings in [list(each_setting(one.rows))]
        for _, rows in settings
    ]
    looks = [one.look for one, _, _ in found]
    drawn = []
    for i, (one, count, rows) in enumerate(found):
        twins = [j for j, look in enumerate(looks) if look == one.look]
        color = style.shades(one.look.color, len(twins))[twins.index(i)]
        label = one.label + (f", {setting_label(rows.iloc[0])}" if count > 1 else "")
        drawn.append((label, stroke(one, places) | {"color": color}, rows))
    return drawn


def _curve(ax: Axes, rows: pd.DataFrame, drawn: Mapping[str, Any], protocol: str) -> Any:
    """Draw the means over seeds, with the standard deviation where there are several; return the curve."""
    chosen = rows[rows["protocol"] == protocol]
    true = pd.concat([chosen[chosen["labels"] == "true"], rows[rows["protocol"] == "all"]])
    permuted = chosen[chosen["labels"] == "permuted"]
    kept, accuracy, spread = _points(true)
    (curve,) = ax.plot(kept, accuracy, ms=3.5, **drawn)
    ax.errorbar(kept, accuracy, spread, fmt="none", color=drawn["color"], capsize=1.4)
    ax.plot(*_points(permuted)[:2], color=drawn["color"], lw=0.6, alpha=_FAINT, zorder=1)
    return curve


def _points(rows: pd.DataFrame) -> tuple[Any, Any, Any]:
    """Concepts kept, accuracy and its spread over seeds, for each n in order."""
    ordered = rows.assign(n=pd.Categorical(rows["n"], COUNTS))
    by_n = ordered.groupby("n", observed=True)
    return by_n["kept"].mean(), by_n["accuracy"].mean(), by_n["accuracy"].std()


FIGURE = Figure(
    title="Classification through a few concepts",
    draw=draw,
    needs=LABELLED,
)
