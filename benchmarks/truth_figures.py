"""Figures of `truth.py`: every rival's difference from BatchTopK in every world, and L0 against the true count."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from truth_settings import MOST, variant_of
from truth_verdicts import AT_L0, REFERENCE, RIVALS, Comparison, interval

from saeflow.figures.style import (
    COLUMN_WIDTH,
    LINE_STYLES,
    TEXT_WIDTH,
    Look,
    context,
    log_axis,
    look,
    new_figure,
    save,
)

_LINEAR = 0.03
"""Differences up to here are drawn on a linear scale, larger ones on a logarithmic one."""
_TICKS = (-0.1, 0, 0.1)


def look_of(name: str) -> Look:
    """Return the look of an SAE's variant; the label names its setting."""
    known, setting = look(variant_of(name)), name.partition("-")[2]
    return replace(known, label=f"{known.label}, {setting}") if setting else known


def draw_differences(found: Sequence[Comparison], file: Path) -> None:
    """Draw the difference in FVU from BatchTopK at equal L0: a panel a world, a row a rival, filled where it is decided.

    Args:
        found: comparisons of all SAEs.
        file: written, without its ending.
    """
    held = {(one.law, one.sae): one for one in found if one.against == AT_L0}
    worlds = list(dict.fromkeys(law for law, _ in held))
    means = {sae: _mean([held[at] for at in held if at[1] == sae]) for sae in RIVALS}
    rows = sorted((sae for sae in RIVALS if means[sae] is not None), key=lambda sae: means[sae])
    if not rows:
        return
    with context():
        figure = new_figure(TEXT_WIDTH, 0.6 + 0.17 * len(rows))
        panels = figure.subplots(1, len(worlds), sharex=True, sharey=True, squeeze=False)[0]
        for ax, world in zip(panels, worlds, strict=True):
            for row, sae in enumerate(rows):
                _row(ax, row, held.get((world, sae)), look_of(sae))
            ax.set_title(world)
            ax.axvline(0, color="#888888", linewidth=0.6, zorder=0)
            ax.set_xscale("symlog", linthresh=_LINEAR)
            ax.set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
            ax.grid(axis="x")
        panels[0].set_yticks(range(len(rows)), [look_of(sae).label for sae in rows])
        panels[0].set_ylim(len(rows) - 0.4, -0.6)
        low, high = panels[0].get_xlim()
        panels[0].set_xlim(1.4 * low, 1.4 * high)
        figure.supxlabel(
            "FVU less BatchTopK's at equal L0, with 95 % interval over seeds", fontsize=8
        )
        save(figure, file)


def _mean(comparisons: Sequence[Comparison]) -> float | None:
    values = [interval(one.values)[0] for one in comparisons if one.values]
    return sum(values) / len(values) if values else None


def _row(ax: Axes, row: int, one: Comparison | None, style: Look) -> None:
    if one is None or not one.values:
        return
    mean, low, high = interval(one.values)
    is_decided = one.verdict in ("better", "worse")
    ax.plot([low, high], [row, row], color=style.color, linewidth=0.9)
    face = style.color if is_decided else "white"
    ax.plot([mean], [row], marker="o", markersize=3.5, color=style.color, markerfacecolor=face)


def draw_calibration(rows: pd.DataFrame, file: Path) -> None:
    """Draw mean L0 against the true number of active features in the varying world, of SAEs that choose it by input.

    Args:
        rows: of each SAE's chosen setting.
        file: written, without its ending.
    """
    own = rows[(rows.law == "varying") & (rows.control == "")]
    names = [
        sae
        for sae in (REFERENCE, *RIVALS)
        if sae == REFERENCE or variant_of(sae) not in (REFERENCE, "topk", "abs_topk")
    ]
    groups = {sae: own[own.sae == sae] for sae in names if (own.sae == sae).any()}
    if not groups:
        return
    with context():
        figure = new_figure(COLUMN_WIDTH, 3.6)
        ax = figure.subplots()
        ax.plot([1, MOST], [1, MOST], color="#BBBBBB", linewidth=0.8, zorder=0)
        drawn: list[float] = []
        for sae, group in groups.items():
            curves = pd.DataFrame(list(group.calibration)).mean()
            curves.index = curves.index.astype(int)
            style = look_of(sae)
            ax.plot(
                curves.index, curves, color=style.color, marker=style.marker, label=style.label,
                linestyle=LINE_STYLES["-" in sae], markersize=3,
            )  # fmt: skip
            drawn += curves.tolist()
        log_axis(ax, "x", 0.9, 1.1 * MOST)
        log_axis(ax, "y", 0.8 * min(drawn), 1.2 * max(drawn))
        ax.set_xlabel("true active features")
        ax.set_ylabel("mean L0")
        ax.grid()
        figure.legend(loc="outside lower center", ncols=2)
        save(figure, file)
