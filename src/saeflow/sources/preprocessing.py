"""From an upright RGB image to what an image model takes, as the model's own Hugging Face processor would do it.

Resizing and cropping are done once, to uint8 pixels; rescaling and normalising each time the model runs. Settings
that the processors of CLIP, SigLIP, ViT, BiT (DINOv2's) and Gemma 3 without its crops do not have are refused. Two other
processors give an image a form that depends on its size, and are read for one form:

- Qwen-VL's leaves an image nearly its size. Here each image is brought to a square of `model.image_size`, which that
  processor then leaves as it is.
- Llama 4's cuts an image into tiles and adds one that shows it whole. Here each image is that one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saeflow.errors import UserError
from saeflow.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

_KINDS = ("CLIP", "Siglip", "ViT", "Bit", "Gemma3", "Llama4", "Qwen2VL")
"""Families of processors that do the same with other defaults: resize, crop, rescale, normalise, in that order."""
_TILES, _ANY_SIZE = "Llama4", "Qwen2VL"
_ENDINGS = ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
_SETTINGS = {
    "crop_size", "default_to_square", "do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize",
    "image_mean", "image_std", "resample", "rescale_factor", "size", "use_square_size",
}  # fmt: skip
_OWN = {
    _TILES: {"max_patches", "resize_to_max_canvas"},
    _ANY_SIZE: {"max_pixels", "merge_size", "min_pixels", "patch_size", "temporal_patch_size"},
}
"""Settings that one family of processors has beside those."""
_WITHOUT_EFFECT = {
    "_image_processor_type", "_processor_class", "_valid_processor_keys", "device", "disable_grouping",
    "feature_extractor_type", "image_processor_type", "image_seq_length", "input_data_format", "processor_class", "return_tensors",
}  # fmt: skip
_BILINEAR = 2
_FILTERS = range(6)
"""PIL's numbers of resampling filters."""
_SIZES = ("shortest_edge", "longest_edge", "height", "width", "max_height", "max_width")
MOST_SIDE = 1 << 14
MOST_RESIZED = 1 << 24
"""Pixels; of a larger resized image only the centre that is cut out is computed."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """An image model's preprocessing."""

    size: int | tuple[int, int] | None
    """Pixels of the shorter side, or (height, width), to resize to; None does not resize."""
    crop: tuple[int, int] | None
    """(height, width) to cut out of the centre, zeros around what is smaller; None does not crop."""
    height: int
    width: int
    resample: int
    """PIL's number of the filter."""
    factor: float | None
    """Factor of pixels (0..255); None leaves them."""
    mean: tuple[float, ...] | None
    """Mean of each channel; None does not normalise."""
    std: tuple[float, ...] | None
    patch: int
    prefix: int
    """Positions of the model before the first patch: 1 with a CLS token, more with registers."""
    d_model: int = 0
    """Width of the tower's residual stream."""
    any_size: bool = False
    """The model takes images of any size; this is the one that was asked for."""
    half: bool = False
    """Rescaling and normalising are rounded to bfloat16, as Llama 4's processor does."""

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.height // self.patch, self.width // self.patch


def load_preprocessing(model: Path, *, choose: bool = False) -> Preprocessing:
    """Read what a fetched image model wants of an image.

    Args:
        model: its folder.
        choose: let a model that takes images of any size have a usual one, where none is asked for.

    Raises:
        UserError: its preprocessor_config.json is missing, does not fit the model, or asks for something else than
            the known processors do.
    """
    from transformers import CLIPImageProcessorPil

    from saeflow.sources.architectures import image_part
    from saeflow.sources.loading import one_line
    from saeflow.sources.models import LOADING, config_in, model_folder, pinned_files
    from saeflow.sources.structure import image_tower

    config = config_in(model_folder(model, weights=False))
    part = image_part(config)
    advice = "Add or fix the model's preprocessor_config.json."
    asked = read_json(model / LOADING).get("image_size") if (model / LOADING).exists() else None
    with (
        pinned_files(model, weights=False) as (local, files),
        one_line(f"{local}: no preprocessing for images", advice),
    ):
        raw, _ = CLIPImageProcessorPil.get_image_processor_dict(files, local_files_only=True)
        kind = _kind(raw, config.model_type, local)
        known = _SETTINGS | _WITHOUT_EFFECT | _OWN.get(kind, set())
        unknown = {
            key: value
            for key, value in raw.items()
            if key not in known
            and value not in (None, False)
            and (key, value) != ("data_format", "channels_first")
        }
        if unknown:
            raise UserError(
                f"{local}: its preprocessor_config.json asks for {unknown}, which the image processors of "
                f"{', '.join(_KINDS)} do not do. Take it out, or give another model."
            )
        if asked is not None and kind != _ANY_SIZE:
            raise UserError(
                f"model.image_size: expected none, as {local} has images of one size (preprocessor_config.json), found "
                f"{asked}. Leave it out."
            )
        processor = _processor(kind, raw, files)
        if kind == _ANY_SIZE:
            _to_square(processor, asked, part, local, choose=choose)
        found = _preprocessing(processor, int(part.patch_size), local)
    try:
        image = image_tower(config, found.height, found.width)
    except UserError as error:
        raise error.within(local) from None
    return replace(
        found, prefix=image.prefix, d_model=image.d_model, half=kind == _TILES, any_size=kind == _ANY_SIZE
    )  # fmt: skip


def _kind(raw: Mapping[str, Any], model_type: str, where: Path) -> str:
    """The family of the processor that a preprocessor_config.json names.

    Raises:
        UserError: it is none of the known ones.
    """
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    of_family = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type, {})
    name = (
        raw.get("image_processor_type") or raw.get("feature_extractor_type") or of_family.get("pil")
    )
    for kind in _KINDS:
        if name in [f"{kind}{ending}" for ending in _ENDINGS]:
            return kind
    raise UserError(
        f"{where}: expected an image processor of {', '.join(_KINDS)} (such as {_KINDS[0]}{_ENDINGS[0]}), found {name!r}. "
        "Give a model whose preprocessor_config.json is of one of them."
    )


def _processor(kind: str, raw: Mapping[str, Any], files: Path) -> Any:
    """The processor of transformers; Llama 4's runs on torchvision alone, and its settings are read by one like it."""
    import transformers

    if kind != _TILES:
        own = getattr(transformers, f"{kind}ImageProcessorPil")
        return own.from_pretrained(files, local_files_only=True)
    defaults = {"size": {"height": 336, "width": 336}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": _BILINEAR}  # fmt: skip
    given = {key: value for key, value in raw.items() if key in _SETTINGS and value is not None}
    return transformers.SiglipImageProcessorPil(**(defaults | given))


def _to_square(processor: Any, side: int | None, part: Any, where: Path, *, choose: bool) -> None:
    """Let a processor that takes any size bring images to a square: the shorter side to its own, then its middle.

    Raises:
        UserError: no side is asked for, or one that the model's own processor would change, or other patches than the model's.
    """
    from transformers.image_utils import SizeDict

    from saeflow.sources.towers import side_of

    for name, own in (
        ("patch_size", part.patch_size), ("merge_size", part.spatial_merge_size),
        ("temporal_patch_size", part.temporal_patch_size),
    ):  # fmt: skip
        if getattr(processor, name) != own:
            raise UserError(
                f"{where}: {name}: expected {own} (config.json), found {getattr(processor, name)} (preprocessor_config.json). "
                "Fix one of them."
            )
    unit, least, most = side_of(part), processor.size.shortest_edge, processor.size.longest_edge
    sides = (
        -(-math.isqrt(max(least - 1, 0)) // unit) * unit or unit,
        math.isqrt(most) // unit * unit,
    )
    usual = min(max(sides[0], 16 * unit), sides[1])
    side = usual if choose and side is None else side
    if side is None or side % unit or not least <= side * side <= most:
        raise UserError(
            f"model.image_size: expected a multiple of {unit} from {sides[0]} to {sides[1]}, the side in pixels of the square that "
            f"images are brought to, as {where} takes images of any size, found {side}. Set it, such as "
            f"{usual}."
        )
    processor.do_resize = processor.do_center_crop = True
    processor.size = SizeDict(shortest_edge=side)
    processor.crop_size = SizeDict(height=side, width=side)


def _preprocessing(processor: Any, patch: int, where: Path) -> Preprocessing:
    _check_settings(processor, where)
    size: int | tuple[int, int] | None = None
    if processor.do_resize:
        edges = {name: edge for name in _SIZES if (edge := getattr(processor.size, name, None))}
        if edges.keys() == {"shortest_edge"}:
            size = int(edges["shortest_edge"])
        elif edges.keys() == {"height", "width"}:
            size = int(edges["height"]), int(edges["width"])
        else:
            raise UserError(
                f"{where}: size: expected shortest_edge, or height and width (preprocessor_config.json), found {edges}. "
                "Fix it."
            )
    crop = None
    if processor.do_center_crop:
        crop = int(processor.crop_size.height), int(processor.crop_size.width)
    out = crop or size
    if not isinstance(out, tuple):
        raise UserError(
            f"{where}: its images come out in different sizes (preprocessor_config.json: do_resize "
            f"{processor.do_resize}, do_center_crop {processor.do_center_crop}, size {size}). Set a crop, or a size "
            "with height and width."
        )
    resample = _BILINEAR if processor.resample is None else int(processor.resample)
    if processor.do_resize and processor.resample is None:  # as transformers does
        raise UserError(
            f"{where}: resample: expected a filter of PIL with do_resize (preprocessor_config.json), found null. Fix it."
        )
    if resample not in _FILTERS:
        raise UserError(
            f"{where}: resample: expected a filter of PIL, 0 to {_FILTERS[-1]} (preprocessor_config.json), found "
            f"{resample}. Fix it."
        )
    mean = std = None
    if processor.do_normalize:
        mean, std = _channels(processor.image_mean), _channels(processor.image_std)
        if len(mean) != 3 or len(std) != 3 or 0 in std:
            raise UserError(
                f"{where}: expected image_mean and image_std of three channels, std above 0 "
                f"(preprocessor_config.json), found {mean} and {std}. Fix them."
            )
    return Preprocessing(
        size=size, crop=crop, height=out[0], width=out[1], resample=resample,
        factor=float(processor.rescale_factor) if processor.do_rescale else None,
        mean=mean, std=std, patch=patch, prefix=0,
    )  # fmt: skip


def _check_settings(processor: Any, where: Path) -> None:
    """Refuse a setting of another type than transformers writes, which Python would read as some number."""

    def refuse(name: str, expected: str, found: Any) -> None:
        raise UserError(
            f"{where}: {name}: expected {expected} (preprocessor_config.json), found {str(found)[:80]!r}. Fix it."
        )

    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"):
        flag = getattr(processor, name, None)
        if flag is not None and not isinstance(flag, bool):
            refuse(name, "true or false", flag)
    for name in ("size", "crop_size"):
        for side in _SIZES:
            edge = getattr(getattr(processor, name, None), side, None)
            if edge is not None and not (type(edge) is int and 1 <= edge <= MOST_SIDE):
                refuse(f"{name}.{side}", f"a whole number of pixels up to {MOST_SIDE}", edge)
    resample = processor.resample
    if resample is not None and (isinstance(resample, bool) or not isinstance(resample, int)):
        refuse("resample", "the number of a filter of PIL", resample)
    for name in ("rescale_factor", "image_mean", "image_std"):
        value = getattr(processor, name, None)
        if not all(map(_is_finite, value if isinstance(value, list | tuple) else [value])):
            refuse(name, "finite numbers", value)


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (is_number and math.isfinite(value))


def _channels(value: Any) -> tuple[float, ...]:
    return (float(value),) * 3 if isinstance(value, int | float) else tuple(map(float, value))


def fit(image: Any, preprocessing: Preprocessing) -> np.ndarray:
    """Resize and crop an RGB image of PIL: (height, width, 3) uint8.

    Memory does not depend on the shape of what a long, thin image is resized to.
    """
    size = _resized(image.size, preprocessing.size)
    resample, crop = preprocessing.resample, preprocessing.crop
    if crop is None:
        return np.asarray(image.resize(size, resample=resample))
    left, top = (size[0] - crop[1]) // 2, (size[1] - crop[0]) // 2
    if preprocessing.size is None:
        done = image
    elif size[0] * size[1] <= MOST_RESIZED:
        done = image.resize(size, resample=resample)
    else:
        box = (max(left, 0), max(top, 0), min(left + crop[1], size[0]), min(top + crop[0], size[1]))
        across, down = image.size[0] / size[0], image.size[1] / size[1]
        source = (box[0] * across, box[1] * down, min(box[2] * across, image.size[0]), min(box[3] * down, image.size[1]))  # fmt: skip
        done = image.resize((box[2] - box[0], box[3] - box[1]), resample=resample, box=source)
        left, top = left - box[0], top - box[1]
    return np.asarray(done.crop((left, top, left + crop[1], top + crop[0])))


def _resized(size: tuple[int, int], wanted: int | tuple[int, int] | None) -> tuple[int, int]:
    """(width, height) of an image after resizing."""
    width, height = size
    if wanted is None:
        return size
    if isinstance(wanted, tuple):
        return wanted[1], wanted[0]
    longer = int(wanted * max(size) / min(size))
    return (wanted, longer) if width <= height else (longer, wanted)


def normalised(pixels: "Tensor", preprocessing: Preprocessing) -> "Tensor":
    """Normalise pixels (n, height, width, 3) uint8 to what the model takes: (n, 3, height, width) float32.

    A table of all 256 values holds the arithmetic of transformers' numpy functions, bit for bit, on any device; of Llama 4's
    processor that of torch in bfloat16.
    """
    import torch

    if preprocessing.half:
        return _looked_up(pixels, _half_table(preprocessing))
    values = np.arange(256, dtype=np.uint8)
    if preprocessing.factor is not None:
        values = (values.astype(np.float64) * preprocessing.factor).astype(np.float32)
    table = np.repeat(values.astype(np.float32)[None], 3, axis=0)  # (channel, value)
    if preprocessing.mean is not None and preprocessing.std is not None:
        mean, std = (np.array(v, np.float32) for v in (preprocessing.mean, preprocessing.std))
        table = (table - mean[:, None]) / std[:, None]
    return _looked_up(pixels, torch.from_numpy(table))


def _half_table(preprocessing: Preprocessing) -> "Tensor":
    """(3, 256) values of pixels, each step rounded to bfloat16 where both steps are taken."""
    import torch

    values, factor = torch.arange(256.0).expand(3, -1), preprocessing.factor
    mean, std = preprocessing.mean, preprocessing.std
    if factor is not None:
        values = values.bfloat16() * factor if mean else values * factor
    if mean is not None and std is not None:
        shift, scale = (torch.tensor(v, dtype=values.dtype)[:, None] for v in (mean, std))
        values = (values - shift) / scale
    return values.float()


def _looked_up(pixels: "Tensor", table: "Tensor") -> "Tensor":
    """(n, 3, height, width) the values that a table (channel, pixel's value) has for pixels."""
    import torch

    of_channel = table.to(pixels.device)
    n, height, width, _ = pixels.shape
    out = torch.empty(n, 3, height, width, device=pixels.device)
    for channel in range(3):
        chosen = pixels[..., channel].reshape(-1).int()
        out[:, channel] = of_channel[channel].index_select(0, chosen).view(n, height, width)
    return out
