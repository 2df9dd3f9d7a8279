"""Complexity: what the probe reads from an activation against the score of its context."""

import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from saeflow.errors import UserError
from saeflow.figures import captions, style
from saeflow.figures.figure import Drawing, Figure
from saeflow.figures.needs import PROBES
from saeflow.tables.load import Tables
from saeflow.tables.numbers import natural
from saeflow.tables.schema import label

_KEYS = ["source", "hook_point", "complexity"]
_SIZE = 2.2  # inches
_FEWEST, _MOST = 3, 5
"""Panels of a line: more than the fewest where the lines would not fit on a page."""
_TITLE = 0.35  # inches, of a panel's title beyond a square
_BELOW = 0.25  # inches, of the figure's own margin
_ROOM = style.PAGE_HEIGHT - _BELOW


def draw(tables: Tables, options: Mapping[str, Any]) -> Drawing:
    """Predicted against given scores of held-out contexts, one panel per probe.

    Raises:
        UserError: no run used a probe.
    """
    held_out = tables.complexity[tables.complexity["split"] == "evaluation"]
    if held_out.empty:
        raise UserError(
            "figures.names: complexity needs a fitted probe, the tables have none. Take complexity out of "
            "figures.names in params.yaml, or add a run of the variant adaptive_k."
        )
    groups = sorted(
        held_out.groupby(_KEYS), key=lambda item: [natural(str(item[0][i])) for i in (0, 2, 1)]
    )
    columns, lines, size = _layout(len(groups))
    width = style.COLUMN_WIDTH if columns == 1 else style.TEXT_WIDTH
    figure = style.new_figure(width, size * lines + _BELOW)
    sizes = {"title": 8, "text": 6.5} if columns <= _FEWEST else {"title": 6, "text": 5}
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    color = style.VARIANTS["adaptive_k"].color
    for ax, (key, held) in zip(axes, groups, strict=False):
        ax.plot([0, 10], [0, 10], color=style.FAINT, lw=0.8, zorder=1)
        many = len(held) > 500
        ax.plot(
            held["score"], held["predicted"], ls="none", marker="o", ms=1.6 if many else 2.8, mew=0,
            alpha=0.12 if many else 0.5, color=color,
        )  # fmt: skip
        ax.set(xlim=(-0.3, 10.3), ylim=(-0.3, 10.3), aspect="equal")
        ax.set_xlabel("complexity score")
        ax.set_ylabel("read by the probe")
        ax.set_title(f"{key[0]}\n{key[2]}{_where(str(key[1]))}", fontsize=sizes["title"])
        ax.grid(True)
        quality = _quality(tables.probes, key)
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0}
        ax.text(
            0.03, 0.97, quality, transform=ax.transAxes, va="top", fontsize=sizes["text"], bbox=box, zorder=5
        )  # fmt: skip
    for ax in axes[len(groups) :]:
        ax.set_axis_off()
    counts = captions.listed(
        dict.fromkeys(f"{len(held)} ({key[0]}, {key[2]})" for key, held in groups)
    )
    caption = (
        "Complexity scores of held-out contexts, scaled to 0..10, and what a ridge regression on one "
        "activation of each reads (clamped to the same range); the line is where both agree. Rows: "
        f"{counts}. AdaptiveK turns what is read into k."
    )
    return Drawing(figure, held_out.reset_index(drop=True), caption)


def _height(columns: int) -> float:
    """Height of a line of square panels with titles, in inches."""
    return _SIZE if columns <= _FEWEST else style.TEXT_WIDTH / columns + _TITLE


def _layout(count: int) -> tuple[int, int, float]:
    """Columns, lines and the height of a line in inches, for so many panels on one page."""
    columns = min(_FEWEST, count)
    while (lines := -(-count // columns)) * _height(columns) > _ROOM and columns < _MOST:
        columns += 1
    return columns, lines, min(_height(columns), _ROOM / lines)


def _where(hook_point: str) -> str:
    """The block that a hook point is in."""
    found = re.search(r"blocks\.(\d+)", hook_point)
    return f", block {found[1]}" if found else ""


def _quality(probes: pd.DataFrame, key: Any) -> str:
    own = probes[(probes[_KEYS] == list(key)).all(axis=1) & (probes["split"] == "evaluation")]
    row = own.iloc[0]
    return "\n".join(
        f"{label(name)} {row[name]:.2f}"
        for name in ("rmse", "r2", "pearson", "spearman")
        if not pd.isna(row[name])
    )


FIGURE = Figure(
    title="Complexity",
    draw=draw,
    needs=PROBES,
)
