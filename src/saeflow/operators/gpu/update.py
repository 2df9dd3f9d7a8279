"""An update of all weights in two passes over each: what is to be clipped, then Adam, unit rows, a bfloat16 copy."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saeflow.operators import gpu

BLOCK = 1024  # numbers of a vector that one program updates


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
def measure(gradient: Tensor, unit_rows: Tensor | None = None) -> Tensor:
    """Return the sum of squares of each row of a gradient, in float32.

    Args:
        gradient: (M, d) float32, contiguous.
        unit_rows: (M, d), where rows of the weights have unit norm and are to keep it: the part of the gradient
            along them is removed first, in place.

    Returns:
        (M,)
    """
    if not (gpu.runs_triton(gradient) and gradient.numel()):
        if unit_rows is not None:
            along = torch.linalg.vecdot(gradient, unit_rows)
            gradient.addcmul_(along[:, None], unit_rows, value=-1)
        return gradient.square().sum(1)
    squares = gradient.new_empty(len(gradient))
    rows = gradient if unit_rows is None else unit_rows
    if not (gradient.is_contiguous() and rows.is_contiguous()):
        raise ValueError("measure: expected contiguous tensors, got a transposed one")
    width, is_unit = gradient.shape[1], unit_rows is not None
    block = min(BLOCK, 1 << max(4, (width - 1).bit_length()))
    if is_unit:  # a row is held whole, to be projected
        block = 1 << max(4, (width - 1).bit_length())
    gpu.load("update").measure_rows[(len(gradient),)](
        gradient, rows, squares, width, IS_UNIT=is_unit, BLOCK=block,
        num_warps=max(1, min(16, block // 256)),
    )  # fmt: skip
    return squares


@torch.no_grad()
def update(
    parts: Sequence[Part],
    norm: Tensor,
    steps: Sequence[Tensor],
    lr: Tensor,
    skip: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    largest_norm: float,
) -> None:
    """Scale the gradient of this norm down to the largest, take a step of Adam, make rows unit.

    Args:
        parts: written in place.
        norm: () float32, of the whole gradient.
        steps: () float32 of each part, steps taken so far; one more afterwards, written in place.
        lr: () float32.
        skip: () bool; true: nothing is written.
        betas, eps: Adam's.
        largest_norm: of a gradient.

    Source: Kingma & Ba 2015 (arXiv:1412.6980), with torch.optim.Adam's order of operations.
    """
    torch._foreach_add_(list(steps), [(~skip).float()] * len(steps))
    beta1, beta2 = betas
    taken = torch.stack(list(steps)).double().clamp(min=1)
    rates = lr.double() / (1 - beta1**taken)
    corrections = (1 - beta2**taken).rsqrt()
    clip = (largest_norm / (norm.double() + 1e-6)).clamp(max=1).expand_as(rates)
    # Four numbers a part, the last of which is not read: kernels are compiled for aligned addresses.
    of_parts = torch.stack((clip, rates, corrections, clip), dim=1).float()
    for part, numbers in zip(parts, of_parts, strict=True):
        if gpu.runs_triton(part.parameter) and part.parameter.numel():
            _launch(part, numbers, skip, beta1, beta2, eps)
        else:
            _update(part, numbers, skip, beta1, beta2, eps)


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
    block = 1 << max(4, (width - 1).bit_length())
    constants = {"HAS_SHADOW": part.shadow is not None, "IS_UNIT": part.is_unit, "BLOCK": block}
    gpu.load("update").update_rows[(-(-count // width),)](
        *tensors, shadow, numbers, skip.view(torch.uint8), 1 - beta1, beta2, 1 - beta2, eps, width, count,
        num_warps=max(1, min(16, block // 256)), **constants,
    )  # fmt: skip
