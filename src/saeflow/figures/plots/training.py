"""Training curves: one page for all sources, and pages with one row of panels per series."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from saeflow.errors import UserError
from saeflow.figures import captions, style
from saeflow.figures.figure import Drawing, Figure
from saeflow.figures.needs import TRAINED
from saeflow.figures.series import (
    Places,
    Series,
    each_setting,
    in_order,
    places_of,
    series_of,
    setting_label,
    stroke,
)
from saeflow.tables import compare
from saeflow.tables.load import Tables
from saeflow.tables.schema import IDS, axis_label

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

_KNOWN = (
    *IDS, "k_target", "setting", "series", "step", "tokens_seen", "loss", "batch_fvu", "l0", "dead", "lr",
    "tokens_per_s",
)  # fmt: skip
_RECONSTRUCTION = "reconstruction"
_ROUNDING = 1e-6  # of sums in float32, relative to the loss
_SCHEDULE: dict[str, Any] = {"color": "#CDCDCD", "lw": 3.0, "solid_capstyle": "butt"}


def draw(tables: Tables, options: Mapping[str, Any]) -> Drawing:
    """Losses, active latents with the k-schedule, and dead latents over training tokens.

    Raises:
        UserError: no run logged a step, or runs differ in budget.
    """
    steps = tables.training
    if steps.empty:
        raise UserError(
            "figures.names: training needs logged steps, training.csv has none. "
            "Take training out of figures.names in params.yaml."
        )
    wide = tables.wide
    compare.check_budgets(tables, wide[wide["run"].isin(steps["run"])], options)
    steps = compare.of_one_size(steps)
    terms = loss_terms(steps)
    ids = ["k_target" if column == "k" else column for column in IDS]
    shown = [c for c in ("loss", _RECONSTRUCTION, *terms, "l0", "k", "dead") if c in steps]
    data = steps[[*ids, "setting", "step", "tokens_seen", *shown]]
    return Drawing(
        _draw(steps, places_of(tables)),
        data,
        _caption(steps, terms, tables.options),
        tuple(_details(steps, terms)),
    )


def loss_terms(steps: pd.DataFrame) -> list[str]:
    """Loss terms besides the reconstruction: the columns that, added to it, give the loss.

    Variants log other numbers too (k, a threshold, a penalty's weight) under names of their own; the
    sum tells them apart. A term below a millionth of the loss may be missed.
    """
    found: set[str] = set()
    if {"loss", _RECONSTRUCTION} <= set(steps.columns):
        for _, entry in steps.groupby(["entry", "variant"]):
            found |= _summands(entry[entry["run"] == entry["run"].iloc[0]])
    return [column for column in steps.columns if column in found]


def _summands(run: pd.DataFrame) -> set[str]:
    """The smallest set of columns that makes up the loss of every logged step of one run.

    A term that a run has in some steps only (SoftSAE's budget) is 0 in the others.
    """
    others = [
        column
        for column in run.columns
        if column not in (*_KNOWN, _RECONSTRUCTION)
        and pd.api.types.is_numeric_dtype(run[column])
        and run[column].fillna(0).ne(0).any()
    ]
    rest = run["loss"] - run[_RECONSTRUCTION]
    for size in range(len(others) + 1):
        for chosen in itertools.combinations(others, size):
            gap = (rest - run[list(chosen)].fillna(0).sum(axis=1)).abs().max()
            if gap <= _ROUNDING * run["loss"].abs().max():
                return set(chosen)
    return set()


def _caption(steps: pd.DataFrame, terms: list[str], options: pd.DataFrame) -> str:
    other = " and other loss terms" if terms else ""
    return (
        "Training over tokens, one line for each setting (its first seed): reconstruction loss over that of the first "
        "logged step, active latents per token, and share of latents that count as dead. The appendix has the losses "
        f"themselves (per row, summed over its dimensions){other} by kind of SAE, on axes of their own, every seed, and the k that "
        f"the schedule allows. Logged during training, on training batches. {captions.scale_sentence(steps, options)} "
        f"{captions.size_sentence(steps)} {captions.budget_sentence(steps)}"
    )


_SUMMARY = ("reconstruction", "l0", "dead")
_MOST_ROW, _ROW, _TITLES = 1.7, 0.9, 0.75
"""Inches: of a row of the figure at most, of a row of details, and around the rows of a page."""


def _draw(steps: pd.DataFrame, places: Places) -> Canvas:
    """One row of panels per source and hook point, on one page."""
    from matplotlib.lines import Line2D

    panels = compare.panels_of(steps)
    legend: dict[str, Artist] = {}
    series = {panel: series_of(compare.one_panel(steps, panel)) for panel in panels}
    labels = {one.label for held in series.values() for one in held}
    below = 0.16 * -(-len(labels) // style.legend_columns(sorted(labels), style.TEXT_WIDTH)) + 0.2
    row = min(_MOST_ROW, (style.PAGE_HEIGHT - below) / len(panels))
    figure = style.new_figure(style.TEXT_WIDTH, row * len(panels) + below)
    grid = figure.subplots(len(panels), len(_SUMMARY), squeeze=False)
    titles = ("reconstruction loss over its first", "active latents (L0)", axis_label("dead"))
    for line, panel in zip(grid, panels, strict=True):
        axes = dict(zip(_SUMMARY, line, strict=True))
        for one in series[panel]:
            drawn = stroke(one, places) | {"marker": ""}
            legend.setdefault(one.label, Line2D([], [], **drawn))
            for _, held, color in _settings(one):
                run = held[held["run"] == held["run"].iloc[0]]
                lost = run[_RECONSTRUCTION if _RECONSTRUCTION in run else "loss"]
                values = (lost / lost.iloc[0], run["l0"], run["dead"])
                for ax, value in zip(line, values, strict=True):
                    ax.plot(run["tokens_seen"], value, **drawn | _line_of(run, color))
        for name, ax in axes.items():
            _finish([ax], name)
            ax.set_xlabel(compare.panel_axis("tokens_seen", panel))
        for ax, title in zip(line, titles, strict=True):
            ax.set_ylabel(title.replace(" over", "\nover"))
        line[0].set_title(compare.panel_title(panel))
    style.legend_below(figure, in_order(legend, places))
    return figure


def _details(steps: pd.DataFrame, terms: list[str]) -> Iterator[Canvas]:
    """Yield pages of each source and hook point: one row of panels per series."""
    most = int((style.PAGE_HEIGHT - _TITLES) / _ROW)
    for panel in compare.panels_of(steps):
        block = series_of(compare.one_panel(steps, panel))
        pages = -(-len(block) // most)
        each = -(-len(block) // pages)
        for page in range(pages):
            rows = block[page * each : (page + 1) * each]
            figure = style.new_figure(style.TEXT_WIDTH, _ROW * len(rows) + _TITLES)
            part = f", {page + 1} of {pages}" if pages > 1 else ""
            figure.suptitle(
                compare.panel_title(panel) + part, x=0.01, ha="left", fontsize=8, fontweight="bold"
            )
            _block(figure, panel, rows, terms)
            yield figure


def _block(part: Canvas, panel: compare.Panel, block: list[Series], terms: list[str]) -> None:
    terms = [
        term for term in terms if any(series.rows[term].fillna(0).ne(0).any() for series in block)
    ]
    columns = ["reconstruction", *(["terms"] if terms else []), "l0", "dead"]
    grid = part.subplots(
        len(block), len(columns) + 1, squeeze=False, sharex="col",
        width_ratios=[*[1.0] * len(columns), 1.15],
    )  # fmt: skip
    for line, series in zip(grid, block, strict=True):
        _row(dict(zip(columns, line, strict=False)), series, terms)
        line[-1].set_axis_off()
        handles = _legend(series)
        legend = line[-1].legend(
            handles=handles, title=series.label.replace(" (", "\n("), loc="center left", alignment="left",
            bbox_to_anchor=(-0.08, 0.5), title_fontsize=7, fontsize=6.5, borderpad=0,
            ncols=1 if any(len(str(handle.get_label())) > 8 for handle in handles) else 2,
            handlelength=1.1, handletextpad=0.4, columnspacing=0.7,
        )  # fmt: skip
        legend.set_in_layout(False)
    titles = {
        "reconstruction": axis_label("reconstruction"), "terms": "other loss terms",
        "l0": "active latents (L0)", "dead": axis_label("dead"),
    }  # fmt: skip
    for column, name in enumerate(columns):
        grid[0, column].set_title(titles[name])
        grid[-1, column].set_xlabel(compare.panel_axis("tokens_seen", panel))
        own = [line[column] for line in grid]
        if name in ("reconstruction", "terms"):  # whose sizes differ from SAE to SAE
            for ax in own:
                _finish([ax], name)
            continue
        for ax in own[1:]:
            ax.sharey(own[0])
        _finish(own, name)


def _line_of(run: pd.DataFrame, color: Any) -> dict[str, Any]:
    """Return how a run's values are drawn: as a line, and those of one logged step as a point."""
    return {"color": color, "lw": 0.8, "marker": "." if len(run) == 1 else ""}


def _settings(series: Series) -> list[tuple[str, pd.DataFrame, Any]]:
    """Label, steps and shade of each setting, those with the fewest active latents first."""
    settings = [held for _, held in each_setting(series.rows)]
    settings.sort(key=lambda held: held.groupby("run").tail(1)["l0"].mean())
    colors = style.shades(series.look.color, len(settings))
    labels = [setting_label(held.iloc[0], "k_target") for held in settings]
    return list(zip(labels, settings, colors, strict=True))


def _row(axes: dict[str, Axes], series: Series, terms: list[str]) -> None:
    from matplotlib.lines import Line2D

    loss = _RECONSTRUCTION if _RECONSTRUCTION in series.rows else "loss"
    own = [term for term in terms if series.rows[term].fillna(0).ne(0).any()]
    for _, held, color in _settings(series):
        for _, run in held.groupby("run"):
            x, stroke = run["tokens_seen"], _line_of(run, color)
            axes["reconstruction"].plot(x, run[loss], **stroke)
            axes["l0"].plot(x, run["l0"], **stroke)
            axes["dead"].plot(x, run["dead"], **stroke)
            for i, term in enumerate(own):
                shown = run[term].where(run[term] > 0)
                axes["terms"].plot(x, shown, ls=style.LINE_STYLES[i % 4], **stroke)
        first = held[held["run"] == held["run"].iloc[0]]
        if "k" in first and first["k"].notna().any():
            axes["l0"].plot(first["tokens_seen"], first["k"], zorder=1.5, **_SCHEDULE)
    if terms and own:
        axes["terms"].legend(
            handles=[
                Line2D([], [], color=style.INK, lw=0.8, ls=style.LINE_STYLES[i % 4], label=term)
                for i, term in enumerate(own)
            ],
            loc="best", fontsize=6, handlelength=1.6, borderpad=0.1,
        )  # fmt: skip
    elif terms:
        axes["terms"].set_visible(False)


def _legend(series: Series) -> list[Line2D]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=color, lw=1.4, label=label)
        for label, _, color in _settings(series)
        if label
    ]
    if "k" in series.rows and series.rows["k"].notna().any():
        handles.append(Line2D([], [], label="schedule", **_SCHEDULE))
    return handles


def _finish(axes: list[Axes], name: str) -> None:
    """Scales and ticks of one column, whose axes are shared."""
    from matplotlib.ticker import NullLocator

    lines = [line for ax in axes for line in ax.lines]
    if not lines:
        return
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in lines])
    values = values[np.isfinite(values)]
    positive = values[values > 0]
    low, high = (float(positive.min()), float(positive.max())) if len(positive) else (1.0, 1.0)
    first = axes[0]  # the others share its scale
    if name == "l0":
        style.log_axis(first, "y", max(0.6, low / 1.4), high * 1.4)
    elif name != "dead" and high / low > 6:
        above = 3.0 if name == "terms" else 1.3  # the legend stands there
        style.log_axis(first, "y", max(low, high / 1e5) / 1.3, high * above)
    else:
        above = 1.4 if name == "terms" else 1.08
        first.set_ylim(
            0, max(0.1 if name == "dead" else 0.0, high * above if len(positive) else 0.1)
        )
        style.even_ticks(first.yaxis, 4)
    first.yaxis.set_minor_locator(NullLocator())
    style.even_ticks(first.xaxis, 3)
    first.set_xlim(left=0)
    for ax in axes:
        ax.grid(True)


FIGURE = Figure(title="Training", draw=draw, needs=TRAINED)
