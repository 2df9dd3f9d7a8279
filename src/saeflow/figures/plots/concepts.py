"""Concept cards: the images that a concept fires on most, where it fires, and how strongly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from saeflow.figures import style
from saeflow.figures.figure import Drawing, Figure
from saeflow.figures.needs import CARDS
from saeflow.figures.pictures import Pictures, above, axes_at, new_page, pictured, show
from saeflow.tables.load import Tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CARDS = 4  # of each run
_HISTOGRAM = 0.5  # inches
_BETWEEN = 0.2  # inches from the images of a line to those of the next
_FADE = 0.6
_OUTLINED = 0.5  # of the largest activation shown
_KEY = 0.42  # inches below the cards, for the key of the masks


def draw(tables: Tables, options: Mapping[str, Any]) -> Drawing:
    """Concept cards: the images that a concept fires on most, where it fires, and how strongly.

    Raises:
        UserError: no run has cards.
    """
    runs = list(pictured(tables, "concepts"))
    cards = [
        (pictures, number)
        for pictures in runs
        for number in range(min(_CARDS, len(pictures.facts["concepts"])))
    ]
    n_images = max(len(pictures.arrays["pixels"][0]) for pictures in runs)
    width = style.TEXT_WIDTH / 2 - 0.1
    lines = -(-len(cards) // 2)
    side = min(
        (width - _HISTOGRAM) / n_images, (style.PAGE_HEIGHT - 0.05 - _KEY) / lines - _BETWEEN
    )
    line = side + _BETWEEN
    figure = new_page(line * lines + 0.05 + _KEY)
    _key(axes_at(figure, style.TEXT_WIDTH - 2.1, line * lines + 0.1, 2.0, 0.09))
    data = []
    for place, (pictures, number) in enumerate(cards):
        card = pictures.facts["concepts"][number]
        images, masks = pictures.arrays["pixels"][number], pictures.arrays["masks"][number]
        left, top = (place % 2) * (width + 0.2), place // 2 * line + 0.16
        most = max(float(masks.max()), 1e-9)
        for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
            ax = axes_at(figure, left + i * side, top, side - 0.04, side - 0.04)
            show(ax, faded(image, mask / most))
            _outline(ax, mask / most, image.shape)
            if i == 0:
                above(ax, _title(pictures, card), pictures.color)
        beside = left + n_images * side + 0.03
        ax = axes_at(figure, beside, top, _HISTOGRAM - 0.05, side - 0.1)
        _histogram(ax, card, pictures.color)
        data.append(
            {"run": pictures.run, **{k: v for k, v in card.items() if not isinstance(v, list)}}
        )
    caption = (
        "Concept cards. Each line is one concept: the evaluation images it fires on most, faded where it "
        "fires little and outlined where it fires above half of its largest activation shown (key at the bottom), and the histogram of its "
        "activations that are not 0 (logarithmic counts). Title: variant, number of the latent, on how many tokens "
        "it fires, how much of its activation lies on objects, and the nearest of some texts with its cosine, by what adding the concept's "
        "direction does to image embeddings. The class token (CLS), which stands for the whole image, is no part of the masks. "
        "Chosen without looking: the largest sums of squared activations, among concepts that fire on at most "
        "10 % of all tokens and, where they fire, on at most a quarter of an image."
        + _named(cards)
        + _covered(runs)
    )
    return Drawing(figure, pd.DataFrame(data), caption)


def faded(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """An image (height, width, 3) uint8, washed out where a mask (down, across) in [0, 1] is low."""
    rows = np.arange(image.shape[0]) * mask.shape[0] // image.shape[0]
    columns = np.arange(image.shape[1]) * mask.shape[1] // image.shape[1]
    keep = (1 - _FADE * (1 - mask.clip(0, 1)[rows][:, columns]))[..., None]
    result: np.ndarray = (keep * image + (1 - keep) * 235).round().astype(np.uint8)
    return result


def _outline(ax: Axes, mask: np.ndarray, shape: tuple[int, ...]) -> None:
    """Lines around the patches where a mask (down, across) is above half."""
    from matplotlib.collections import LineCollection

    on = np.pad(mask >= _OUTLINED, 1)
    step_y, step_x = shape[0] / mask.shape[0], shape[1] / mask.shape[1]
    lines = [
        [((j - 1) * step_x - 0.5, y * step_y - 0.5), (j * step_x - 0.5, y * step_y - 0.5)]
        for y, j in np.argwhere(on[1:] != on[:-1])
    ] + [
        [(x * step_x - 0.5, (i - 1) * step_y - 0.5), (x * step_x - 0.5, i * step_y - 0.5)]
        for i, x in np.argwhere(on[:, 1:] != on[:, :-1])
    ]
    ax.add_collection(LineCollection(lines, colors="#FF00C8", linewidths=0.8, clip_on=False))


def _key(ax: Axes) -> None:
    """Draw how an image looks under each share of the largest activation shown."""
    steps = np.linspace(0, 1, 21)[None]
    image = np.broadcast_to(np.array([40, 70, 120], dtype=np.uint8), (1, steps.size, 3))
    show(ax, faded(image, steps))
    ax.set_aspect("auto")
    _outline(ax, steps, image.shape)
    ax.set_axis_on()
    ax.spines[:].set_visible(False)
    ax.set_yticks([])
    ax.set_xticks([0, steps.size // 2, steps.size - 1], ["0", "0.5", "1"])
    ax.tick_params(labelsize=5, length=1.5)
    ax.set_xlabel("activation / the largest shown of the concept", fontsize=6, labelpad=1)


def _title(pictures: Pictures, card: Mapping[str, Any]) -> str:
    text = f"{pictures.label} {card['latent']}, fires {100 * card['firing_rate']:.2g} %"
    if "on_objects" in card:
        text += f", {100 * card['on_objects']:.0f} % on objects"
    return text + (f": {card['prompt']} ({card['prompt_cosine']:.2f})" if _is_named(card) else "")


def _is_named(card: Mapping[str, Any]) -> bool:
    """A text is shown only where it is nearer than shuffled texts come."""
    return "prompt" in card and card["prompt_cosine"] > card["prompt_shuffled"]


def _named(cards: list[tuple[Pictures, int]]) -> str:
    shown = [pictures.facts["concepts"][number] for pictures, number in cards]
    compared = sum("prompt" in card for card in shown)
    if not compared:
        return ""
    return (
        " A text stands only where its cosine is above what the nearest of as many shuffled texts reaches in 95 % of the "
        f"shuffles: {sum(map(_is_named, shown))} of {compared} concepts."
    )


def _histogram(ax: Axes, card: Mapping[str, Any], color: str) -> None:
    if card["histogram"]:
        ax.stairs(card["histogram"], card["edges"], fill=True, color=color)
        ax.set_yscale("log")
        ax.set_ylim(bottom=0.5)
        ends = (card["edges"][0], card["edges"][-1])
        ax.set_xlim(*ends)
        decimals = max(0, 1 - math.floor(math.log10(max(ends[1] - ends[0], 1e-9))))
        ax.set_xticks(ends, [f"{end:.{decimals}f}" for end in ends])
        first, last = ax.get_xticklabels()
        first.set_horizontalalignment("left")
        last.set_horizontalalignment("right")
    ax.tick_params(labelsize=5, length=1.5)
    ax.tick_params(axis="y", which="both", left=False, labelleft=False)
    ax.spines["left"].set_visible(False)


def _covered(runs: list[Pictures]) -> str:
    shares = {pictures.facts["covered"] for pictures in runs} - {None}
    return "".join(
        f" Objects cover {100 * share:.0f} % of the patches." for share in sorted(shares)
    )


FIGURE = Figure(title="Concepts on images", draw=draw, needs=CARDS)
