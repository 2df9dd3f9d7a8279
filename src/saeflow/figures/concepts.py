"""Pictures of concepts: what they look at, and which images need few or many of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from safetensors.numpy import load_file

from saeflow.errors import UserError
from saeflow.figures import style
from saeflow.figures import tables as read
from saeflow.figures.drawing import Drawing
from saeflow.files import read_json

_CARDS = 4  # of each run
_HISTOGRAM = 0.5  # inches
_LABEL = 0.22  # inches
_FADE = 0.6
_OUTLINED = 0.5  # of the largest activation shown
_MOST_RUNS = 4


@dataclass(frozen=True)
class _Pictures:
    run: str
    label: str
    color: str
    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]


def concepts(tables: read.Tables, options: Mapping[str, Any]) -> Drawing:
    """Concept cards: the images that a concept fires on most, where it fires, and how strongly.

    Raises:
        UserError: no run has cards.
    """
    runs = list(_runs(tables, "concepts"))
    cards = [
        (pictures, number)
        for pictures in runs
        for number in range(min(_CARDS, len(pictures.facts["concepts"])))
    ]
    n_images = max(len(pictures.arrays["pixels"][0]) for pictures in runs)
    width = style.TEXT_WIDTH / 2 - 0.1
    side = (width - _HISTOGRAM) / n_images
    line = side + 0.2
    figure = _new_figure(line * -(-len(cards) // 2) + 0.05)
    data = []
    for place, (pictures, number) in enumerate(cards):
        card = pictures.facts["concepts"][number]
        images, masks = pictures.arrays["pixels"][number], pictures.arrays["masks"][number]
        left, top = (place % 2) * (width + 0.2), place // 2 * line + 0.16
        most = max(float(masks.max()), 1e-9)
        for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
            ax = _axes(figure, left + i * side, top, side - 0.04, side - 0.04)
            _picture(ax, faded(image, mask / most))
            _outline(ax, mask / most, image.shape)
            if i == 0:
                _above(ax, _title(pictures, card), pictures.color)
        beside = left + n_images * side + 0.03
        ax = _axes(figure, beside, top, _HISTOGRAM - 0.05, side - 0.1)
        _histogram(ax, card, pictures.color)
        data.append(
            {"run": pictures.run, **{k: v for k, v in card.items() if not isinstance(v, list)}}
        )
    caption = (
        "Concept cards. Each line is one concept: the evaluation images it fires on most, faded where it "
        "fires little and outlined where it fires above half of its largest activation shown, and the histogram of its "
        "activations that are not 0 (logarithmic counts). Title: variant, number of the latent, on how many tokens "
        "it fires, how much of its activation lies on objects, and the nearest of some texts, by what adding the concept's direction does to image embeddings. "
        "Chosen without looking: the largest sums of squared activations, among concepts that fire on at most "
        "10 % of all tokens and, where they fire, on at most a quarter of an image."
        + _covered(runs)
    )
    return Drawing(figure, pd.DataFrame(data), caption)


def simple_to_complex(tables: read.Tables, options: Mapping[str, Any]) -> Drawing:
    """Images by how many latents they use, with how many each patch uses.

    Raises:
        UserError: no run with a varying L0 has pictures.
    """
    runs = [
        pictures
        for pictures in _runs(tables, "simple_to_complex")
        if pictures.facts["shown"][0]["l0"] < pictures.facts["shown"][-1]["l0"] - 1e-6
    ][-_MOST_RUNS:]
    if not runs:
        raise _nothing("simple_to_complex")
    columns = max(len(pictures.facts["shown"]) for pictures in runs)
    side = (style.TEXT_WIDTH - _LABEL) / columns
    line = 2 * side + 0.16
    figure = _new_figure(line * len(runs) + 0.05)
    data = []
    for number, pictures in enumerate(runs):
        used = pictures.arrays["shown_l0"]
        top = number * line + 0.16
        for i, shown in enumerate(pictures.facts["shown"]):
            left = _LABEL + i * side
            ax = _axes(figure, left, top, side - 0.04, side - 0.04)
            _picture(ax, pictures.arrays["shown_pixels"][i])
            objects = shown["objects"]
            tail = "" if objects is None else f", {objects} obj."
            _above(ax, f"L0 {shown['l0']:.1f}{tail}", style.INK)
            below = _axes(figure, left, top + side, side - 0.04, side - 0.04)
            below.imshow(
                used[i], cmap="viridis", vmin=0, vmax=max(1, int(used.max())), clip_on=False
            )
            below.set_axis_off()
            data.append(
                {"run": pictures.run, **{k: v for k, v in shown.items() if not isinstance(v, list)}}
            )
        figure.text(
            0.01, 1 - (top + side) / figure.get_figheight(), pictures.label, rotation=90,
            ha="left", va="center", fontsize=7, color=pictures.color,
        )  # fmt: skip
    caption = (
        "Evaluation images at equal steps from the least to the most active latents per token (mean over "
        "the image's tokens, CLS included), and below each how many latents each of its patches uses "
        "(dark: none, yellow: the most of the line)."
    )
    return Drawing(figure, pd.DataFrame(data), caption)


def _runs(tables: read.Tables, figure: str) -> Iterator[_Pictures]:
    """The first run with pictures of each variant and panel, in the legend's order."""
    saes = tables.wide[read.is_sae(tables.wide)]
    found = False
    for panel in read.panels_of(saes):
        seen: set[str] = set()
        for one in read.series_of(read.one_panel(saes, panel)):
            run = str(one.rows.sort_values("run")["run"].iloc[-1])
            folder: Path = tables.cards / run
            if one.look.label in seen or not (folder / "cards.json").exists():
                continue
            seen.add(one.look.label)
            found = True
            arrays = load_file(folder / "cards.safetensors")
            yield _Pictures(
                run, one.look.label, one.look.color, read_json(folder / "cards.json"), arrays
            )
    if not found:
        raise _nothing(figure)


def _nothing(figure: str) -> UserError:
    return UserError(
        f"figures.names: {figure} needs concept cards of images, the tables have none. Take {figure} out of "
        "figures.names in params.yaml, or set evaluation.concept_cards and train SAEs on a vision source."
    )


def faded(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """An image (height, width, 3) uint8, washed out where a mask (down, across) in [0, 1] is low."""
    rows = np.arange(image.shape[0]) * mask.shape[0] // image.shape[0]
    columns = np.arange(image.shape[1]) * mask.shape[1] // image.shape[1]
    keep = (1 - _FADE * (1 - mask.clip(0, 1)[rows][:, columns]))[..., None]
    return (keep * image + (1 - keep) * 235).round().astype(np.uint8)


def _picture(ax: Axes, image: np.ndarray) -> None:
    ax.imshow(image, interpolation="nearest", clip_on=False)
    ax.set_axis_off()


def _new_figure(height: float) -> Figure:
    """As wide as a page; its axes are placed by hand, the same to the last digit every time."""
    figure = style.new_figure(style.TEXT_WIDTH, height)
    figure.set_layout_engine("none")
    return figure


def _axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at inches from the left and the top."""
    across, down = figure.get_size_inches()
    place = (left / across, 1 - (top + height) / down, width / across, height / down)
    return figure.add_axes(place)


def _covered(runs: list[_Pictures]) -> str:
    shares = {pictures.facts["covered"] for pictures in runs} - {None}
    return "".join(
        f" Objects cover {100 * share:.0f} % of the patches." for share in sorted(shares)
    )


def _above(ax: Axes, text: str, color: str) -> None:
    """A line of text above a picture that takes no room from its neighbours."""
    ax.text(
        0, 1.06, text, transform=ax.transAxes, fontsize=6, color=color, va="bottom", in_layout=False
    )


def _outline(ax: Axes, mask: np.ndarray, shape: tuple[int, ...]) -> None:
    """Lines around the patches where a mask (down, across) is above half."""
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


def _title(pictures: _Pictures, card: Mapping[str, Any]) -> str:
    text = f"{pictures.label} {card['latent']}, fires {100 * card['firing_rate']:.2g} %"
    if "on_objects" in card:
        text += f", {100 * card['on_objects']:.0f} % on objects"
    return text + (f": {card['prompt']} ({card['prompt_cosine']:.2f})" if "prompt" in card else "")


def _histogram(ax: Axes, card: Mapping[str, Any], color: str) -> None:
    if card["histogram"]:
        ax.stairs(card["histogram"], card["edges"], fill=True, color=color)
        ax.set_yscale("log")
        ax.set_ylim(bottom=0.5)
    ax.tick_params(labelsize=5, length=1.5)
    ax.tick_params(axis="y", which="both", left=False, labelleft=False)
    ax.spines["left"].set_visible(False)
    ax.locator_params(axis="x", nbins=2)
