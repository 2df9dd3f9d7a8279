"""Learning curves: the error on training batches over tokens, and on held-out rows at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from saeflow.errors import UserError
from saeflow.figures import captions, style
from saeflow.figures.figure import Drawing, Figure
from saeflow.figures.needs import TRAINED
from saeflow.figures.series import each_setting, in_order, places_of, series_of, stroke
from saeflow.tables import compare, verdict
from saeflow.tables.load import Tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

_HEIGHT = 2.4  # inches
_LAST = 0.1
"""Share of a run's tokens, the last ones, that its training error is the mean over."""


def draw(tables: Tables, options: Mapping[str, Any]) -> Drawing:
    """FVU of training batches against tokens, one panel per source and hook point, with held-out FVU at the end.

    Raises:
        UserError: no run logged the FVU of its batches.
    """
    ends = _ends(tables)
    if ends.empty:
        raise UserError(
            "figures.names: learning needs SAEs trained here that were evaluated, the tables have none. Take learning out of "
            "figures.names in params.yaml."
        )
    ends = compare.of_one_size(ends)
    compare.check_budgets(tables, tables.wide[tables.wide["trained"].isin(ends["run"])], options)
    steps = tables.training[tables.training["run"].isin(ends["run"])]
    steps = steps[steps["batch_fvu"] > 0]
    panels, places = compare.panels_of(steps), places_of(tables)
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    width = style.TEXT_WIDTH if columns > 1 else style.COLUMN_WIDTH
    figure = style.new_figure(width, _HEIGHT * lines + 0.6)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    legend: dict[str, Line2D] = {}
    for ax, panel in zip(axes, panels, strict=False):
        for one in series_of(compare.one_panel(steps, panel)):
            for _, held in each_setting(one.rows):
                run = held[held["run"] == held["run"].iloc[0]]
                end = ends[ends["run"] == run["run"].iloc[0]].iloc[0]
                _curve(ax, run, end, stroke(one, places))
            legend.setdefault(one.label, _handle(stroke(one, places)))
        _finish(ax, ends, panel)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    style.legend_below(figure, in_order(legend, places))
    return Drawing(figure, ends, _caption(tables, ends))


def _ends(tables: Tables) -> pd.DataFrame:
    """Return a line per run: its tokens, unique rows and epochs, and both errors at the end."""
    if "batch_fvu" not in tables.training:
        return pd.DataFrame()
    steps = tables.training[tables.training["batch_fvu"].notna()]
    is_last = steps["tokens_seen"] > (1 - _LAST) * steps.groupby("run")["tokens_seen"].transform(
        "max"
    )
    known = steps[is_last].groupby("run")["batch_fvu"].mean().rename("train_fvu")
    wide = tables.wide
    own = wide[(wide["evaluated_on"] == wide["source"]) & wide["trained"].isin(known.index)]
    found = own.assign(run=own["trained"], train_fvu=own["trained"].map(known))
    found = found.assign(epochs=found["tokens"] / found["train_rows"], held_out_fvu=found["fvu"])
    ids = ["run", "source", "hook_point", "entry", "variant", "d_sae", "k", "seed", "tokens"]
    return found[[*ids, "train_rows", "epochs", "train_fvu", "held_out_fvu"]]


def _curve(ax: Axes, run: pd.DataFrame, end: pd.Series, drawn: Mapping[str, Any]) -> None:
    ax.plot(run["tokens_seen"], run["batch_fvu"], **{**drawn, "marker": "", "lw": 0.8})
    ax.plot(
        [run["tokens_seen"].iloc[-1]], [end["held_out_fvu"]], ls="none", marker=drawn["marker"],
        color=drawn["color"], ms=4, clip_on=False,
    )  # fmt: skip


def _handle(drawn: Mapping[str, Any]) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], **drawn)


def _finish(ax: Axes, ends: pd.DataFrame, panel: compare.Panel) -> None:
    """Scales, names, and where rows come again."""
    held = compare.one_panel(ends, panel)
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in ax.lines])
    style.log_axis(ax, "y", float(values.min()) / 1.2, float(values.max()) * 1.2)
    for tokens in np.arange(rows := held["train_rows"].max(), held["tokens"].max(), rows):
        ax.axvline(tokens, color=style.FAINT, lw=0.8, zorder=0)
    ax.set_xlim(left=0)
    style.even_ticks(ax.xaxis, 3)
    ax.set_title(compare.panel_title(panel))
    ax.set_xlabel(compare.panel_axis("tokens_seen", panel))
    ax.set_ylabel("FVU")
    ax.grid(True)


def _caption(tables: Tables, ends: pd.DataFrame) -> str:
    seen = []
    for panel in compare.panels_of(ends):
        held = compare.one_panel(ends, panel)
        gap = (held["held_out_fvu"] / held["train_fvu"]).dropna()
        seen.append(
            f"{compare.panel_title(panel)}: {captions.compact(held['train_rows'].max())} unique rows{_of_fewer(held)}, "
            f"{_range(held['epochs'])} epochs, held-out FVU {_range(gap)} times that of the last training batches"
        )
    caption = (
        "Fraction of variance unexplained (FVU) of training batches over tokens, one line for each setting (its first seed), "
        "and of held-out rows at the end (points). A batch is measured by the pass that trains on it, before the update: up to "
        "the first grey line no row was seen before, and at each line rows come again. A point is measured by the SAE as it is "
        f"used, which for BatchTopK, SoftSAE and JumpReLU is not the form of training. {'; '.join(seen)}, the mean over the last "
        f"{_LAST:.0%} of tokens. {captions.size_sentence(ends)} {verdict.unranked_sentence(tables, 'fvu')}"
    )
    return " ".join(caption.split())


def _of_fewer(held: pd.DataFrame) -> str:
    """Name the SAEs that train on a part of the rows, whose epochs are shorter than the grey lines say."""
    fewer = held[held["train_rows"] < held["train_rows"].max()].groupby("entry")["train_rows"].max()
    parts = [f"{captions.compact(rows)} of {entry}" for entry, rows in fewer.items()]
    return f" ({captions.listed(parts)}, trained on each context's last row)" if parts else ""


def _range(values: pd.Series) -> str:
    least, most = f"{values.min():.3g}", f"{values.max():.3g}"
    return least if least == most else f"{least} to {most}"


FIGURE = Figure(title="Learning curves", draw=draw, needs=TRAINED)
