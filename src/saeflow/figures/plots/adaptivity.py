"""Active latents against the objects of an image, and against local intrinsic dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from saeflow.errors import UserError
from saeflow.figures import captions, style
from saeflow.figures.figure import Drawing, Figure
from saeflow.figures.needs import Need
from saeflow.figures.series import (
    ESTIMATORS,
    Places,
    each_setting,
    in_order,
    places_of,
    series_of,
    stroke,
)
from saeflow.tables import compare
from saeflow.tables.load import Tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEIGHT = 2.3  # inches


def draw(tables: Tables, options: Mapping[str, Any]) -> Drawing:
    """L0 against the number of objects, and its rank correlation with local intrinsic dimension.

    Raises:
        UserError: neither was measured.
    """
    from matplotlib.lines import Line2D

    images = tables.contexts[tables.contexts["objects"].notna() & (tables.contexts["objects"] >= 0)]
    dimension = tables.dimension
    dimension = dimension[(dimension["region"] == "all") & dimension["spearman_l0"].notna()]
    if images.empty and dimension.empty:
        raise UserError(
            "figures.names: adaptivity needs images of generated scenes or evaluation.dimension, the tables "
            "have neither. Take adaptivity out of figures.names in params.yaml."
        )
    shown = {*images["run"], *dimension["run"]}
    compare.check_budgets(tables, tables.wide[tables.wide["run"].isin(shown)], options)
    panels = sorted({*compare.panels_of(images), *compare.panels_of(dimension)})
    estimators = {} if dimension.empty else ESTIMATORS
    columns = len(estimators) + (not images.empty)
    width = style.COLUMN_WIDTH if columns == 1 else style.TEXT_WIDTH
    figure = style.new_figure(width, _HEIGHT * len(panels) + 0.45)
    axes = figure.subplots(len(panels), columns, squeeze=False)
    legend: dict[str, Any] = {}
    parts, places = [], places_of(tables)
    for line, panel in zip(axes, panels, strict=True):
        left = list(line)
        if not images.empty:
            seen = compare.one_panel(images, panel)
            parts.append(_objects(left.pop(0), seen, places, legend))
        for ax, (estimator, title) in zip(left, estimators.items(), strict=True):
            held = compare.one_panel(dimension, panel)
            held = held[held["estimator"] == estimator]
            parts.append(held)
            _correlations(ax, held, places, legend)
            ax.set_title(title)
        first = line[0].get_title(loc="left")
        name = compare.panel_title(panel)
        line[0].set_title(f"{name}: {first}" if first else name)
    if estimators:
        legend["norm partialled out"] = Line2D([], [], color=style.INK, alpha=0.4)
    style.legend_below(figure, in_order(legend, places))
    shows = []
    if not images.empty:
        shows.append(
            "Against the objects in the scene: mean number of active latents per token of an image, over its "
            "mean across images."
        )
    if estimators:
        shows.append(
            "Against the neighbours: Spearman correlation of a token's L0 with the local intrinsic dimension "
            "around it, which is estimated in that neighbourhood in two ways; pale, with what both owe to the "
            "activation's norm taken out."
        )
    caption = (
        f"{' '.join(shows)} Variants with a fixed k are left out: their L0 does not vary. "
        f"{captions.budget_sentence(tables.wide[tables.wide['run'].isin(shown)])}"
    )
    return Drawing(figure, pd.concat(parts, ignore_index=True), caption)


def _objects(ax: Axes, held: pd.DataFrame, places: Places, legend: dict[str, Any]) -> pd.DataFrame:
    from matplotlib.lines import Line2D

    found: list[dict[str, Any]] = []
    if held.empty:  # a panel of another kind of images
        ax.set_axis_off()
        return pd.DataFrame(found)
    ax.set_xlabel("objects in the scene")
    ax.set_ylabel("L0 over its mean")
    ax.grid(True)
    for one in series_of(held):
        for _, rows in each_setting(one.rows):
            if rows["l0"].std() < 1e-6:
                continue
            means = (rows["l0"] / rows["l0"].mean()).groupby(rows["objects"]).mean()
            style_of = stroke(one, places)
            ax.plot(means.index, means, **style_of)
            legend.setdefault(one.label, Line2D([], [], **style_of))
            first = rows.iloc[0]
            found += [
                {"run": first["run"], "objects": count, "l0_over_mean": value}
                for count, value in means.items()
            ]
    return pd.DataFrame(found)


def _correlations(ax: Axes, held: pd.DataFrame, places: Places, legend: dict[str, Any]) -> None:
    from matplotlib.lines import Line2D

    if held.empty:
        ax.set_axis_off()
        return
    ax.set_xlabel("neighbours")
    ax.set_ylabel("Spearman of L0, dimension")
    ax.axhline(0, color=style.FAINT, lw=0.8)
    ax.grid(True)
    for one in series_of(held):
        means = one.rows.groupby("neighbours")[["spearman_l0", "partial_l0"]].mean()
        style_of = stroke(one, places)
        ax.plot(means.index, means["spearman_l0"], **style_of)
        ax.plot(means.index, means["partial_l0"], **style_of | {"marker": "", "alpha": 0.4})
        legend.setdefault(one.label, Line2D([], [], **style_of))
    style.log_axis(ax, "x", held["neighbours"].min() / 1.2, held["neighbours"].max() * 1.2)
    ax.set_xticks(sorted(held["neighbours"].unique()))
    ax.minorticks_off()


FIGURE = Figure(
    title="What the number of latents follows",
    draw=draw,
    needs=Need(
        "images of generated scenes, or evaluation.dimension of a source with SAEs whose L0 varies",
        lambda asked: asked.objects() or asked.dimension(),
    ),
)
