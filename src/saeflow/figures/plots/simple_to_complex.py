"""Images by how many latents they use, with how many each patch uses."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from saeflow.figures import style
from saeflow.figures.figure import Drawing, Figure
from saeflow.figures.needs import CARDS, Need
from saeflow.figures.pictures import above, axes_at, new_page, pictured, show, without_cards
from saeflow.tables.load import Tables

_LABEL = 0.22  # inches
_MOST_RUNS = 4


def draw(tables: Tables, options: Mapping[str, Any]) -> Drawing:
    """Images by how many latents they use, with how many each patch uses.

    Raises:
        UserError: no run with a varying L0 has pictures.
    """
    runs = [
        pictures
        for pictures in pictured(tables, "simple_to_complex")
        if pictures.facts["shown"][0]["l0"] < pictures.facts["shown"][-1]["l0"] - 1e-6
    ][-_MOST_RUNS:]
    if not runs:
        raise without_cards("simple_to_complex")
    columns = max(len(pictures.facts["shown"]) for pictures in runs)
    side = (style.TEXT_WIDTH - _LABEL) / columns
    of_patches = any(pictures.arrays["shown_l0"].any() for pictures in runs)
    of_panels = len({pictures.panel for pictures in runs}) > 1
    high = side * (1 + of_patches)
    line = high + 0.16
    figure = new_page(line * len(runs) + 0.05)
    data = []
    for number, pictures in enumerate(runs):
        used = pictures.arrays["shown_l0"]
        top = number * line + 0.16
        for i, shown in enumerate(pictures.facts["shown"]):
            left = _LABEL + i * side
            ax = axes_at(figure, left, top, side - 0.04, side - 0.04)
            show(ax, pictures.arrays["shown_pixels"][i])
            objects = shown["objects"]
            tail = "" if objects is None else f", {objects} obj."
            above(ax, f"L0 {shown['l0']:.1f}{tail}", style.INK)
            if of_patches:
                below = axes_at(figure, left, top + side, side - 0.04, side - 0.04)
                below.imshow(
                    used[i], cmap="viridis", vmin=0, vmax=max(1, int(used.max())), clip_on=False
                )
                below.set_axis_off()
            data.append(
                {"run": pictures.run, **{k: v for k, v in shown.items() if not isinstance(v, list)}}
            )
        where = f"\n{pictures.panel.evaluated_on}" if of_panels else ""
        label = f"{pictures.label}{where}"
        figure.text(
            0.002, 1 - (top + high / 2) / figure.get_figheight(), label, rotation=90,
            ha="left", va="center", fontsize=6, color=pictures.color, linespacing=1.05,
        )  # fmt: skip
    caption = "Evaluation images at equal steps from the least to the most active latents per token"
    if of_patches:
        caption += (
            " (mean over the image's tokens, CLS included), and below each how many latents each of its patches "
            "uses (dark: none, yellow: the most of the line)"
        )
    caption += "."
    return Drawing(figure, pd.DataFrame(data), caption)


FIGURE = Figure(
    title="Images from the simplest to the most complex",
    draw=draw,
    needs=Need(
        f"{CARDS.what}, and a variant whose L0 varies",
        lambda asked: asked.cards() and asked.varying(),
    ),
)
