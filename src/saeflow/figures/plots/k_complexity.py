"""Active latents against complexity scores and against local dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from saeflow.errors import UserError
from saeflow.evaluation.correlation import correlation, partial_correlation
from saeflow.figures import captions, style
from saeflow.figures.figure import Drawing, Figure
from saeflow.figures.needs import Need
from saeflow.figures.series import Series, each_setting, in_order, places_of, series_of, stroke
from saeflow.tables import compare, verdict
from saeflow.tables.load import Tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

_BINS = 8
_HEIGHT = 2.3  # inches


def draw(tables: Tables, options: Mapping[str, Any]) -> Drawing:
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
    compare.check_budgets(tables, shown, options)
    panels = sorted(set(zip(rows["source"], rows["hook_point"], rows["complexity"], strict=True)))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = style.new_figure(style.TEXT_WIDTH, _HEIGHT * lines + 0.5)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    legend: dict[str, Line2D] = {}
    places = places_of(tables)
    parts = []
    for ax, (source, hook_point, name) in zip(axes, panels, strict=False):
        held = compare.one_panel(rows, compare.Panel(source, hook_point, source))
        held = held[held["complexity"] == name]
        for one in series_of(held):
            parts.append(_binned(ax, one, "score", stroke(one, places), legend))
        ax.set_title(f"{source}: {name}")
        ax.set_xlabel("complexity score")
    for ax in axes[: len(panels)]:
        ax.set_ylabel("L0 over its mean")
        ax.grid(True)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    style.legend_below(figure, in_order(legend, places))
    data = pd.concat(parts, ignore_index=True)
    found = data.drop_duplicates(["run", "complexity"])
    caption = (
        f"Mean L0 of a context, over its mean across contexts, against the context's complexity score (the mean of its "
        f"rows, where each has one), in {_BINS} bins of equally many held-out contexts; bars are standard errors. Shown "
        "are the variants that choose k by input, darker shades for more active latents. Rank correlations over contexts "
        f"are {_span(found['spearman'])} for {len(found)} settings and scores, and {_span(found['partial'])} given the "
        "mean norm of a context's activations. "
        f"{captions.budget_sentence(shown)} {verdict.uninformed_sentence(tables)}"
    )
    return Drawing(figure, data, caption.strip())


def _span(values: pd.Series) -> str:
    """Say from where to where some correlations go; there are many, so the largest is not singled out."""
    known = values.dropna()
    return f"{known.min():.2f} to {known.max():.2f}" if len(known) else "not defined"


def _binned(
    ax: Axes, one: Series, x: str, stroke_of: dict[str, Any], legend: dict[str, Line2D]
) -> pd.DataFrame:
    """Draw one series as means of bins of equally many contexts; returns them."""
    from matplotlib.lines import Line2D

    found = []
    settings = sorted((s for _, s in each_setting(one.rows)), key=lambda s: s["l0"].mean())
    shades = style.shades(one.look.color, len(settings))
    for rows, shade in zip(settings, shades, strict=True):
        first = rows.sort_values("run").iloc[0]
        relative = rows["l0"] / rows["l0"].mean()
        order = np.argsort(rows[x].to_numpy(), kind="stable")
        spearman = correlation(rows[x].to_numpy(), rows["l0"].to_numpy())
        partial = partial_correlation(*(rows[name].to_numpy() for name in (x, "l0", "norm")))
        for number, held in enumerate(np.array_split(order, _BINS)):
            if not len(held):
                continue
            values = relative.to_numpy()[held]
            error = values.std(ddof=1) / np.sqrt(len(held)) if len(held) > 1 else 0.0
            found.append(
                {
                    "run": first["run"], "complexity": first["complexity"], "bin": number, "contexts": len(held),
                    x: rows[x].to_numpy()[held].mean(), "l0_over_mean": values.mean(), "error": error,
                    "spearman": spearman, "partial": partial,
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


FIGURE = Figure(
    title="Latents against complexity",
    draw=draw,
    needs=Need(
        "a run of the variant adaptive_k and evaluation.contexts_listed above 0",
        lambda asked: asked.variant("adaptive_k") and asked.evaluation["contexts_listed"] > 0,
    ),
)
