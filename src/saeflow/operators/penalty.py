"""The penalty on a sum over the batch: its mean, or how far that is from a target."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saeflow.operators import gpu
from saeflow.operators.autograd import applied


def penalty(
    total: Tensor, rows: int, weight: Tensor | float, target: Tensor | float | None = None
) -> Tensor:
    """Return weight * m of the mean m = total / rows, or weight * (m / target - 1)^2, with gradient in the total.

    Args:
        total: () sum over all rows of the batch.
        rows: their number.
        weight, target: numbers, or () on the device.
    """
    on_device = [number for number in (weight, target) if isinstance(number, Tensor)]
    if gpu.serves(total, *on_device) and len(on_device) == 1 + (target is not None):
        return applied(_Penalty, total, rows, weight, target)
    mean = total / rows
    term = mean if target is None else (mean / target - 1).square()
    result: Tensor = weight * term
    return result


class _Penalty(torch.autograd.Function):
    """One kernel, which finds the slope as well, where autograd alone would launch a dozen."""

    @staticmethod
    def forward(
        ctx: Any, total: Tensor, rows: int, weight: Tensor, target: Tensor | None
    ) -> Tensor:
        term, slope = torch.empty_like(total), torch.empty_like(total)
        numbers = total, weight, weight if target is None else target, term, slope, rows
        gpu.load("record").penalty_term[(1,)](*numbers, HAS_TARGET=target is not None, num_warps=1)
        ctx.save_for_backward(slope)
        return term

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None, None
