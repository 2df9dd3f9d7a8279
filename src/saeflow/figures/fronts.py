"""Fronts: a measure of quality against how many latents fire, one line per series, seeds as error bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from saeflow.errors import UserError
from saeflow.figures import captions, style
from saeflow.figures.series import Places, Series, marker_of, places_of, series_of, stroke
from saeflow.tables import compare
from saeflow.tables.load import Tables
from saeflow.tables.runs import RANDOM_DECODER
from saeflow.tables.schema import MEASURED_IDS, axis_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOG_FROM = 6.0  # a quality axis whose largest value is this many times its least is logarithmic
_MARKER_SIZES = {"*": 6.5, "X": 4.8, "P": 4.8, "h": 4.8, ".": 6.0, "D": 3.4}
_HIDES = 2.0
"""Points of distance below which a mark hides another."""
_PANEL_HEIGHT = 2.15  # inches


def compared(tables: Tables, options: Mapping[str, Any], metric: str, figure: str) -> pd.DataFrame:
    """Return the runs of all sources whose SAEs have a metric.

    Raises:
        UserError: there are none, or runs differ in budget.
    """
    panels = compare.panels_with(tables, metric)
    if not panels:
        raise UserError(
            f"figures.names: {figure} needs SAEs with the metric {metric}, the tables have none. "
            f"Take {figure} out of figures.names in params.yaml, or add a source that has it."
        )
    wide = tables.wide
    held = pd.concat([compare.one_panel(wide, panel) for panel in panels])
    held = held[held[metric].notna() & held["l0_mean"].notna()]
    held = _in_sight(compare.of_one_size(held))
    compare.check_budgets(tables, held, options)
    known = tables.intervals[tables.intervals["metric"] == metric][["run", "low", "high"]]
    return held.merge(known, on="run", how="left") if len(known) else held


def _in_sight(rows: pd.DataFrame) -> pd.DataFrame:
    """Leave out PCA where its line does not reach the L0 of a panel's SAEs."""
    kept = []
    for panel in compare.panels_of(rows):
        own = compare.one_panel(rows, panel)
        is_pca = own["variant"] == "pca"
        low, high, _ = _visible(own)
        ranks = own.loc[is_pca, "l0_mean"]
        kept.append(own if (ranks.min() <= high) and (ranks.max() >= low) else own[~is_pca])
    return pd.concat(kept)


def saes_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of trained SAEs."""
    return rows[compare.is_sae(rows)]


def panels_sentence(rows: pd.DataFrame) -> str:
    """Name the panels, with the number of latents of each one's SAEs."""
    titles = [
        f"{compare.panel_title(panel)} ({saes_of(compare.one_panel(rows, panel))['d_sae'].iloc[0]:,.0f} latents)"
        for panel in compare.panels_of(rows)
    ]
    return (
        f"for {titles[0]}" if len(titles) == 1 else f"one panel each for {captions.listed(titles)}"
    )


def baseline_sentence(rows: pd.DataFrame, metric: str) -> str:
    """Name the baselines that are drawn, and those that would not be visible."""
    found = []
    if rows["entry"].str.contains(RANDOM_DECODER, regex=False).any():
        found.append("SAEs whose random decoder stays untrained")
    if (rows["variant"] == "pca").any():
        found.append("PCA that keeps as many directions as the axis says")
    if (rows["variant"] == "mean").any():
        found.append("the mean activation in place of every row (horizontal line)")
    text = f"In grey: {captions.listed(found)}." if found else ""
    if (rows["variant"] == "identity").any():
        text += f" The identity (not drawn) has {_name(metric)} 0."
    return f"{text} A mark that lies under another is drawn once more, large and open around it."


def _name(metric: str) -> str:
    """Return a metric's name on axes, without its unit."""
    return axis_label(metric).partition(" (")[0]


def draw_fronts(
    tables: Tables,
    rows: pd.DataFrame,
    panels: Sequence[tuple[compare.Panel, str]],
    *,
    of_truth: bool = False,
) -> tuple[Figure, pd.DataFrame]:
    """Draw panels of (source and hook point, metric).

    Args:
        tables: decide how a series looks in every figure.
        rows: what `compared` returns.
        panels: in order; those of one metric have one kind of scale.
        of_truth: the metrics compare SAEs with a true dictionary: they are between 0 and 1, and a dashed line marks
            the true mean L0.

    Returns:
        The figure and the plotted numbers.
    """
    from matplotlib.lines import Line2D

    columns = 1 if len(panels) == 1 and not of_truth else 2
    lines = -(-len(panels) // columns)
    drawn = rows[rows["variant"] != "identity"]
    series = {panel: series_of(compare.one_panel(drawn, panel)) for panel, _ in panels}
    strokes = _strokes([one for held in series.values() for one in held], places_of(tables))
    logarithmic = {metric: _is_logarithmic(drawn, metric) for _, metric in panels}
    legend = [Line2D([], [], label=label, **stroke) for label, stroke in strokes.items()]
    width = style.COLUMN_WIDTH if columns == 1 else style.TEXT_WIDTH
    per_line = style.legend_columns(list(strokes), width)
    free = lines * columns - len(panels)  # cells of the last row: the legend goes into one
    height = lines * _PANEL_HEIGHT + (0.1 if free else 0.16 * -(-len(legend) // per_line) + 0.1)
    figure = style.new_figure(width, height)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax, (panel, metric) in zip(axes, panels, strict=False):
        _panel(
            ax,
            series[panel],
            metric,
            strokes,
            of_truth,
            logarithmic[metric],
            captions.is_seeded(rows),
        )
        ax.set_title(compare.panel_title(panel))
        ax.set_xlabel(compare.panel_axis("l0_mean", panel))
        label = compare.panel_axis(metric, panel)
        ax.set_ylabel(label.replace(" (", "\n(") if len(label) > 30 else label)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    if free:
        axes[len(panels)].legend(handles=legend, loc="center", ncols=2, fontsize=6.5)
    else:
        figure.legend(handles=legend, loc="outside lower center", ncols=per_line)
    return figure, _data(rows, list(dict.fromkeys(metric for _, metric in panels)), of_truth)


def _data(rows: pd.DataFrame, metrics: list[str], of_truth: bool) -> pd.DataFrame:
    """One line per run: its values, and the mean and deviation over the seeds of its setting."""
    columns = ["l0_mean", *metrics]
    extra = ["true_l0_mean"] if of_truth and "true_l0_mean" in rows else []
    extra += [column for column in ("low", "high") if column in rows]
    own = rows[[*MEASURED_IDS, "setting", *extra, *columns]]
    keys = [*compare.Panel._fields, "entry", "setting"]
    return own.merge(compare.over_seeds(rows, columns), on=keys, how="left", validate="m:1")


def _strokes(series: Sequence[Series], places: Places) -> dict[str, dict[str, Any]]:
    """Line and marker of each label, in the legend's order.

    A variant keeps its colour; its second label has broken lines and its marker open, further ones open markers of
    other shapes.
    """
    strokes: dict[str, dict[str, Any]] = {}
    by_label = {one.label: one for one in series}
    for label in sorted(by_label, key=list(places).index):
        one, place = by_label[label], places[label]
        color = one.look.color
        if one.rows["variant"].iloc[0] == "mean":
            strokes[label] = {"color": color, "linewidth": 1.2}
            continue
        marker = marker_of(one, places)
        strokes[label] = stroke(one, places) | {
            "markersize": _MARKER_SIZES.get(marker, 4.0),
            "markeredgecolor": color if place else "white",
            "markeredgewidth": 0.8 if place else 0.4,
        }
    return strokes


def _panel(
    ax: Axes,
    series: Sequence[Series],
    metric: str,
    strokes: Mapping[str, Mapping[str, Any]],
    of_truth: bool,
    is_logarithmic: bool,
    is_seeded: bool,
) -> None:
    ax.grid(True)
    rows = pd.concat([one.rows for one in series])
    for one in sorted(series, key=lambda one: -strokes[one.label].get("markersize", 0)):
        if one.rows["variant"].iloc[0] == "mean":  # small marks lie on large ones
            ax.axhline(float(one.rows[metric].mean()), zorder=1.5, **strokes[one.label])
        else:
            _line(ax, one.rows, metric, one.look, strokes[one.label], is_seeded)
    _scale(ax, rows, metric, of_truth, is_logarithmic)
    _show_hidden(ax)
    if of_truth and "true_l0_mean" in rows:
        ax.axvline(float(rows["true_l0_mean"].mean()), color=style.INK, lw=0.8, ls=(0, (4, 2)))


def _show_hidden(ax: Axes) -> None:
    """Draw a mark that lies under another once more, large and open around it."""
    from matplotlib.container import ErrorbarContainer

    lines = [held.lines[0] for held in ax.containers if isinstance(held, ErrorbarContainer)]
    points = [np.asarray(line.get_xydata(), dtype=float).reshape(-1, 2) for line in lines]
    places = [ax.transData.transform(own) for own in points]
    for number, (line, own) in enumerate(zip(lines, places, strict=True)):
        above = [place for place in places[number + 1 :] if len(place)]
        if not above or not len(own):
            continue
        distance = np.linalg.norm(own[:, None] - np.concatenate(above)[None], axis=2).min(1)
        hidden = distance * 72 / ax.figure.dpi < _HIDES
        ax.plot(
            *points[number][hidden].T, ls="none", marker=line.get_marker(), color=line.get_color(),
            ms=2 * _MARKER_SIZES.get(str(line.get_marker()), 4.0), mfc="none", mew=0.7, zorder=4,
        )  # fmt: skip


def _line(
    ax: Axes,
    rows: pd.DataFrame,
    metric: str,
    look: style.Look,
    stroke: Mapping[str, Any],
    is_seeded: bool,
) -> None:
    """Mean and error of each setting, joined in order of L0; the seeds behind them."""
    points = compare.over_seeds(rows, ["l0_mean", metric]).sort_values("l0_mean_seed_mean")
    baseline = look in style.BASELINES.values()
    if rows["seed"].nunique() > 1:
        ax.plot(
            rows["l0_mean"], rows[metric], ls="none", marker=look.marker, ms=2.6, mew=0, alpha=0.3,
            color=look.color, zorder=2,
        )  # fmt: skip
    ax.errorbar(
        points["l0_mean_seed_mean"], points[f"{metric}_seed_mean"],
        xerr=points["l0_mean_seed_sd"].fillna(0) if is_seeded else None, yerr=_spread(rows, points, metric, is_seeded),
        elinewidth=0.8, capsize=1.6, capthick=0.8, zorder=2.5 if baseline else 3, **stroke,
    )  # fmt: skip


def _spread(rows: pd.DataFrame, points: pd.DataFrame, metric: str, is_seeded: bool) -> np.ndarray:
    """(2, settings) below and above: deviations over seeds where all SAEs of the figure have several, else intervals.

    Of a setting with several seeds the interval's bounds are means over them.
    """
    if is_seeded or "low" not in rows:
        return np.stack([points[f"{metric}_seed_sd"].fillna(0)] * 2)
    sides = {"below": rows[metric] - rows["low"], "above": rows["high"] - rows[metric]}
    means = pd.DataFrame(sides).groupby(rows["setting"]).mean().loc[points["setting"]]
    return means.fillna(0).to_numpy().T.clip(min=0)


def _visible(rows: pd.DataFrame) -> tuple[float, float, pd.DataFrame]:
    """The span of L0 that holds every SAE of a panel, and its rows that lie in it or have no L0 of their own."""
    own = rows.loc[compare.is_sae(rows) & (rows["l0_mean"] > 0), "l0_mean"]
    low, high = (own.min() / 1.35, own.max() * 1.35) if len(own) else (0.7, 10.0)
    return low, high, rows[(rows["variant"] == "mean") | rows["l0_mean"].between(low, high)]


def _is_logarithmic(rows: pd.DataFrame, metric: str) -> bool:
    """Tell whether a metric's axes are logarithmic: where some panel spans much, and none goes down to 0."""
    spans = [
        _visible(compare.one_panel(rows, panel))[2][metric] for panel in compare.panels_of(rows)
    ]
    spans = [span.dropna() for span in spans if span.notna().any()]
    return all(span.min() > 0 for span in spans) and any(
        span.max() / span.min() > _LOG_FROM for span in spans
    )


def _drawn(rows: pd.DataFrame, metric: str) -> np.ndarray:
    """A metric's values with the bounds of their intervals."""
    columns = [metric, *(name for name in ("low", "high") if name in rows)]
    values: np.ndarray = rows[columns].to_numpy(dtype=float)
    finite: np.ndarray = values[np.isfinite(values)]
    return finite


def _crossing(rows: pd.DataFrame, metric: str, low: float, high: float) -> np.ndarray:
    """Values at which lines of baselines enter and leave the span of L0; their points may all lie outside."""
    found: list[float] = []
    for _, line in rows[~compare.is_sae(rows) & (rows["l0_mean"] > 0)].groupby("entry"):
        points = line.dropna(subset=[metric]).groupby("l0_mean")[metric].mean()
        ends = [
            end for end in (low, high) if len(points) and points.index[0] <= end <= points.index[-1]
        ]
        found += [float(np.interp(np.log(end), np.log(points.index), points)) for end in ends]
    return np.array(found)


def _scale(ax: Axes, rows: pd.DataFrame, metric: str, of_truth: bool, is_logarithmic: bool) -> None:
    """Axes that hold every SAE, and of the baselines what lies at the SAEs' L0."""
    low, high, visible = _visible(rows)
    style.l0_axis(ax, float(low), float(high))
    if of_truth:
        ax.set_ylim(0, 1.06)  # a mark at 1 is whole
        return
    held = np.concatenate([_drawn(visible, metric), _crossing(rows, metric, low, high)])
    held = held[held > 0] if is_logarithmic else held
    bottom, top = float(held.min()), float(held.max())
    if is_logarithmic:
        style.log_axis(ax, "y", bottom / 1.25, top * 1.25)
    else:
        span = top - min(bottom, 0) or 1.0
        ax.set_ylim(0 if bottom >= 0 else bottom - 0.06 * span, top + 0.06 * span)
        if bottom < 0:
            ax.axhline(0, color=style.FAINT, lw=0.8, zorder=1)
