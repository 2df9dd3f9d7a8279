"""Colours: one per variant, told apart by everyone."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saeflow.figures import style
from saeflow.tables.schema import axis_label

# Machado, Oliveira & Fernandes 2009, severity 1.0, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}  # fmt: skip
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(color: str) -> np.ndarray:
    c = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = TO_XYZ @ np.clip(rgb, 0, 1) / np.array([0.9505, 1, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", list(VISION))
def test_variants_differ_in_colour_for_every_kind_of_vision(vision: str) -> None:
    seen = {name: lab(VISION[vision] @ linear(v.color)) for name, v in style.VARIANTS.items()}
    close = {
        pair: float(np.linalg.norm(seen[pair[0]] - seen[pair[1]]))
        for pair in itertools.combinations(seen, 2)
    }
    assert min(close.values()) > 14, min(close, key=lambda pair: close[pair])
    if vision == "normal":
        assert min(close.values()) > 23


def test_every_planned_variant_has_a_colour_and_marker_of_its_own() -> None:
    planned = {
        "relu", "topk", "batch_topk", "gated", "jumprelu", "matryoshka", "p_anneal", "soft_topk",
        "adaptive_k", "sparsemax", "entmax", "feature_choice", "matching_pursuit", "top_afa", "abs_topk",
    }  # fmt: skip
    assert planned == set(style.VARIANTS)
    looks = style.VARIANTS.values()
    assert len({look.color for look in looks}) == len({look.marker for look in looks}) == 15


def test_baselines_are_grey_and_the_random_decoder_is_one() -> None:
    for look in style.BASELINES.values():
        assert len({look.color[i : i + 2] for i in (1, 3, 5)}) == 1
    assert style.look("topk", "random-decoder") == style.BASELINES["random-decoder"]
    assert style.look("topk", "synthetic-random-decoder") == style.BASELINES["random-decoder"]
    assert style.look("topk", "topk") == style.VARIANTS["topk"]


def test_a_variant_added_later_has_a_fixed_look_of_its_own() -> None:
    look = style.look("my_variant")
    assert look == style.look("my_variant", "some-entry")
    assert look.label == "my variant"
    assert look.color not in {known.color for known in style.VARIANTS.values()}


def test_axis_labels_have_units() -> None:
    assert axis_label("ce_degradation") == "cross-entropy degradation (nats/token)"
    assert axis_label("some_new_metric") == "some new metric"


@pytest.mark.parametrize(
    ("value", "text"), [(8, "8"), (0.05, "0.05"), (9_999, "9999"), (12_000, "12k"), (2.5e6, "2.5M")]
)
def test_ticks_are_written_plainly(value: float, text: str) -> None:
    assert style.plain(value) == text


@pytest.mark.parametrize(
    ("high", "labels"),
    [
        (13_000, ["0", "5k", "10k"]), (9_000, ["0", "3000", "6000", "9000"]), (1.3e6, ["0", "0.5M", "1M"]), (3, ["0", "1", "2", "3"]),
    ],
)  # fmt: skip
def test_ticks_of_one_axis_have_one_unit(high: float, labels: list[str]) -> None:
    with style.context():
        figure = style.new_figure(3, 2)
        ax = figure.subplots()
        style.even_ticks(ax.xaxis, 3)
        ax.set_xlim(0, high)
        figure.canvas.draw()
        shown = [text.get_text() for text in ax.get_xticklabels() if text.get_position()[0] <= high]
    assert shown == labels


def test_style_leaves_the_users_settings_alone() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    with style.context():
        assert mpl.rcParams["svg.hashsalt"] == "saeflow"
    assert dict(mpl.rcParams) == before


def test_a_mark_is_printed_across_all_three_formats(tmp_path: Path) -> None:
    def red(path: Path) -> float:
        """Share of pixels that the mark tints."""
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        return float((pixels[..., 0] - pixels[..., 1:].max(-1) > 30).mean())

    sizes = {}
    for mark in ("", "REHEARSAL"):
        with style.context():
            figure = style.new_figure(style.TEXT_WIDTH, 2)
            figure.subplots().plot([0, 1], [0, 1], color="black")
            style.save(figure, tmp_path / f"m{mark}", mark)
        sizes[mark] = [(tmp_path / f"m{mark}{kind}").stat().st_size for kind in (".svg", ".pdf")]
    assert red(tmp_path / "m.png") == 0
    assert 0.02 < red(tmp_path / "mREHEARSAL.png") < 0.4
    assert all(with_ > without for without, with_ in zip(*sizes.values(), strict=True))


def test_a_caption_names_the_mark_first() -> None:
    assert style.marked("FVU against L0.", "REHEARSAL") == "REHEARSAL. FVU against L0."
    assert style.marked("FVU against L0.", "") == "FVU against L0."
