"""Quality of complexity probes by block and model."""

from collections.abc import Mapping
from typing import Any

from saeflow.errors import UserError
from saeflow.figures import style
from saeflow.figures.figure import Drawing, Figure
from saeflow.figures.needs import PROBES, Need
from saeflow.tables.load import Tables
from saeflow.tables.numbers import natural
from saeflow.tables.schema import axis_label

_BLOCK = r"blocks\.(\d+)"
_COLORS = ("#AE440E", "#2777E7", "#4FA95D", "#9760AE", "#CD9F07", "#222222")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_QUALITIES = ("r2", "rmse", "spearman")


def draw(tables: Tables, options: Mapping[str, Any]) -> Drawing:
    """R², RMSE and rank correlation of the probes on held-out contexts against the block they read.

    Raises:
        UserError: no probe was fitted.
    """
    from matplotlib.ticker import MaxNLocator

    rows = tables.probes[tables.probes["split"] == "evaluation"].copy()
    rows["block"] = rows["hook_point"].str.extract(_BLOCK, expand=False).astype(float)
    rows = rows[rows["block"].notna()]
    if rows.empty:
        raise UserError(
            "figures.names: probe_layers needs probes of a model's blocks, the tables have none. Take probe_layers out "
            "of figures.names in params.yaml, or add a run of the variant adaptive_k."
        )
    order = sorted(rows["hook_point"].unique(), key=natural)
    figure = style.new_figure(style.TEXT_WIDTH, 2.5)
    axes = figure.subplots(1, len(_QUALITIES))
    groups = list(rows.groupby(["source", "complexity"]))
    for ax, quality in zip(axes, _QUALITIES, strict=True):
        for number, ((source, complexity), held) in enumerate(groups):
            held = held.sort_values("block")
            ax.plot(
                held["block"], held[quality], label=f"{source}: {complexity}",
                color=_COLORS[number % len(_COLORS)], marker=_MARKERS[number % len(_MARKERS)],
            )  # fmt: skip
        ax.grid(True)
        ax.set_xlabel("block")
        ax.set_ylabel(axis_label(quality))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    best = rows.iloc[int(rows["r2"].argmax())]
    caption = (
        "Quality of the ridge probes that read a context's complexity score from one activation of it, on held-out "
        f"contexts, by the block whose output they read ({len(order)} hook points). The best R² is "
        f"{best['r2']:.2f} ({best['source']}, {best['complexity']}, {best['hook_point']})."
    )
    data = rows[["source", "hook_point", "complexity", "contexts", "ridge", *_QUALITIES, "pearson"]]
    return Drawing(figure, data.reset_index(drop=True), caption)


FIGURE = Figure(
    title="Reading complexity, by block",
    draw=draw,
    needs=Need(
        f"{PROBES.what}, at a block of a model",
        lambda asked: any("blocks." in point for point in asked.hook_points()),
    ),
)
