"""Sparse probes: what a few latents tell, beside a few neurons and the whole activation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from saeflow.errors import UserError
from saeflow.figures import captions, style
from saeflow.figures.figure import Drawing, Figure
from saeflow.figures.needs import Need
from saeflow.figures.series import each_setting, in_order, places_of, series_of, stroke
from saeflow.tables import compare
from saeflow.tables.load import Tables

if TYPE_CHECKING:
    from matplotlib.lines import Line2D

_HEIGHT = 2.5  # inches
_NEURONS = {"color": style.INK, "ls": ":", "marker": "."}
_CEILING = {"color": style.INK, "ls": "--"}


def draw(tables: Tables, options: Mapping[str, Any]) -> Drawing:
    """Accuracy of probes on k latents, mean over the source's questions, one panel per source.

    Raises:
        UserError: no SAE was probed, or runs differ in budget.
    """
    from matplotlib.lines import Line2D

    rows = tables.probing
    if rows.empty:
        raise UserError(
            "figures.names: probing needs evaluation.interpretability, the tables have no probes. Take probing out of "
            "figures.names in params.yaml."
        )
    shown = tables.wide[tables.wide["run"].isin(rows["run"])]
    compare.check_budgets(tables, shown, options)
    panels = compare.panels_of(rows)
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    width = style.COLUMN_WIDTH if columns == 1 else style.TEXT_WIDTH
    figure = style.new_figure(width, _HEIGHT * lines + 0.4)
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    legend: dict[str, Line2D] = {}
    places = places_of(tables)
    questions = []
    for ax, panel in zip(axes, panels, strict=False):
        held = compare.one_panel(rows, panel)
        latents = held[held["method"] == "latents"]
        for one in series_of(latents):
            stroke_of = stroke(one, places)
            for _, setting in each_setting(one.rows):
                means = setting.groupby("k")["accuracy"].mean()
                ax.plot(means.index, means, **stroke_of)
            legend.setdefault(one.label, Line2D([], [], **stroke_of))
        neurons = held[held["method"] == "neurons"].groupby("k")["accuracy"].mean()
        ax.plot(neurons.index, neurons, **_NEURONS)
        ax.axhline(held.loc[held["method"] == "activation", "accuracy"].mean(), lw=0.9, **_CEILING)
        ax.set_title(compare.panel_title(panel))
        ax.set_xlabel("latents of a probe (k)")
        ax.set_ylabel("accuracy")
        ax.set_xscale("log")
        ax.set_xticks(
            sorted(latents["k"].unique()), [f"{k:g}" for k in sorted(latents["k"].unique())]
        )
        ax.minorticks_off()
        ax.set_ylim(0.5, 1.01)
        ax.grid(True)
        names = held["task"].drop_duplicates()
        questions.append(f"{len(names)} questions of {panel[0]}: {captions.listed(names)}")
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    legend["neurons"] = Line2D([], [], **_NEURONS)  # type: ignore[arg-type]
    legend["whole activation"] = Line2D([], [], **_CEILING)  # type: ignore[arg-type]
    style.legend_below(figure, in_order(legend, places))
    caption = (
        "Accuracy on held-out rows of logistic regressions on the k latents whose mean activation differs most between yes "
        "and no, mean over questions; dotted, on k of the activation's own dimensions; dashed, on all of them. Yes and no are "
        f"equally many: 0.5 is chance. Asked are {'; '.join(questions)}. {captions.budget_sentence(shown)}"
    )
    keep = [
        "run",
        "source",
        "hook_point",
        "entry",
        "variant",
        "task",
        "method",
        "k",
        "train_rows",
        "test_rows",
    ]
    data: pd.DataFrame = rows[[*keep, "accuracy", "f1", "auc"]]
    return Drawing(figure, data, caption)


FIGURE = Figure(
    title="What a few latents tell",
    draw=draw,
    needs=Need(
        "evaluation.interpretability with probing", lambda asked: asked.interprets("probing")
    ),
)
