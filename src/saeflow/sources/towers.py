"""An image tower from outside: the images that it is made for, the form in which it takes them, and what it gives."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from saeflow.errors import UserError
from saeflow.sources.architectures import image_part, tower_of
from saeflow.sources.layouts import VISION

_GRID = "grid_thw"
"""Argument of a tower that takes patches of images of any size: frames, and patches down and across, of each image."""


def pair(size: Any) -> tuple[int, int]:
    """(height, width) of a size that may be one number."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def takes_any_size(tower: Any) -> bool:
    """Tell whether a tower takes patches of images of any size (Qwen-VL's), in place of pixels."""
    known = inspect.signature(tower.forward).parameters
    parts = ("patch_size", "spatial_merge_size", "temporal_patch_size")
    return _GRID in known and all(hasattr(tower.config, part) for part in parts)


def side_of(config: Any) -> int:
    """Pixels that the sides of a tower's images are multiples of, where it takes images of any size."""
    return int(config.patch_size) * int(config.spatial_merge_size)


def image_size(model: Any) -> tuple[int, int]:
    """(height, width) of the images that a model's tower is made for; small ones where it takes any size.

    Raises:
        UserError: it has no tower, or one that takes something else than pixels.
    """
    name, tower, part = type(model).__name__, tower_of(model), image_part(model.config)
    if takes_any_size(tower):
        return pair(2 * side_of(tower.config))
    size = getattr(part, "image_size", None)
    has_pixels = "pixel_values" in inspect.signature(tower.forward).parameters
    if size is None and not has_pixels:
        raise UserError(
            f"{name}: expected a model with an image tower, found none that takes images. Leave {VISION} out of the hook "
            "point, or take a model of images."
        )
    if size is None or not has_pixels:
        takes = ", ".join(list(inspect.signature(tower.forward).parameters)[:2])
        raise UserError(
            f"{name}: expected an image tower that takes pixel_values of a fixed image_size, found "
            f"{type(tower).__name__}, which takes {takes} (image_size {size}). Take another model of images."
        )
    return pair(size)


def tower_output(tower: Any, pixels: Tensor, **asked: Any) -> Any:
    """Run a tower on images (batch, 3, height, width) of one size.

    Args:
        tower: of `tower_of`.
        pixels: normalised.
        asked: further arguments, such as `output_hidden_states`.
    """
    pixels = pixels.to(tower.dtype)
    if not takes_any_size(tower):
        return tower(pixel_values=pixels, **asked)
    with _known_integers(tower):
        return tower(patches(pixels, tower.config), **{_GRID: _grid(pixels, tower.config)}, **asked)


def image_output(model: Any, pixels: Tensor) -> Tensor:
    """Output of an image tower, given pixels (batch, 3, height, width).

    Of a model with a text tower the embeddings (batch, d_embedding), of another the final hidden states (batch, position,
    d_model), in the tower's own order of positions.
    """
    if hasattr(model, "get_text_features"):
        embedding: Tensor = model.get_image_features(pixel_values=pixels).pooler_output
        return embedding
    hidden: Tensor = tower_output(tower_of(model), pixels).last_hidden_state
    return hidden if hidden.ndim > 2 else hidden.reshape(len(pixels), -1, hidden.shape[-1])


def patches(pixels: Tensor, config: Any) -> Tensor:
    """Patches (image x patch, channel x frame x height x width), as Qwen-VL's image processor writes them.

    The patches of a square of `spatial_merge_size` x `spatial_merge_size` stand together, as the tower merges them at its
    end; each is repeated for the `temporal_patch_size` frames of a video (Qwen2VLImageProcessor of transformers).
    """
    side, merge, frames = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    n, channels, height, width = pixels.shape
    shape = (n, channels, height // side // merge, merge, side, width // side // merge, merge, side)
    blocks = pixels.reshape(shape).permute(0, 2, 5, 3, 6, 1, 4, 7)
    repeated = blocks[..., None, :, :].expand(*blocks.shape[:6], frames, side, side)
    return repeated.reshape(-1, channels * frames * side * side)


def _grid(pixels: Tensor, config: Any) -> Tensor:
    n, _, height, width = pixels.shape
    one = [1, height // config.patch_size, width // config.patch_size]
    return torch.tensor([one] * n, device=pixels.device)


def grid_of(tower: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int, int]:
    """Images of a tower's call and their patches down and across; (1, 0, 0) where the images differ in size or are videos.

    Args:
        tower: the module that is called.
        args: its arguments by position.
        kwargs: its arguments by name.
    """
    given = inspect.signature(tower.forward).bind_partial(*args, **kwargs).arguments
    if takes_any_size(tower):
        grids = given[_GRID]
        if not isinstance(grids, FakeTensor):
            (frames, down, across), *others = grids.tolist()
            is_one_size = frames == 1 and all(one == [frames, down, across] for one in others)
            return (len(grids), down, across) if is_one_size else (1, 0, 0)
        return len(grids), 0, 0
    n, _, height, width = given["pixel_values"].shape
    patch = pair(tower.config.patch_size)
    return n, height // patch[0], width // patch[1]


class _Integers(TorchDispatchMode):
    """While it is open, integers that are worked out from numbers alone keep their values among tensors of shapes alone.

    A tower that takes images of any size asks them how many patches an image has.
    """

    def __init__(self, fake_mode: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake_mode = fake_mode
        self.values: dict[int, Tensor] = {}
        self.alive: list[Tensor] = []  # so that no two tensors share an id

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [
            x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        ]
        if any(isinstance(x, FakeTensor) and id(x) not in self.values for x in given):
            return func(*args, **kwargs)
        with _disable_current_modes():
            known_args, known_kwargs = torch.utils._pytree.tree_map_only(
                Tensor, lambda x: self.values.get(id(x), x), (args, kwargs)
            )
            real = func(*known_args, **known_kwargs)
        return torch.utils._pytree.tree_map_only(Tensor, self._as_shape, real)

    def _as_shape(self, real: Tensor) -> Tensor:
        shape: Tensor = self.fake_mode.from_tensor(real, static_shapes=True)
        self.alive += [shape, real]
        self.values[id(shape)] = real
        return shape


@contextmanager
def _known_integers(tower: Any) -> Iterator[None]:
    first = next(tower.parameters())
    if not isinstance(first, FakeTensor):
        yield
        return
    with _Integers(first.fake_mode):
        yield
