"""Fronts: a measure of quality against how many latents fire, one line per series, seeds as error bars."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from saeflow.errors import UserError
from saeflow.evaluation.tables import MEASURED_IDS
from saeflow.figures import captions, style
from saeflow.figures import tables as read
from saeflow.figures.drawing import Drawing

_LOG_FROM = 6.0  # a quality axis whose largest value is this many times its least is logarithmic
_MARKER_SIZES = {"*": 6.5, "X": 4.8, "P": 4.8, "h": 4.8, ".": 6.0, "D": 3.4}
_TWINS = ("s", "^", "D", "v", "p")
"""Open markers of a variant's third, fourth ... label in a figure."""
_PANEL_HEIGHT = 2.15  # inches


def fvu_l0(tables: read.Tables, options: Mapping[str, Any]) -> Drawing:
    """Fraction of variance unexplained against mean L0, one panel per source and hook point.

    Raises:
        UserError: no SAE has both measured, or runs differ in budget.
    """
    rows = _rows(tables, options, "fvu", "fvu_l0")
    figure, data = _draw(rows, [(panel, "fvu") for panel in read.panels_of(rows)])
    caption = (
        f"Fraction of variance unexplained (FVU) against the mean number of active latents per token, "
        f"{_where(rows)}. {captions.seed_sentence(_saes(rows))} {_baseline_sentence(rows, 'fvu')} "
        f"{captions.budget_sentence(rows)} {captions.rows_sentence(rows)}"
    )
    return Drawing(figure, data, " ".join(caption.split()))


def ce_l0(tables: read.Tables, options: Mapping[str, Any]) -> Drawing:
    """Cross-entropy degradation against mean L0, one panel per source with a language model.

    Raises:
        UserError: no SAE has both measured, or runs differ in budget.
    """
    rows = _rows(tables, options, "ce_degradation", "ce_l0")
    figure, data = _draw(rows, [(panel, "ce_degradation") for panel in read.panels_of(rows)])
    clean = [
        f"{held['ce_clean'].iloc[0]:.3f} nats/token ({read.panel_title(panel)})"
        for panel in read.panels_of(rows)
        if "ce_clean" in (held := read.one_panel(rows, panel))
    ]
    caption = (
        f"Rise of the model's cross-entropy when reconstructions take the place of the activations, "
        f"against the mean number of active latents per token, {_where(rows)}. "
        + (f"Cross-entropy of the unchanged model: {captions.listed(clean)}. " if clean else "")
        + f"{captions.seed_sentence(_saes(rows))} {_baseline_sentence(rows, 'ce_degradation')} "
        f"{captions.budget_sentence(rows)} {captions.rows_sentence(rows, cross_entropy=True)}"
    )
    return Drawing(figure, data, " ".join(caption.split()))


def recovery(tables: read.Tables, options: Mapping[str, Any]) -> Drawing:
    """Recovery of the true dictionary and of its supports against mean L0, per synthetic source.

    Raises:
        UserError: no SAE was compared with a true dictionary, or runs differ in budget.
    """
    rows = _rows(tables, options, "mmcs", "recovery")
    rows = rows[read.is_sae(rows)]
    panels = [
        (panel, metric) for panel in read.panels_of(rows) for metric in ("mmcs", "support_f1")
    ]
    figure, data = _draw(rows, panels, wide=True)
    true = [
        f"{held['true_l0_mean'].iloc[0]:.3g} ({read.panel_title(panel)})"
        for panel in read.panels_of(rows)
        if "true_l0_mean" in (held := read.one_panel(rows, panel))
    ]
    caption = (
        "Recovery of the known dictionary of synthetic activations against the mean number of active "
        "latents per sample: cosine similarity of matched decoder directions and true features "
        "(Hungarian matching, averaged over the true features), and micro-averaged F1 of the recovered "
        "supports. "
        + (f"The dashed line marks the true mean L0: {captions.listed(true)}. " if true else "")
        + f"{captions.seed_sentence(rows)} {captions.budget_sentence(rows)} "
        f"{captions.rows_sentence(rows)}"
    )
    return Drawing(figure, data, " ".join(caption.split()))


def _rows(
    tables: read.Tables, options: Mapping[str, Any], metric: str, figure: str
) -> pd.DataFrame:
    """The runs of all sources whose SAEs have a metric."""
    panels = tables.panels(metric)
    if not panels:
        raise UserError(
            f"figures.names: {figure} needs SAEs with the metric {metric}, the tables have none. "
            f"Take {figure} out of figures.names in params.yaml, or add a source that has it."
        )
    wide = tables.wide
    held = pd.concat([read.one_panel(wide, panel) for panel in panels])
    held = held[held[metric].notna() & held["l0_mean"].notna()]
    held = read.of_one_size(held)
    read.check_budgets(tables, held, options)
    known = tables.intervals[tables.intervals["metric"] == metric][["run", "low", "high"]]
    return held.merge(known, on="run", how="left") if len(known) else held


def _saes(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[read.is_sae(rows)]


def _where(rows: pd.DataFrame) -> str:
    titles = [
        f"{read.panel_title(panel)} ({_saes(read.one_panel(rows, panel))['d_sae'].iloc[0]:,.0f} latents)"
        for panel in read.panels_of(rows)
    ]
    return (
        f"for {titles[0]}" if len(titles) == 1 else f"one panel each for {captions.listed(titles)}"
    )


def _baseline_sentence(rows: pd.DataFrame, metric: str) -> str:
    """Which baselines are drawn, and which would not be visible."""
    found = []
    if rows["entry"].str.contains(style.RANDOM_DECODER, regex=False).any():
        found.append("SAEs whose random decoder stays untrained")
    if (rows["variant"] == "pca").any():
        found.append("PCA that keeps as many directions as the axis says")
    if (rows["variant"] == "mean").any():
        found.append("the mean activation in place of every row (horizontal line)")
    text = f"In grey: {captions.listed(found)}." if found else ""
    if (rows["variant"] == "identity").any():
        text += f" The identity (not drawn) has {metric_name(metric)} 0."
    return text


def metric_name(metric: str) -> str:
    """A metric's name without its unit."""
    return style.metric_label(metric).partition(" (")[0]


def _draw(
    rows: pd.DataFrame, panels: Sequence[tuple[read.Panel, str]], wide: bool = False
) -> tuple[Figure, pd.DataFrame]:
    """Draw panels of (source and hook point, metric); returns the plotted numbers too."""
    columns = 1 if len(panels) == 1 and not wide else 2
    lines = -(-len(panels) // columns)
    drawn = rows[rows["variant"] != "identity"]
    series = {panel: read.series_of(read.one_panel(drawn, panel)) for panel, _ in panels}
    strokes = _strokes([one for held in series.values() for one in held])
    legend = [Line2D([], [], label=label, **stroke) for label, stroke in strokes.items()]
    width = style.COLUMN_WIDTH if columns == 1 else style.TEXT_WIDTH
    per_line = style.legend_columns(list(strokes), width)
    height = lines * _PANEL_HEIGHT + 0.16 * -(-len(legend) // per_line) + 0.1
    figure = style.new_figure(width, height)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax, (panel, metric) in zip(axes, panels, strict=False):
        _panel(ax, series[panel], metric, strokes)
        ax.set_title(read.panel_title(panel))
        ax.set_xlabel(read.metric_label("l0_mean", panel))
        label = read.metric_label(metric, panel)
        ax.set_ylabel(label.replace(" (", "\n(") if len(label) > 30 else label)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    figure.legend(handles=legend, loc="outside lower center", ncols=per_line)
    return figure, _data(rows, list(dict.fromkeys(metric for _, metric in panels)))


def _data(rows: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """One line per run: its values, and the mean and deviation over the seeds of its setting."""
    columns = ["l0_mean", *metrics]
    extra = ["true_l0_mean"] if "true_l0_mean" in rows and "mmcs" in metrics else []
    extra += [column for column in ("low", "high") if column in rows]
    own = rows[[*MEASURED_IDS, "setting", *extra, *columns]]
    keys = [*read.Panel._fields, "entry", "setting"]
    return own.merge(read.over_seeds(rows, columns), on=keys, how="left", validate="m:1")


def _strokes(series: Sequence[read.Series]) -> dict[str, dict[str, Any]]:
    """Line and marker of each label, the same in every panel of a figure.

    A variant keeps its colour; its second label in a figure has broken lines and its marker open, further ones
    open markers of other shapes.
    """
    strokes: dict[str, dict[str, Any]] = {}
    for one in sorted(series, key=lambda one: style.rank_of(one.look)):
        look = one.look
        if one.label in strokes:
            continue
        if one.rows["variant"].iloc[0] == "mean":
            strokes[one.label] = {"color": look.color, "linewidth": 1.2}
            continue
        index = sum(stroke["color"] == look.color for stroke in strokes.values())
        marker = look.marker if index < 2 else _TWINS[(index - 2) % len(_TWINS)]
        strokes[one.label] = {
            "color": look.color, "marker": marker,
            "markersize": _MARKER_SIZES.get(marker, 4.0),
            "linestyle": style.LINE_STYLES[index % len(style.LINE_STYLES)],
            "markerfacecolor": look.color if index == 0 else "white",
            "markeredgecolor": look.color if index else "white",
            "markeredgewidth": 0.8 if index else 0.4,
        }  # fmt: skip
    return strokes


def _panel(
    ax: Axes, series: Sequence[read.Series], metric: str, strokes: Mapping[str, Mapping[str, Any]]
) -> None:
    ax.grid(True)
    rows = pd.concat([one.rows for one in series])
    for one in series:
        if one.rows["variant"].iloc[0] == "mean":
            ax.axhline(float(one.rows[metric].mean()), zorder=1.5, **strokes[one.label])
        else:
            _line(ax, one.rows, metric, one.look, strokes[one.label])
    _scale(ax, rows, metric)
    if "true_l0_mean" in rows and metric in ("mmcs", "support_f1"):
        ax.axvline(float(rows["true_l0_mean"].mean()), color=style.INK, lw=0.8, ls=(0, (4, 2)))


def _line(
    ax: Axes, rows: pd.DataFrame, metric: str, look: style.Look, stroke: Mapping[str, Any]
) -> None:
    """Mean and deviation of each setting, joined in order of L0; the seeds behind them."""
    points = read.over_seeds(rows, ["l0_mean", metric]).sort_values("l0_mean_seed_mean")
    baseline = look in style.BASELINES.values()
    if rows["seed"].nunique() > 1:
        ax.plot(
            rows["l0_mean"], rows[metric], ls="none", marker=look.marker, ms=2.6, mew=0, alpha=0.3,
            color=look.color, zorder=2,
        )  # fmt: skip
    ax.errorbar(
        points["l0_mean_seed_mean"], points[f"{metric}_seed_mean"],
        xerr=points["l0_mean_seed_sd"].fillna(0), yerr=_spread(rows, points, metric),
        elinewidth=0.8, capsize=1.6, capthick=0.8, zorder=2.5 if baseline else 3, **stroke,
    )  # fmt: skip


def _spread(rows: pd.DataFrame, points: pd.DataFrame, metric: str) -> np.ndarray:
    """(2, settings) below and above: the deviation over seeds, or one seed's interval, or nothing."""
    sd = points[f"{metric}_seed_sd"]
    if "low" not in rows:
        return np.stack([sd.fillna(0)] * 2)
    of_one = rows.set_index("setting").loc[points["setting"]]
    of_one = of_one[~of_one.index.duplicated()]
    below, above = of_one[metric] - of_one["low"], of_one["high"] - of_one[metric]
    return np.stack(
        [sd.fillna(side.reset_index(drop=True)).fillna(0) for side in (below, above)]
    ).clip(min=0)


def _scale(ax: Axes, rows: pd.DataFrame, metric: str) -> None:
    """Axes that hold every SAE, and of the baselines what lies at the SAEs' L0."""
    own = rows.loc[read.is_sae(rows) & (rows["l0_mean"] > 0), "l0_mean"]
    low, high = (own.min() / 1.35, own.max() * 1.35) if len(own) else (0.7, 10.0)
    style.l0_axis(ax, float(low), float(high))
    if metric in ("mmcs", "support_f1"):
        ax.set_ylim(0, 1.03)
        return
    visible = rows[(rows["variant"] == "mean") | rows["l0_mean"].between(low, high)]
    bottom, top = float(visible[metric].min()), float(visible[metric].max())
    if bottom > 0 and top / bottom > _LOG_FROM:
        style.log_axis(ax, "y", bottom / 1.25, top * 1.25)
    else:
        span = top - min(bottom, 0) or 1.0
        ax.set_ylim(0 if bottom >= 0 else bottom - 0.06 * span, top + 0.06 * span)
