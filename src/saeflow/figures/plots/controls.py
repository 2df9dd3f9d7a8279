"""Controls for adaptivity: what reconstruction loses without the k that an SAE chose for each input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from saeflow.errors import UserError
from saeflow.figures import captions, style
from saeflow.figures.figure import Drawing, Figure
from saeflow.figures.needs import Need
from saeflow.figures.series import entry_labels
from saeflow.tables import compare, verdict
from saeflow.tables.load import Tables
from saeflow.tables.numbers import natural

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CONTROLS = {
    "shuffled_k": ("k of another input", "o"),
    "k_by_norm": ("k by the activation's norm", "D"),
    "mean_k": ("mean k for every input", "s"),
    "batch_threshold": ("one threshold for all inputs", "^"),
}
_STEP = 0.19  # of a row's height, between its controls
_ROW = 0.42  # inches


def draw(tables: Tables, options: Mapping[str, Any]) -> Drawing:
    """Change of FVU under each control, in per cent of the SAE's own, with its interval.

    Raises:
        UserError: no SAE that chooses its k was evaluated with evaluation.bootstrap.
    """
    from matplotlib.lines import Line2D

    rows = _relative(tables.controls)
    if rows.empty:
        raise UserError(
            "figures.names: controls needs SAEs that choose their k (soft_topk, adaptive_k) and "
            "evaluation.bootstrap, the tables have neither. Take controls out of figures.names in params.yaml."
        )
    runs = tables.wide[tables.wide["run"].isin(rows["run"])]
    compare.check_budgets(tables, runs, options)
    panels = compare.panels_of(rows)
    counts = [compare.one_panel(rows, panel)["run"].nunique() for panel in panels]
    figure = style.new_figure(style.TEXT_WIDTH, _ROW * sum(counts) + 0.55 * len(panels) + 0.35)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=counts)
    for (ax,), panel in zip(axes, panels, strict=True):
        _panel(ax, compare.one_panel(rows, panel), panel)
    axes[-1][0].set_xlabel("change of FVU (% of the SAE's own)")
    handles = [
        Line2D([], [], ls="none", marker=marker, color=style.INK, label=label)
        for label, marker in _CONTROLS.values()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    worse = (rows["low"] > 0).groupby(rows["control"]).sum()
    counted = captions.listed(
        f"{_CONTROLS[name][0]} in {worse[name]}" for name in _CONTROLS if name in worse
    )
    caption = (
        "What happens to the fraction of variance unexplained when the k that an SAE chose for each input is "
        "replaced, with the same encoder and decoder on the same rows: by the k of another input, by the same k's in the order of the "
        "activations' norms, by the mean k, or by one threshold on the activations with equally many active in all. Right of the line the control is "
        "worse. Bars are 95 % bootstrap intervals of the paired difference, over documents, images or samples. "
        f"Of {rows['run'].nunique()} SAEs, a control is worse by more than its interval: {counted}. "
        f"{captions.budget_sentence(runs)} {captions.rows_sentence(runs)} {verdict.uninformed_sentence(tables)}"
    )
    return Drawing(figure, rows.drop(columns=["setting", "series", "trained"]), caption.strip())


def _relative(table: pd.DataFrame) -> pd.DataFrame:
    """Differences of FVU in per cent of the SAE's own, a line per run and control."""
    fvu = table[table["metric"] == "fvu"]
    own = fvu[fvu["control"] == "own"].set_index("run")["value"]
    held = fvu[fvu["control"] != "own"].copy()
    scale = 100 / held["run"].map(own)
    for name, column in (
        ("change", "difference"),
        ("low", "difference_low"),
        ("high", "difference_high"),
    ):
        held[name] = held[column] * scale
    return held.drop(columns=["metric", "difference", "difference_low", "difference_high"])


def _panel(ax: Axes, rows: pd.DataFrame, panel: compare.Panel) -> None:
    runs = sorted(rows["run"].unique(), key=natural)
    for place, run in enumerate(runs):
        held = rows[rows["run"] == run].set_index("control")
        color = style.look(held["variant"].iloc[0], held["entry"].iloc[0]).color
        for number, (name, (_, marker)) in enumerate(_CONTROLS.items()):
            one = held.loc[name]
            ax.errorbar(
                one["change"], place + (number - 1.5) * _STEP,
                xerr=[[one["change"] - one["low"]], [one["high"] - one["change"]]],
                marker=marker, color=color, elinewidth=0.8, capsize=1.6,
            )  # fmt: skip
    ax.axvline(0, color=style.INK, lw=0.8)
    ax.grid(True, axis="x")
    ax.set_title(compare.panel_title(panel))
    first = rows.drop_duplicates("run").set_index("run").loc[runs]
    ax.set_yticks(range(len(runs)), entry_labels(first))
    ax.set_ylim(len(runs) - 0.5, -0.5)


FIGURE = Figure(
    title="What choosing k by input is worth",
    draw=draw,
    needs=Need(
        "evaluation.bootstrap and a run of a variant that chooses its k (soft_topk, adaptive_k)",
        lambda asked: (
            bool(asked.evaluation.get("bootstrap")) and asked.variant("soft_topk", "adaptive_k")
        ),
    ),
)
