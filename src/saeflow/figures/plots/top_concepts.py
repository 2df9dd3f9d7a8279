"""Zero-shot classification through an SAE's few most frequent concepts, bars per number of concepts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from saeflow.errors import UserError
from saeflow.figures import captions, style
from saeflow.figures.figure import Drawing, Figure
from saeflow.figures.needs import LABELLED
from saeflow.figures.series import each_setting, series_of, setting_label
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


def draw(tables: Tables, options: Mapping[str, Any]) -> Drawing:
    """Accuracy with only the top n concepts left on, one row of panels per source and labelled set.

    Raises:
        UserError: no SAE was classified through.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

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
    for line, (key, held) in zip(axes, groups, strict=True):
        series = _series(held)
        for ax, (protocol, title) in zip(line, PROTOCOLS.items(), strict=True):
            for place, (label, color, own) in enumerate(series):
                _bars(ax, own, color, protocol, place, len(series))
                legend.setdefault(label, Patch(color=color))
            clean = held["clean_accuracy"].iloc[0]
            chance = 1 / held["classes"].iloc[0]
            ax.axhline(clean, color=style.INK, lw=0.8, ls="--")
            ax.axhline(chance, color=style.INK, lw=0.8, ls=":")
            ax.set_xticks(range(len(COUNTS)), COUNTS)
            ax.set_ylim(0, 1)
            ax.grid(True, axis="y")
            ax.set_title(
                f"{key[2]} ({title})" if len(groups) == 1 else f"{key[0]}, {key[2]} ({title})"
            )
        line[0].set_ylabel("accuracy")
    for ax in axes[-1]:
        ax.set_xlabel("concepts left on (n)")
    legend["the model as it is"] = Line2D([], [], color=style.INK, lw=0.8, ls="--")
    legend["chance"] = Line2D([], [], color=style.INK, lw=0.8, ls=":")
    legend["permuted labels"] = Line2D([], [], color=style.INK, ls="none", marker="_", ms=5)
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=4)
    sets = captions.listed(
        f"{key[2]} ({held['images'].iloc[0]:.0f} images of {held['classes'].iloc[0]:.0f} classes)"
        for key, held in groups
    )
    caption = (
        f"Zero-shot accuracy, mean over classes, with only n concepts left on in every token: {sets}. "
        "Leak-free: each class's n most frequent concepts are chosen on training images, and every image "
        "keeps the union of all classes' choices. Paper: chosen on the classified images themselves "
        "(activations above 0.2), and each image keeps those of its own true class. Horizontal ticks: the "
        "same with permuted labels, where only a mask that gives the label away can be above chance. "
        "all: the whole reconstruction. "
        f"{captions.budget_sentence(tables.wide[tables.wide['run'].isin(rows['run'])])}"
    )
    return Drawing(figure, rows.reset_index(drop=True), caption)


def _series(held: pd.DataFrame) -> list[tuple[str, Any, pd.DataFrame]]:
    """Label, colour and rows of each setting; settings of one variant are shades of its colour."""
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
        drawn.append((label, color, rows))
    return drawn


def _bars(ax: Axes, rows: pd.DataFrame, color: Any, protocol: str, place: int, count: int) -> None:
    width = 0.84 / count
    offset = (place - (count - 1) / 2) * width
    for x, n in enumerate(COUNTS):
        own = rows[rows["n"] == n]
        whole = own[own["protocol"] == "all"]
        true = own[(own["protocol"] == protocol) & (own["labels"] == "true")]
        values = (whole if n == "all" else true)["accuracy"].to_numpy()
        if not len(values):
            continue
        ax.bar(x + offset, values.mean(), width * 0.92, color=color)
        if len(values) > 1:
            ax.errorbar(x + offset, values.mean(), np.std(values, ddof=1), color=style.INK, lw=0.7)
        permuted = own[(own["protocol"] == protocol) & (own["labels"] == "permuted")]
        if len(permuted):
            ax.plot(
                x + offset, permuted["accuracy"].mean(), color=style.INK, marker="_", ms=4, mew=0.8
            )


FIGURE = Figure(
    title="Classification through a few concepts",
    draw=draw,
    needs=LABELLED,
)
