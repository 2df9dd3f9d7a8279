"""What k follows: the number of latents in use against complexity scores and against local dimension."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from saeflow.errors import UserError
from saeflow.figures import captions, style
from saeflow.figures import tables as read
from saeflow.figures.adaptivity import stroke
from saeflow.figures.drawing import Drawing

_BINS = 8
_HEIGHT = 2.3  # inches
_ESTIMATORS = {"mle": "maximum likelihood", "twonn": "TwoNN"}


def k_complexity(tables: read.Tables, options: Mapping[str, Any]) -> Drawing:
    """Mean L0 of held-out contexts against their complexity score, one panel per kind of score.

    Raises:
        UserError: no context has both.
    """
    keys = ["source", "hook_point", "context"]
    scores = tables.complexity[tables.complexity["split"] == "evaluation"]
    scores = scores.groupby([*keys, "complexity"])[["score"]].mean().reset_index()
    contexts = tables.contexts
    own = contexts["evaluated_on"] == contexts["source"]  # other sources' contexts have no scores
    choosing = contexts[contexts["k_hat"].notna() & own]
    rows = choosing.merge(scores, on=keys)
    rows = rows[rows.groupby("run")["l0"].transform("std") > 1e-6]
    if rows.empty:
        raise UserError(
            "figures.names: k_complexity needs a variant adaptive_k and evaluation.contexts_listed above 0, the "
            "tables have no context with a score and an L0. Take k_complexity out of figures.names in params.yaml."
        )
    shown = tables.wide[tables.wide["run"].isin(rows["run"])]
    read.check_budgets(tables, shown, options)
    panels = sorted(set(zip(rows["source"], rows["hook_point"], rows["complexity"], strict=True)))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = style.new_figure(style.TEXT_WIDTH, _HEIGHT * lines + 0.5)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    legend: dict[str, Line2D] = {}
    parts = []
    for ax, (source, hook_point, name) in zip(axes, panels, strict=False):
        held = read.one_panel(rows, read.Panel(source, hook_point, source))
        held = held[held["complexity"] == name]
        series = read.series_of(held)
        for one in series:
            parts.append(_binned(ax, one, "score", stroke(one, series), legend))
        ax.set_title(f"{source}: {name}")
        ax.set_xlabel("complexity score")
    for ax in axes[: len(panels)]:
        ax.set_ylabel("L0 over its mean")
        ax.grid(True)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    figure.legend(
        legend.values(),
        legend,
        loc="outside lower center",
        ncols=style.legend_columns(list(legend), style.TEXT_WIDTH),
    )
    data = pd.concat(parts, ignore_index=True)
    best = data.iloc[int(data["spearman"].abs().argmax())]
    caption = (
        f"Mean L0 of a context, over its mean across contexts, against the context's complexity score (the mean of its "
        f"rows, where each has one), in {_BINS} bins of equally many held-out contexts; bars are standard errors. Shown "
        "are the variants that choose k by input, darker shades for more active latents. The strongest rank "
        f"correlation over contexts is {best['spearman']:.2f} ({best['run']}, {best['complexity']}). "
        f"{captions.budget_sentence(shown)}"
    )
    return Drawing(figure, data, caption)


def _binned(
    ax: Axes, one: read.Series, x: str, stroke_of: dict[str, Any], legend: dict[str, Line2D]
) -> pd.DataFrame:
    """Draw one series as means of bins of equally many contexts; returns them."""
    found = []
    settings = sorted((s for _, s in read.each_setting(one.rows)), key=lambda s: s["l0"].mean())
    shades = style.shades(one.look.color, len(settings))
    for rows, shade in zip(settings, shades, strict=True):
        first = rows.sort_values("run").iloc[0]
        relative = rows["l0"] / rows["l0"].mean()
        order = np.argsort(rows[x].to_numpy(), kind="stable")
        spearman = rows[x].rank().corr(rows["l0"].rank())
        for number, held in enumerate(np.array_split(order, _BINS)):
            if not len(held):
                continue
            values = relative.to_numpy()[held]
            error = values.std(ddof=1) / np.sqrt(len(held)) if len(held) > 1 else 0.0
            found.append(
                {
                    "run": first["run"], "complexity": first["complexity"], "bin": number, "contexts": len(held),
                    x: rows[x].to_numpy()[held].mean(), "l0_over_mean": values.mean(), "error": error,
                    "spearman": spearman,
                }
            )  # fmt: skip
        own = pd.DataFrame(found[-_BINS:])
        own = own[own["run"] == first["run"]]
        ax.errorbar(
            own[x], own["l0_over_mean"], yerr=own["error"], capsize=1.6, elinewidth=0.7,
            **stroke_of | {"color": shade},
        )  # fmt: skip
        legend.setdefault(one.label, Line2D([], [], **stroke_of))
    return pd.DataFrame(found)


def k_dimension(tables: read.Tables, options: Mapping[str, Any]) -> Drawing:
    """Mean L0 of rows against the local intrinsic dimension around them, by estimator.

    Raises:
        UserError: no dimension was estimated.
    """
    rows = tables.dimension_bins
    rows = rows[rows.groupby("run")["l0"].transform("std") > 1e-6]
    if rows.empty:
        raise UserError(
            "figures.names: k_dimension needs evaluation.dimension and a variant whose L0 varies, the tables have "
            "none. Take k_dimension out of figures.names in params.yaml."
        )
    shown = tables.wide[tables.wide["run"].isin(rows["run"])]
    read.check_budgets(tables, shown, options)
    neighbours = rows["neighbours"].max()
    rows = rows[rows["neighbours"] == neighbours]
    panels = [(panel, estimator) for panel in read.panels_of(rows) for estimator in _ESTIMATORS]
    lines = len(panels) // 2
    figure = style.new_figure(style.TEXT_WIDTH, _HEIGHT * lines + 0.5)
    axes = figure.subplots(lines, 2, squeeze=False).ravel()
    legend: dict[str, Line2D] = {}
    for ax, (panel, estimator) in zip(axes, panels, strict=True):
        held = read.one_panel(rows, panel)
        held = held[held["estimator"] == estimator]
        series = read.series_of(held)
        for one in series:
            stroke_of = stroke(one, series)
            for _, setting in read.each_setting(one.rows):
                means = setting.groupby("bin")[["dimension", "l0"]].mean()
                ax.plot(means["dimension"], means["l0"] / means["l0"].mean(), **stroke_of)
            legend.setdefault(one.label, Line2D([], [], **stroke_of))
        ax.grid(True)
        ax.set_title(f"{read.panel_title(panel)}: {_ESTIMATORS[estimator]}")
        ax.set_xlabel("local intrinsic dimension")
        ax.set_ylabel("L0 over its mean")
    figure.legend(
        legend.values(),
        legend,
        loc="outside lower center",
        ncols=style.legend_columns(list(legend), style.TEXT_WIDTH),
    )
    caption = (
        "Mean L0 of held-out rows, over its mean, against the local intrinsic dimension around them, in ten bins of "
        f"equally many rows; the dimension is estimated from {neighbours:g} neighbours. Variants with a fixed k are left "
        f"out. {captions.budget_sentence(shown)}"
    )
    return Drawing(figure, rows, caption)
