"""The field's formulas of explained variance, on the same SAEs and rows."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from saeflow.errors import UserError
from saeflow.figures import captions, style
from saeflow.figures.figure import Drawing, Figure
from saeflow.tables import compare
from saeflow.tables.load import Tables
from saeflow.tables.metrics import METRICS
from saeflow.tables.schema import MEASURED_IDS

_UNCENTRED = "uncentred"
FORMULAS = {
    _UNCENTRED: ("o", "#D1495B"),
    "fve_dictionary_learning": ("s", "#3B6FB6"),
    "ev_legacy_saelens": ("^", "#5B8C5A"),
    "r2_overcomplete": ("D", "#E0A030"),
    "ev_saelens_6_18": ("x", "#222222"),
}
"""Marker and colour of each."""
_HEIGHT = 2.3  # inches


def draw(tables: Tables, options: Mapping[str, Any]) -> Drawing:
    """Each formula's value less the explained variance 1 - FVU, against it.

    Raises:
        UserError: no SAE was evaluated.
    """
    from matplotlib.lines import Line2D

    wide = tables.wide[compare.is_sae(tables.wide)]
    if wide.empty or "fvu" not in wide:
        raise UserError(
            "figures.names: ev_formulas needs evaluated SAEs, the tables have none. Take ev_formulas out of "
            "figures.names in params.yaml."
        )
    compare.check_budgets(tables, wide, options)
    rows = wide[wide["explained_variance"].notna()].assign(uncentred=1 - wide["nmse"])
    shown = [name for name in FORMULAS if name in rows]
    panels = compare.panels_of(rows)
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = style.new_figure(style.TEXT_WIDTH, _HEIGHT * lines + 0.5)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax, panel in zip(axes, panels, strict=False):
        held = compare.one_panel(rows, panel)
        for name in shown:
            marker, color = FORMULAS[name]
            difference = held[name] - held["explained_variance"]
            ax.plot(
                held["explained_variance"], difference, marker, color=color, ms=3.6, mfc="none", mew=0.8
            )  # fmt: skip
        ax.axhline(0, color=style.INK, lw=0.8)
        ax.grid(True)
        ax.set_title(compare.panel_title(panel))
        ax.set_xlabel("explained variance, 1 − FVU")
        ax.set_ylabel("other formula − (1 − FVU)")
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    handles = [
        Line2D([], [], ls="none", marker=FORMULAS[name][0], mfc="none", color=FORMULAS[name][1], label=_label(name))
        for name in shown
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    widest = max(shown, key=lambda name: _spread(rows, name))
    caption = (
        "What other formulas that are called explained variance make of the same reconstructions, less "
        "1 − FVU (sums over all rows, centred in each dimension, divided once). A point is an SAE. The largest "
        f"difference, {_spread(rows, widest):.3g}, is that of: {_label(widest)}. "
        f"{captions.budget_sentence(rows)} {captions.rows_sentence(rows)}"
    )
    data = rows[[*MEASURED_IDS, "explained_variance", *shown]]
    return Drawing(figure, data, caption)


def _label(name: str) -> str:
    return "1 − NMSE (not centred)" if name == _UNCENTRED else METRICS[name].label


def _spread(rows: pd.DataFrame, name: str) -> float:
    """The largest distance of a formula from the explained variance."""
    return float(np.nanmax(np.abs(rows[name] - rows["explained_variance"])))


FIGURE = Figure(title="One name, many formulas", draw=draw)
