"""Mean L0 of rows against the local intrinsic dimension around them, by estimator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from saeflow.errors import UserError
from saeflow.figures import captions, style
from saeflow.figures.figure import Drawing, Figure
from saeflow.figures.needs import Asked, Need
from saeflow.figures.series import ESTIMATORS, each_setting, in_order, places_of, series_of, stroke
from saeflow.tables import compare
from saeflow.tables.load import Tables

if TYPE_CHECKING:
    from matplotlib.lines import Line2D

_HEIGHT = 2.3  # inches


def draw(tables: Tables, options: Mapping[str, Any]) -> Drawing:
    """Mean L0 of rows against the local intrinsic dimension around them, by estimator.

    Raises:
        UserError: no dimension was estimated.
    """
    from matplotlib.lines import Line2D

    rows = tables.dimension_bins
    rows = rows[rows.groupby("run")["l0"].transform("std") > 1e-6]
    if rows.empty:
        raise UserError(
            "figures.names: k_dimension needs evaluation.dimension and a variant whose L0 varies, the tables have "
            "none. Take k_dimension out of figures.names in params.yaml."
        )
    shown = tables.wide[tables.wide["run"].isin(rows["run"])]
    compare.check_budgets(tables, shown, options)
    neighbours = rows["neighbours"].max()
    rows = rows[rows["neighbours"] == neighbours]
    panels = [(panel, estimator) for panel in compare.panels_of(rows) for estimator in ESTIMATORS]
    lines = len(panels) // 2
    figure = style.new_figure(style.TEXT_WIDTH, _HEIGHT * lines + 0.5)
    axes = figure.subplots(lines, 2, squeeze=False).ravel()
    legend: dict[str, Line2D] = {}
    places = places_of(tables)
    for ax, (panel, estimator) in zip(axes, panels, strict=True):
        held = compare.one_panel(rows, panel)
        held = held[held["estimator"] == estimator]
        for one in series_of(held):
            stroke_of = stroke(one, places)
            for _, setting in each_setting(one.rows):
                means = setting.groupby("bin")[["dimension", "l0"]].mean()
                ax.plot(means["dimension"], means["l0"] / means["l0"].mean(), **stroke_of)
            legend.setdefault(one.label, Line2D([], [], **stroke_of))
        ax.grid(True)
        ax.set_title(f"{compare.panel_title(panel)}: {ESTIMATORS[estimator]}")
        ax.set_xlabel("local intrinsic dimension")
        ax.set_ylabel("L0 over its mean")
    style.legend_below(figure, in_order(legend, places))
    caption = (
        "Mean L0 of held-out rows, over its mean, against the local intrinsic dimension around them, in ten bins of "
        f"equally many rows; the dimension is estimated from {neighbours:g} neighbours. Variants with a fixed k are left "
        f"out. {captions.budget_sentence(shown)} {_related(tables.dimension, neighbours)} "
        f"{_agreement(tables.dimension_agreement, neighbours)} {_control(tables.dimension_control, neighbours)}"
    )
    return Drawing(figure, rows, " ".join(caption.split()))


def _related(rows: pd.DataFrame, neighbours: float) -> str:
    """Count, by estimator and region, the SAEs whose k follows the dimension beyond what the norm explains."""
    held = rows[(rows["neighbours"] == neighbours) & rows["partial_l0"].notna()]
    low, high = (
        held[f"partial_k_hat_{bound}"].fillna(held[f"partial_l0_{bound}"])
        for bound in ("low", "high")
    )
    held = held.assign(above=low > 0, below=high < 0, known=low.notna())
    said = []
    for estimator, title in ESTIMATORS.items():
        by_region = held[held["known"] & (held["estimator"] == estimator)].groupby(
            "region", sort=False
        )
        parts = [
            f"{region}: {int(of['above'].sum())} and {int(of['below'].sum())} of {len(of)}"
            for region, of in by_region
        ]
        if parts:
            said.append(f"{title}, {'; '.join(parts)}")
    if not said:
        return ""
    return (
        "SAEs whose k-hat (L0, where an SAE chooses no k) rises and falls with the dimension given the activation's norm, by "
        f"the sign of a 95 % bootstrap interval over documents, images or samples, by region of the rows: {'. By '.join(said)}."
    )


def _agreement(rows: pd.DataFrame, neighbours: float) -> str:
    """State the rank correlation of the two estimators."""
    held = rows[
        (rows["neighbours"] == neighbours) & (rows["other_neighbours"] == neighbours)
        & rows["spearman"].notna()
    ]  # fmt: skip
    if held.empty:
        return ""
    parts = [
        f"{compare.one_panel(held, panel)['spearman'].iloc[0]:.2f} ({compare.panel_title(panel)})"
        for panel in compare.panels_of(held)
    ]
    return f"Spearman correlation of the two estimators: {captions.listed(parts)}."


def _control(rows: pd.DataFrame, neighbours: float) -> str:
    """State what the estimators find on manifolds of known dimension."""
    held = rows[rows["neighbours"] == neighbours]
    said = []
    for estimator, title in ESTIMATORS.items():
        mine = held[held["estimator"] == estimator]
        bias, rank = mine["bias"].dropna(), mine["spearman"].dropna()
        if len(bias) and len(rank):
            said.append(
                f"{title} is off by {bias.min():+.1f} to {bias.max():+.1f} and ranks rows with a Spearman correlation of at least "
                f"{rank.min():.2f} with the truth"
            )
    if not said:
        return ""
    true = held["true_dimension"].dropna()
    return (
        f"On as many rows of a union of spheres and tori of dimension {true.min():g} to {true.max():g}, in the width of the "
        f"activations and with small noise, {captions.listed(said)}."
    )


FIGURE = Figure(
    title="Latents against local dimension",
    draw=draw,
    needs=Need("evaluation.dimension of a source with SAEs whose L0 varies", Asked.dimension),
)
