"""Pictures of concepts: what they look at, and which images need few or many of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file

from saeflow.errors import UserError
from saeflow.figures import style
from saeflow.figures.series import series_of
from saeflow.files import read_json
from saeflow.tables import compare
from saeflow.tables.load import Tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Pictures:
    run: str
    panel: compare.Panel
    label: str
    color: str
    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]


def pictured(tables: Tables, figure: str) -> Iterator[Pictures]:
    """The first run with pictures of each variant and panel, in the legend's order."""
    saes = tables.wide[compare.is_sae(tables.wide)]
    found = False
    for panel in compare.panels_of(saes):
        seen: set[str] = set()
        for one in series_of(compare.one_panel(saes, panel)):
            run = str(one.rows.sort_values("run")["run"].iloc[-1])
            folder: Path = tables.cards / run
            if one.look.label in seen or not (folder / "cards.json").exists():
                continue
            seen.add(one.look.label)
            found = True
            arrays = load_file(folder / "cards.safetensors")
            facts = read_json(folder / "cards.json")
            yield Pictures(run, panel, one.look.label, one.look.color, facts, arrays)
    if not found:
        raise without_cards(figure)


def without_cards(figure: str) -> UserError:
    return UserError(
        f"figures.names: {figure} needs concept cards of images, the tables have none. Take {figure} out of "
        "figures.names in params.yaml, or set evaluation.concept_cards and train SAEs on a vision source."
    )


def show(ax: Axes, image: np.ndarray) -> None:
    ax.imshow(image, interpolation="nearest", clip_on=False)
    ax.set_axis_off()


def new_page(height: float) -> Figure:
    """As wide as a page; its axes are placed by hand, the same to the last digit every time."""
    figure = style.new_figure(style.TEXT_WIDTH, height)
    figure.set_layout_engine("none")
    return figure


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at inches from the left and the top."""
    across, down = figure.get_size_inches()
    place = (left / across, 1 - (top + height) / down, width / across, height / down)
    return figure.add_axes(place)


def above(ax: Axes, text: str, color: str) -> None:
    """A line of text above a picture that takes no room from its neighbours."""
    ax.annotate(
        text, (0, 1), xycoords="axes fraction", xytext=(0, 3), textcoords="offset points",
        fontsize=6, color=color, va="bottom", in_layout=False, annotation_clip=False,
    )  # fmt: skip
