"""Ridges: one histogram per setting, in rows: active latents per token, and how often latents fire."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from saeflow.errors import UserError
from saeflow.figures import captions, style
from saeflow.figures.series import each_setting, series_of, setting_label
from saeflow.tables import compare
from saeflow.tables.load import Tables
from saeflow.tables.schema import MEASURED_IDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RIDGE = 0.19  # inches per row
_LINE = 0.14  # inches, of a title
_LONGEST_TITLE = 34  # characters
_GAP = 0.45  # rows between series
_FULL = 0.84  # height of a ridge's largest bin, in rows
_KEYS = ["source", "hook_point", "entry", "setting"]


def histograms_of(
    tables: Tables, options: Mapping[str, Any], histogram: str, figure: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The SAEs that have a histogram, and its bins with counts pooled over seeds."""
    bins = tables.histograms
    bins = bins[(bins["histogram"] == histogram) & compare.is_sae(bins)]
    wide = tables.wide
    rows = wide[wide["run"].isin(bins["run"])]
    if len(rows):
        rows = compare.of_one_size(rows)
        bins = bins[bins["run"].isin(rows["run"])]
    else:
        raise UserError(
            f"figures.names: {figure} needs SAEs with the histogram {histogram}, the tables have none. "
            f"Take {figure} out of figures.names in params.yaml."
        )
    compare.check_budgets(tables, rows, options)
    return rows, bins


def closing(rows: pd.DataFrame) -> str:
    count = captions.seeds(rows)
    pooled = "" if count == "1" else f"Counts of {count} seeds are pooled. "
    return f"{pooled}{captions.size_sentence(rows)} {captions.budget_sentence(rows)} {captions.rows_sentence(rows)}"


def bins_with(rows: pd.DataFrame, bins: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """The bins of every run, with the metrics that are drawn beside them."""
    columns = [*MEASURED_IDS, "setting", "histogram", "left", "right", "count"]
    return bins[columns].merge(rows[["run", *metrics]], on="run", how="left", validate="m:1")


@dataclass(frozen=True)
class Ridge:
    """One setting: its runs, its label, and where its base line is (in rows, from the bottom)."""

    label: str
    rows: pd.DataFrame
    base: float


def _place(rows: pd.DataFrame) -> list[Ridge]:
    """The settings of a panel from the top down, with a gap between series."""
    found: list[tuple[str, pd.DataFrame, float]] = []
    depth = 0.0
    for series in series_of(rows):
        settings = list(each_setting(series.rows))
        if series.rows["k"].isna().any():
            settings.sort(key=lambda item: item[1]["l0_mean"].mean())
        depth += _GAP if found else 0.0
        for number, (_, held) in enumerate(settings):
            setting = setting_label(held.iloc[0])
            label = ", ".join(filter(None, [series.label, setting]))
            found.append((label if number == 0 or not setting else setting, held, depth))
            depth += 1
    bottom = max(depth - 1, 0.0)
    return [Ridge(label, held, bottom - place) for label, held, place in found]


def draw_ridges(
    rows: pd.DataFrame,
    bins: pd.DataFrame,
    finish: Callable[[Axes, compare.Panel, list[Ridge]], None],
    shift: float,
    pad: float,
) -> Figure:
    """One panel per source and hook point, one ridge per setting.

    Args:
        rows: runs.
        bins: their histograms.
        finish: draws what is particular to the figure.
        shift: added to the edges of the bins.
        pad: points between a panel and its title.
    """
    panels = compare.panels_of(rows)
    placed = [_place(compare.one_panel(rows, panel)) for panel in panels]
    tops = [max(ridges[0].base, 1) + 1 for ridges in placed]
    titles = [_title(panel) for panel in panels]
    heights = [
        top * _RIDGE + 0.62 + _LINE * title.count("\n")
        for top, title in zip(tops, titles, strict=True)
    ]
    columns: list[list[int]] = [[], []] if len(panels) > 1 else [[]]
    for place in range(len(panels)):  # each panel below the shorter column
        min(columns, key=lambda column: sum(heights[i] for i in column)).append(place)
    longest = max(sum(heights[i] for i in column) for column in columns)
    width = style.TEXT_WIDTH if len(columns) > 1 else style.COLUMN_WIDTH
    figure = style.new_figure(width, longest + 0.05)
    axes: dict[int, Axes] = {}
    parts = figure.subfigures(1, len(columns), squeeze=False).ravel()
    for part, column in zip(parts, columns, strict=True):
        rest = longest - sum(heights[i] for i in column)
        ratios = [*(tops[i] * _RIDGE for i in column), *([rest] if rest > 0 else [])]
        drawn = part.subplots(len(ratios), 1, squeeze=False, height_ratios=ratios).ravel()
        for ax in drawn[len(column) :]:
            ax.set_axis_off()
        axes |= zip(column, drawn, strict=False)
    for place, (panel, ridges) in enumerate(zip(panels, placed, strict=True)):
        ax = axes[place]
        for ridge in ridges:
            first = ridge.rows.iloc[0]
            color = style.look(first["variant"], first["entry"]).color
            pooled = pool(bins[bins["run"].isin(ridge.rows["run"])])
            _ridge(ax, ridge.base, pooled, color, shift)
        ax.set_ylim(-0.12, tops[place])
        ax.set_yticks([r.base for r in ridges], [r.label for r in ridges], va="bottom")
        ax.tick_params(axis="y", length=0, pad=2)
        ax.spines["left"].set_visible(False)
        ax.grid(True, axis="x")
        ax.grid(False, axis="y")
        ax.set_title(titles[place], pad=pad)
        finish(ax, panel, ridges)
    return figure


def _title(panel: compare.Panel) -> str:
    """A panel's name, on two lines where half a page is too narrow for it."""
    name = compare.panel_title(panel)
    return name if len(name) <= _LONGEST_TITLE else name.replace(", ", ",\n", 1)


def pool(bins: pd.DataFrame) -> pd.Series:
    """Counts by (left, right), summed over runs, whose bins may differ in width.

    All become as wide as the widest: a bin starts at a multiple of its width, and widths are powers of two
    of each other, so none is cut.
    """
    width = (bins["right"] - bins["left"]).max()
    left = np.floor(bins["left"] / width) * width
    return bins["count"].groupby([left, (left + width).rename("right")]).sum()


def _ridge(ax: Axes, base: float, pooled: pd.Series, color: str, shift: float) -> None:
    """One histogram as a filled outline on its base line."""
    ax.axhline(base, color=style.FAINT, lw=0.4, zorder=1)
    if pooled.empty or pooled.max() <= 0:
        return
    left = np.array([edges[0] for edges in pooled.index]) + shift
    right = np.array([edges[1] for edges in pooled.index]) + shift
    heights = _FULL * pooled.to_numpy() / pooled.max()
    x = np.concatenate([[left[0]], np.stack([left, right], 1).ravel(), [right[-1]]])
    if shift:
        x = np.maximum(x, 1e-3)  # rows without an active latent reach the left edge of a log axis
    y = np.concatenate([[0], np.repeat(heights, 2), [0]])
    ax.fill_between(x, base, base + y, color=color, alpha=0.35, lw=0, zorder=3)
    ax.plot(x, base + y, color=color, lw=0.8, zorder=4, solid_joinstyle="miter")
