"""Stability over seeds: agreement of dictionaries, and of the number of latents of each input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from saeflow.errors import UserError
from saeflow.figures import captions, style
from saeflow.figures.figure import Drawing, Figure
from saeflow.figures.needs import Asked, Need
from saeflow.figures.series import entry_labels
from saeflow.tables import compare, verdict
from saeflow.tables.load import Tables
from saeflow.tables.metrics import BETWEEN_SEEDS
from saeflow.tables.numbers import natural

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = {
    "matched_cosine": "o",
    "matched_cosine_alive": "D",
    "mutual_max_cosine": "s",
    "spearman_l0": "^",
    "spearman_k_hat": "v",
}
_ROW = 0.26  # inches
_BESIDE = 0.13
"""Rows between marks of one setting, so that none hides another."""


def draw(tables: Tables, options: Mapping[str, Any]) -> Drawing:
    """Matched cosines and rank correlations between the seeds of each setting.

    Raises:
        UserError: no setting has two seeds, or runs differ in budget.
    """
    from matplotlib.lines import Line2D

    rows = tables.stability[tables.stability["metric"].isin(_MARKERS)]
    if rows.empty:
        raise UserError(
            "figures.names: stability needs a setting with two seeds, the tables have none. Give an entry of "
            "saes `seed: [0, 1]`, or take stability out of figures.names in params.yaml."
        )
    keys = ["source", "hook_point", "entry", "setting"]
    own = tables.wide[tables.wide["evaluated_on"] == tables.wide["source"]]
    shown = own.merge(rows[keys].drop_duplicates(), on=keys)
    compare.check_budgets(tables, shown, options)
    panels = compare.panels_of(rows)
    held = [compare.one_panel(rows, panel) for panel in panels]
    lines = [len(part[keys].drop_duplicates()) for part in held]
    figure = style.new_figure(style.TEXT_WIDTH, sum(_ROW * n + 0.55 for n in lines) + 0.5)
    ratios = {"height_ratios": [n + 1.5 for n in lines]}
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, gridspec_kw=ratios).ravel()
    for ax, panel, part in zip(axes, panels, held, strict=True):
        ax.set_title(compare.panel_title(panel))
        _panel(ax, part)
    axes[-1].set_xlabel("agreement between seeds (1: equal)")
    drawn = [name for name in _MARKERS if (rows["metric"] == name).any()]
    handles = [
        Line2D(
            [],
            [],
            ls="none",
            marker=_MARKERS[name],
            color=style.INK,
            label=BETWEEN_SEEDS[name].label,
        )
        for name in drawn
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    caption = (
        "What training with another seed changes. Cosine similarity of decoder directions of two seeds, "
        "matched one to one (Hungarian), over all latents, dead ones too, and over those that fire on an "
        "evaluated row; Spearman correlation between the seeds of the number of active latents per input "
        "(L0) and of the k that the SAE allows, where they vary. A point for each pair of seeds. "
        f"{captions.budget_sentence(shown)} {captions.rows_sentence(shown)} {verdict.uninformed_sentence(tables)}"
    )
    return Drawing(figure, rows.reset_index(drop=True), caption.strip())


def _panel(ax: Axes, rows: pd.DataFrame) -> None:
    settings = sorted(
        rows.groupby(["entry", "setting"]),
        key=lambda item: (
            style.rank(item[1]["variant"].iloc[0], str(item[0][0])),
            natural(str(item[0][0])),
            natural(str(item[0][1])),
        ),
    )
    for place, ((entry, _), held) in enumerate(settings):
        look = style.look(held["variant"].iloc[0], str(entry))
        for name, marker in _MARKERS.items():
            values = held.loc[held["metric"] == name, "value"]
            beside = place + _BESIDE * (list(_MARKERS).index(name) - len(_MARKERS) // 2)
            ax.plot(values, [beside] * len(values), ls="none", marker=marker, color=look.color)
    labels = entry_labels(pd.DataFrame([held.iloc[0] for _, held in settings]))
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.set_xlim(min(0.0, float(rows["value"].min()) - 0.05), 1.02)
    ax.grid(True, axis="x")


FIGURE = Figure(
    title="What another seed changes",
    draw=draw,
    needs=Need("an entry of saes with several seeds", Asked.seeded),
)
