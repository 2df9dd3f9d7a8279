"""Errors of SAEs that find their own number of latents, against rivals at equal L0 and against their own controls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from saeflow.errors import UserError
from saeflow.figures import captions, style
from saeflow.figures.figure import Drawing, Figure
from saeflow.figures.needs import Need
from saeflow.tables import compare, verdict
from saeflow.tables.load import Tables
from saeflow.tables.numbers import natural
from saeflow.tables.runs import variant_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_AGAINST = {
    "topk": ("TopK at equal L0", "o"), "batch_topk": ("BatchTopK at equal L0", "s"),
    "shuffled_k": ("itself, k of another input", "v"), "k_by_norm": ("itself, k by the norm", "D"),
}  # fmt: skip
_STEP = 0.18  # of a row's height
_ROW = 0.5  # inches
NEEDS = Need(
    "evaluation.bootstrap and an entry with options: {k: {mean_l0_of: RUN}}",
    lambda asked: bool(asked.evaluation.get("bootstrap")) and any(run.guide for run in asked.runs),
)


def draw(tables: Tables, options: Mapping[str, Any]) -> Drawing:
    """Difference of FVU in per cent of the other's, with its paired interval; hollow where no verdict is given.

    Raises:
        UserError: nothing was compared.
    """
    from matplotlib.lines import Line2D

    rows = verdict.judged(tables, ["fvu"])
    rows = rows[rows["rival_variant"].isin(list(_AGAINST))]
    if rows.empty:
        raise UserError(
            f"figures.names: headline needs {NEEDS.what}, the tables have neither. Take it out."
        )
    shown = compared(tables.wide, rows)
    compare.check_budgets(tables, shown, options)
    for name in ("difference", "low", "high"):
        rows[f"{name}_percent"] = 100 * rows[name] / rows["rival"]
    panels = compare.panels_of(rows)
    held = [compare.one_panel(rows, panel) for panel in panels]
    counts = [one.groupby(["entry", "setting"]).ngroups for one in held]
    figure = style.new_figure(style.TEXT_WIDTH, _ROW * sum(counts) + 0.5 * len(panels) + 0.5)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=counts)
    blind = verdict.uninformed(tables)
    for (ax,), panel, one in zip(axes, panels, held, strict=True):
        _panel(
            ax,
            one,
            {entry for source, hook_point, entry in blind if (source, hook_point) == panel[:2]},
        )
        ax.set_title(compare.panel_title(panel))
    axes[-1][0].set_xlabel("FVU less the other's (% of the other's)")
    handles = [
        Line2D([], [], ls="none", marker=marker, color=style.INK, label=f"against {label}")
        for label, marker in _AGAINST.values()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    caption = (
        f"Does the input decide k? {' '.join(verdict.sentences(tables))} Left of the line the SAE that finds its own number of "
        "latents has the smaller error. Bars are 95 % bootstrap intervals of the paired difference, over documents, "
        "images or samples. Filled points differ by more than this interval, the noise of seeds (95 %, Student's t) "
        f"and what the rest of the difference in L0 may explain; all others are hollow. Seeds: {_seeds(rows)}. "
        f"{captions.budget_sentence(shown)}"
    )
    return Drawing(figure, rows, caption)


def compared(wide: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the measurements of the runs that some comparisons are of."""
    names = {
        (row["source"], row["hook_point"], row[f"{side}entry"], row[f"{side}setting"])
        for row in rows.to_dict("records")
        for side in ("", "rival_")
    }
    places = zip(wide["source"], wide["hook_point"], wide["entry"], wide["setting"], strict=True)
    held = np.array([place in names for place in places], bool)
    is_own = wide["evaluated_on"] == wide["source"]
    return wide[held & is_own]


def _seeds(rows: pd.DataFrame) -> str:
    least, most = int(rows["seeds"].min()), int(rows["seeds"].max())
    return str(least) if least == most else f"{least} to {most}"


def _panel(ax: Axes, rows: pd.DataFrame, blind: set[str]) -> None:
    """Draw one panel; of the entries in `blind`, k carries no information."""
    settings = sorted(
        {(e, s) for e, s in zip(rows["entry"], rows["setting"], strict=True)},
        key=lambda one: (natural(one[0]), natural(one[1])),
    )
    labels = []
    for place, (entry, setting) in enumerate(settings):
        own = rows[(rows["entry"] == entry) & (rows["setting"] == setting)]
        look = style.look(own["variant"].iloc[0], entry)
        name = variant_label(own["variant"].iloc[0], entry)
        note = "\n(k carries no information)" if entry in blind else ""
        labels.append(f"{name}, L0 {own['l0'].dropna().mean():.3g}{note}")
        for number, (name, (_, marker)) in enumerate(_AGAINST.items()):
            for _, one in own[own["rival_variant"] == name].iterrows():
                x = one["difference_percent"]
                known = pd.notna(one["low"])
                ax.errorbar(
                    x, place + (number - 1.5) * _STEP,
                    xerr=[[x - one["low_percent"]], [one["high_percent"] - x]] if known else None,
                    marker=marker, color=look.color, elinewidth=0.8, capsize=1.6, ls="none",
                    markerfacecolor=look.color if one["verdict"] in (verdict.BETTER, verdict.WORSE) else "white",
                )  # fmt: skip
    ax.axvline(0, color=style.INK, lw=0.8)
    ax.grid(True, axis="x")
    ax.set_yticks(range(len(settings)), labels)
    ax.set_ylim(len(settings) - 0.5, -0.5)


FIGURE = Figure(title="Does the input decide k?", draw=draw, needs=NEEDS)
