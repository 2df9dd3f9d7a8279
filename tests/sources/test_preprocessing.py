"""The model's input equals that of its own Hugging Face processor, or the setting is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil

from saeflow.errors import UserError
from saeflow.sources import preprocessing
from saeflow.sources.preprocessing import fit, load_preprocessing, normalised

SIZE = 32
DEFAULTS: dict[str, Any] = {
    "size": {"shortest_edge": SIZE},
    "crop_size": {"height": SIZE, "width": SIZE},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "as they come": {},
    "size and crop as numbers": {"size": SIZE, "crop_size": SIZE},
    "both sides": {"size": {"height": SIZE, "width": SIZE}},
    "both sides, no crop": {"size": {"height": SIZE, "width": SIZE}, "do_center_crop": False},
    "a square from one number": {"size": SIZE, "default_to_square": True, "do_center_crop": False},
    "a larger side, then a crop": {"size": {"shortest_edge": 43}},
    "a smaller side, then zeros around": {"size": {"shortest_edge": 21}},
    "other sides, then a crop": {"size": {"height": 40, "width": 35}},
    "no resizing": {"do_resize": False},
    "no normalising": {"do_normalize": False},
    "another factor": {"rescale_factor": 1 / 127.5},
    "no factor": {"do_rescale": False},
    "neither": {"do_rescale": False, "do_normalize": False},
    "one mean for all": {"image_mean": 0.5, "image_std": 0.25},
    "other means": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    "an older name": {"feature_extractor_type": "CLIPFeatureExtractor", "image_processor_type": None},
    **{f"filter {number}": {"resample": number} for number in (0, 1, 2, 4, 5)},
}  # fmt: skip
SHAPES = [(64, 64), (90, 41), (33, 120), (32, 32), (20, 17), (1, 1), (3, 700)]


def model_folder(folder: Path, settings: dict[str, Any], nested: bool = False) -> Path:
    """Config and preprocessing of a CLIP model, as their files are written."""
    vision = {"image_size": SIZE, "patch_size": 8}
    CLIPConfig(vision_config=vision).save_pretrained(folder)
    held = CLIPImageProcessorPil(**DEFAULTS).to_dict() | settings
    if nested:
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": held}))
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(held))
    return folder


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_gives_the_processors_own_pixels(name: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path, SETTINGS[name])
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    found = load_preprocessing(folder)
    for shape in SHAPES:
        image = picture(*shape)
        expected = processor(images=image, return_tensors="np")["pixel_values"]
        got = normalised(torch.from_numpy(fit(image, found)[None]), found).numpy()
        assert np.array_equal(got, expected.astype(np.float32)), shape


def test_settings_inside_a_processors_config_are_read(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, {"do_normalize": False, "resample": 0}, nested=True)
    found = load_preprocessing(folder)
    assert (found.mean, found.std, found.resample) == (None, None, 0)


@pytest.mark.parametrize("resample", range(6))
@pytest.mark.parametrize("shape", [(40, 900), (900, 41), (64, 64), (20, 17), (1, 5000)])
def test_cutting_out_before_resizing_shows_the_same(
    shape: tuple[int, int], resample: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A smooth picture; Pillow may take rows and columns in another order, and round between."""
    down, across = np.mgrid[: shape[1], : shape[0]]
    waves = [128 + 100 * np.sin((down + across * k) / 9 + k) for k in range(3)]
    image = Image.fromarray(np.stack(waves, -1).astype(np.uint8))
    for side in (21, 32, 43):
        settings = {"size": {"shortest_edge": side}, "resample": resample}
        found = load_preprocessing(model_folder(tmp_path, settings))
        whole = fit(image, found)
        with monkeypatch.context() as patch:
            patch.setattr(preprocessing, "MOST_RESIZED", 0)
            part = fit(image, found)
        one_pixel = (
            100 * 3 / 9 + 1
        )  # what is in the middle of two may be either, without interpolation
        most = one_pixel if resample in (Image.Resampling.NEAREST, Image.Resampling.BOX) else 2
        assert np.abs(whole.astype(int) - part).max() <= most


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"image_processor_type": "LevitImageProcessor"},
            "expected an image processor of CLIP, Siglip",
        ),
        (
            {"do_pad": True},
            r"asks for \{'do_pad': True\}, which the image processors of CLIP, .* do not do",
        ),
        ({"do_flip_channel_order": True}, "do_flip_channel_order"),
        ({"crop_pct": 0.875}, "crop_pct"),
        ({"data_format": "channels_last"}, "data_format"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "size: expected shortest_edge, or"),
        ({"size": {"max_height": 32, "max_width": 32}}, "size: expected shortest_edge, or"),
        ({"do_center_crop": False}, "its images come out in different sizes"),
        ({"do_center_crop": False, "do_resize": False}, "its images come out in different sizes"),
        ({"size": {"height": 30, "width": 32}, "do_center_crop": False}, "found a crop of 30 x 32"),
        ({"resample": 7}, "no preprocessing for images|resample: expected a filter of PIL"),
        ({"image_std": [0.1, 0, 0.1]}, "std above 0"),
        ({"image_mean": [0.1, 0.1]}, "three channels"),
        ({"image_mean": "grey"}, "image_mean: expected finite numbers"),
    ],
)
def test_what_clips_processors_do_not_have_is_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        load_preprocessing(model_folder(tmp_path, settings))
