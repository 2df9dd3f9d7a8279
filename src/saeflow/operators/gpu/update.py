"""An update of all weights in two passes over each: what is to be clipped, then Adam, unit rows, a bfloat16 copy."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from saeflow.operators import gpu

BLOCK = 1024  # numbers of a vector that one program updates
MOST_PARTS = 31  # whose numbers one launch finds
MOST_AT_ONCE = 8  # parameters that one launch goes through

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Part:
    """A parameter and what its update needs, all laid out alike: (n,), or (M, d) by rows.

    Attributes:
        parameter, exp_avg, exp_avg_sq: float32; written.
        gradient: float32.
        shadow: a bfloat16 copy of the parameter, written; None: no copy.
        is_unit: whether each row is to have unit norm again.
    """

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    shadow: Tensor | None = None
    is_unit: bool = False


@torch.no_grad()
def measure(gradients: Sequence[tuple[Tensor, Tensor | None]], like: Tensor) -> Tensor:
    """Return the sum () of squares of gradients, of blocks in float32 and of these in float64, on the device of a tensor.

    Args:
        gradients: each (M, d) or (n,), float32, contiguous, with the weights (M, d) where rows of these have unit
            norm and are to keep it: the part of the gradient along them is removed first, in place.
        like: a tensor there, float32.
    """
    found = [like.new_empty(0)]
    for some in _by_launch(gradients):
        if all(gpu.runs_triton(gradient) and gradient.numel() for gradient, _ in some):
            found.append(_measure_at_once(some))
        else:
            found += [_measure(gradient, unit_rows) for gradient, unit_rows in some]
    squares = found[-1] if len(found) == 2 else torch.cat(found)
    return squares.sum(dtype=torch.float64)


def _measure(gradient: Tensor, unit_rows: Tensor | None) -> Tensor:
    """Return the sums of squares of blocks of a gradient; the plain form."""
    if unit_rows is not None:
        along = torch.linalg.vecdot(gradient, unit_rows)
        gradient.addcmul_(along[:, None], unit_rows, value=-1)
    flat = gradient.reshape(-1)
    return pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK).square().sum(1)


def _measure_at_once(gradients: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Return the sums of squares of rows or blocks of gradients, found by one kernel."""
    rows = tuple(gradient if unit is None else unit for gradient, unit in gradients)
    of_all = tuple(gradient for gradient, _ in gradients)
    _check_contiguous("measure", *of_all, *rows)
    sizes, constants = _layout([(gradient, unit is not None) for gradient, unit in gradients])
    squares = of_all[0].new_empty(_programs(*sizes))
    gpu.load("update").measure_parts[(len(squares),)](of_all, rows, squares, *sizes, **constants)
    return squares


def _layout(
    tensors: Sequence[tuple[Tensor, bool]],
) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], dict[str, Any]]:
    """Return what one program has of each tensor and how much each has; and the constants of a kernel that goes through them.

    Args:
        tensors: each with whether a program has a whole row (M, d), since its norm is needed: rows may be as long as an SAE
            has latents.
    """
    counts = tuple(tensor.numel() for tensor, _ in tensors)
    widths = tuple(t.shape[-1] if is_unit else min(BLOCK, t.numel()) for t, is_unit in tensors)
    blocks = tuple(gpu.block_for(width) for width in widths)
    constants = {
        "PARTS": len(tensors),
        "ARE_UNIT": tuple(is_unit for _, is_unit in tensors),
        "BLOCKS": blocks,
    }
    return (widths, counts), constants | {"num_warps": gpu.warps_for(max(blocks))}


def _by_launch(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Divide what is to be gone through among launches."""
    for start in range(0, len(items), MOST_AT_ONCE):
        yield items[start : start + MOST_AT_ONCE]


def _programs(widths: Sequence[int], counts: Sequence[int]) -> int:
    return sum(-(-count // width) for width, count in zip(widths, counts, strict=True))


def _check_contiguous(what: str, *tensors: Tensor) -> None:
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError(f"{what}: expected contiguous tensors, got a transposed one")


@torch.no_grad()
def update(
    parts: Sequence[Part | None],
    norm: Tensor,
    steps: Tensor,
    lr: Tensor,
    skip: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    largest_norm: float,
) -> None:
    """Scale the gradient of this norm down to the largest, take a step of Adam, make rows unit.

    Args:
        parts: written in place; None: one that has no gradient, and takes no step.
        norm: () float32, of the whole gradient.
        steps: (parts,) float32, steps that each took so far; one more afterwards, written in place.
        lr: () float32.
        skip: () bool; true: nothing is written.
        betas, eps: Adam's.
        largest_norm: of a gradient.

    Source: Kingma & Ba 2015 (arXiv:1412.6980), with torch.optim.Adam's order of operations.
    """
    is_moving = [part is not None for part in parts]
    of_parts = _numbers(is_moving, norm, steps, lr, skip, betas, largest_norm)
    moving = [(p, numbers) for p, numbers in zip(parts, of_parts, strict=True) if p is not None]
    for some in _by_launch(moving):
        if all(gpu.runs_triton(part.parameter) and part.parameter.numel() for part, _ in some):
            _update_at_once(some, skip, *betas, eps)
        else:
            for part, numbers in some:
                _update(part, numbers, skip, *betas, eps)


def _numbers(
    is_moving: Sequence[bool],
    norm: Tensor,
    steps: Tensor,
    lr: Tensor,
    skip: Tensor,
    betas: tuple[float, float],
    largest_norm: float,
) -> Tensor:
    """Count a step of each part that moves; (parts, 4) float32: what scales its gradient, its rate, its correction.

    The last of the four is not read: kernels are compiled for aligned addresses.
    """
    numbers = steps.new_empty(len(steps), 4)
    if gpu.runs_triton(steps, norm) and len(steps) < MOST_PARTS:
        logs = [math.log(beta) if beta else -math.inf for beta in betas]
        bits = sum(1 << n for n, is_one in enumerate(is_moving) if is_one)
        gpu.load("update").numbers_of_parts[(len(steps),)](
            steps, norm, lr, skip.view(torch.uint8), numbers, bits,
            LOG_BETA1=logs[0], LOG_BETA2=logs[1], LARGEST_NORM=largest_norm, num_warps=1,
        )  # fmt: skip
        return numbers
    for step, is_one in zip(steps, is_moving, strict=True):
        step.add_((~skip).float() * is_one)
    taken = steps.double().clamp(min=1)
    numbers[:, 0] = (largest_norm / (norm.double() + 1e-6)).clamp(max=1)
    numbers[:, 1] = lr.double() / (1 - betas[0] ** taken)
    numbers[:, 2] = (1 - betas[1] ** taken).rsqrt()
    return numbers


def _update(
    part: Part, numbers: Tensor, skip: Tensor, beta1: float, beta2: float, eps: float
) -> None:
    """The plain form."""
    clip, rate, correction, _ = numbers.unbind()
    gradient = part.gradient * clip
    first = part.exp_avg + (1 - beta1) * (gradient - part.exp_avg)
    second = beta2 * part.exp_avg_sq + (1 - beta2) * gradient.square()
    new = part.parameter - rate * first / (second.sqrt() * correction + eps)
    if part.is_unit:
        new = new / torch.linalg.vector_norm(new, dim=1, keepdim=True)
    written = [(part.parameter, new), (part.exp_avg, first), (part.exp_avg_sq, second)]
    if part.shadow is not None:
        written.append((part.shadow, new.to(part.shadow.dtype)))
    for old, now in written:
        old.copy_(torch.where(skip, old, now))


def _update_at_once(
    parts: Sequence[tuple[Part, Tensor]], skip: Tensor, beta1: float, beta2: float, eps: float
) -> None:
    """Update all by one kernel."""
    shadows = tuple(part.parameter if part.shadow is None else part.shadow for part, _ in parts)
    tensors = [
        tuple(getattr(part, name) for part, _ in parts)
        for name in ("parameter", "gradient", "exp_avg", "exp_avg_sq")
    ]
    for each in (*tensors, shadows):
        _check_contiguous("update", *each)
    sizes, constants = _layout([(part.parameter, part.is_unit) for part, _ in parts])
    gpu.load("update").update_parts[(_programs(*sizes),)](
        *tensors, shadows, tuple(numbers for _, numbers in parts), skip.view(torch.uint8),
        1 - beta1, beta2, 1 - beta2, eps, *sizes,
        HAVE_SHADOW=tuple(part.shadow is not None for part, _ in parts), **constants,
    )  # fmt: skip
