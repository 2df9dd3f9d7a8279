"""The order of an image tower's positions, found on the tower itself.

Activations of images are read and replaced as (image, position, d_in), what stands before the patches first, then the patches
row by row. Llama 4 has its CLS token last; Qwen-VL runs on (image x patch, d_model), in an order of its own.
"""

import weakref
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from saeflow.errors import UserError
from saeflow.sources.attach import Visit, attach
from saeflow.sources.layouts import VISION
from saeflow.sources.structure import ImageTower, structure_of
from saeflow.sources.towers import grid_of, image_output

_FOUND: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, int], Tensor | None]]" = (
    weakref.WeakKeyDictionary()
)
_ASKED: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Models that run now to find their order; visits of activations see nothing of it."""


class _Seen(Exception):  # noqa: N818 (a signal, not an error)
    """Raised inside a forward pass when the first block's input has been seen."""


def order_of(model: nn.Module, grid: tuple[int, int]) -> Tensor | None:
    """Places in the tower of what stands before the patches and of the patches row by row; None if it is that order.

    Image number b of some differs from a blank one at the patches whose number has the binary digit b, so the images at which
    a position's input of the first block changes spell the number of its patch.

    Args:
        model: with an image tower and weights.
        grid: patches down and across.

    Raises:
        UserError: a position changes with no patch or several, so that patches have no places of their own.
    """
    found = _FOUND.setdefault(model, {})
    if grid not in found:
        image = structure_of(model, VISION).image
        assert image is not None
        weight: Any = next(model.parameters())
        is_shape = isinstance(weight, FakeTensor)
        found[grid] = None if is_shape else _spelled(model, image, grid)
    return found[grid]


@torch.no_grad()
def _spelled(model: nn.Module, image: ImageTower, grid: tuple[int, int]) -> Tensor | None:
    down, across = grid
    count = down * across
    numbers, digits = torch.arange(1, count + 1), torch.arange(count.bit_length())
    marked = (numbers[None] >> digits[:, None] & 1).reshape(-1, 1, down, across)
    whole = marked.repeat_interleave(image.patch[0], 2).repeat_interleave(image.patch[1], 3)
    pixels = whole.expand(-1, 3, -1, -1).float().to(next(model.parameters()).device)
    inputs = [_first_input(model, x) for x in (torch.zeros_like(pixels), pixels)]
    before, after = (x.reshape(len(digits), -1, x.shape[-1]).cpu() for x in inputs)
    spelled = ((before != after).any(2) << digits[:, None]).sum(0)
    order = spelled.argsort(stable=True)
    if spelled[order].tolist() != [0] * image.prefix + numbers.tolist():
        first = (spelled == 1).nonzero()[:8, 0].tolist()
        raise UserError(
            f"{type(model).__name__}: expected each of {count} patches at a position of its own, after {image.prefix} others, "
            f"found that they share some of {len(spelled)} (the first patch is at {first}). Take another model of images."
        )
    is_plain = bool((order == torch.arange(len(order))).all())
    return None if is_plain else order


def _first_input(model: nn.Module, pixels: Tensor) -> Tensor:
    """The residual stream before the first block, as the tower has it."""
    seen: list[Tensor] = []

    def see(x: Tensor) -> None:
        seen.append(x)
        raise _Seen

    place = structure_of(model, VISION).blocks[0].places["resid_pre"]
    _ASKED.add(model)
    try:
        with attach(model, place, see, "the first block", first=True), suppress(_Seen):
            image_output(model, pixels)
    finally:
        _ASKED.discard(model)
    return seen[0]


def by_image(model: nn.Module, visit: Visit) -> tuple[Visit, ExitStack]:
    """Let `visit` see a tower's activations by image and in order, whatever the tower's own form.

    Where one call has images of several sizes, or a video, they are seen as one image, in the tower's own order.

    Args:
        model: with an image tower.
        visit: of (image, position, d_in); also of what has no positions, as the tower gives it.

    Returns:
        A visit of what the tower has, and what follows its calls until it is closed.
    """
    structure = structure_of(model, VISION)
    image = structure.image
    assert image is not None
    n, order = 1, None

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal n, order
        if model not in _ASKED:
            n, *grid = grid_of(module, args, kwargs)
            order = order_of(model, (grid[0], grid[1])) if all(grid) else None

    def see(x: Tensor) -> Tensor | None:
        if model in _ASKED:
            return None
        is_flat = image.is_flat and x.ndim == 2 and len(x) % n == 0
        images = x.reshape(n, -1, x.shape[-1]) if is_flat else x
        has_order = order is not None and images.ndim == 3 and images.shape[1] == len(order)
        new = visit(images[:, order] if has_order else images)
        if new is None:
            return None
        if has_order:
            assert order is not None
            new = new[:, order.argsort()]
        return new.reshape(x.shape)

    tower = model.get_submodule(structure.body)
    handles = ExitStack()
    handles.callback(tower.register_forward_pre_hook(note, with_kwargs=True).remove)
    return see, handles
