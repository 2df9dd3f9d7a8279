"""An update of all weights in two passes over each: what is to be clipped, then Adam, unit rows, a bfloat16 copy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from saeflow.operators import gpu

BLOCK = 1024  # numbers of a vector that one program updates
MOST_PARTS = 31  # whose numbers one launch finds


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


def squares_in(gradient: Tensor) -> int:
    """Return how many numbers `measure` gives of a gradient (M, d), or (n,)."""
    return len(gradient) if gradient.ndim == 2 else -(-len(gradient) // BLOCK)


@torch.no_grad()
def measure(gradient: Tensor, squares: Tensor, unit_rows: Tensor | None = None) -> None:
    """Write the sum of squares of each row of a gradient, in float32.

    Args:
        gradient: (M, d) float32, contiguous; or (n,), of which each block of BLOCK numbers counts as a row.
        squares: (`squares_in(gradient)`,) float32, written.
        unit_rows: (M, d), where rows of the weights have unit norm and are to keep it: the part of the gradient
            along them is removed first, in place.
    """
    if not (gpu.runs_triton(gradient) and gradient.numel()):
        if unit_rows is not None:
            along = torch.linalg.vecdot(gradient, unit_rows)
            gradient.addcmul_(along[:, None], unit_rows, value=-1)
        rows = gradient
        if gradient.ndim == 1:
            rows = pad(gradient, (0, len(squares) * BLOCK - len(gradient))).view(-1, BLOCK)
        squares.copy_(rows.square().sum(1))
        return
    rows, is_unit = gradient if unit_rows is None else unit_rows, unit_rows is not None
    if not (gradient.is_contiguous() and rows.is_contiguous()):
        raise ValueError("measure: expected contiguous tensors, got a transposed one")
    count = gradient.numel()
    width = gradient.shape[1] if gradient.ndim == 2 else min(BLOCK, count)
    block = gpu.block_for(width)
    if not is_unit:  # a row is held whole only to be projected
        block = min(BLOCK, block)
    gpu.load("update").measure_rows[(len(squares),)](
        gradient, rows, squares, width, count, IS_UNIT=is_unit, BLOCK=block,
        num_warps=gpu.warps_for(block),
    )  # fmt: skip


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
    for part, numbers in zip(parts, of_parts, strict=True):
        if part is None:
            continue
        if gpu.runs_triton(part.parameter) and part.parameter.numel():
            _launch(part, numbers, skip, *betas, eps)
        else:
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


def _launch(
    part: Part, numbers: Tensor, skip: Tensor, beta1: float, beta2: float, eps: float
) -> None:
    tensors = (part.parameter, part.gradient, part.exp_avg, part.exp_avg_sq)
    shadow = part.parameter if part.shadow is None else part.shadow
    if not all(tensor.is_contiguous() for tensor in (*tensors, shadow)):
        raise ValueError("update: expected contiguous tensors, got a transposed one")
    count = part.parameter.numel()
    # A row is held whole only to be made unit: rows may be as long as an SAE has latents.
    width = part.parameter.shape[-1] if part.is_unit else min(BLOCK, count)
    block = gpu.block_for(width)
    constants = {"HAS_SHADOW": part.shadow is not None, "IS_UNIT": part.is_unit, "BLOCK": block}
    gpu.load("update").update_rows[(-(-count // width),)](
        *tensors, shadow, numbers, skip.view(torch.uint8), 1 - beta1, beta2, 1 - beta2, eps, width, count,
        num_warps=gpu.warps_for(block), **constants,
    )  # fmt: skip
