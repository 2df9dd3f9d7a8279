"""JumpReLU and its step function, with straight-through gradients for the threshold."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saeflow.operators.autograd import applied
from saeflow.operators.rows import blocks


def jumprelu(pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Zero the pre-activations at or below their threshold: z = a [a > threshold].

    Args:
        pre_acts: (..., n) floating point.
        threshold: broadcasts to `pre_acts`, usually (n,); floating point.
        bandwidth: > 0, width of the kernel that estimates the threshold's gradient, in units of
            `pre_acts`.

    Returns:
        (..., n), dtype and device of `pre_acts`. Gradients: dz/da = [a > threshold], and straight
        through, dz/dthreshold = -(threshold / bandwidth) K((a - threshold) / bandwidth), with the
        rectangle kernel K(u) = [|u| < 1/2].

    Raises:
        TypeError: `pre_acts` or `threshold` is not floating point.
        ValueError: bandwidth <= 0, no last dimension, or `threshold` does not broadcast.

    Source: Rajamanoharan et al. 2024 (arXiv:2407.14435), eq. 4 and 11.
    """
    _check(pre_acts, threshold, bandwidth)
    return applied(_JumpReLU, pre_acts, threshold, bandwidth)


def step(pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Return 1 for each pre-activation above its threshold, else 0; the row sum is the L0.

    Args, Raises: as `jumprelu`.

    Returns:
        (..., n), dtype and device of `pre_acts`. Gradients: none for `pre_acts`, and straight
        through, dstep/dthreshold = -(1 / bandwidth) K((a - threshold) / bandwidth).

    Source: Rajamanoharan et al. 2024 (arXiv:2407.14435), eq. 12.
    """
    _check(pre_acts, threshold, bandwidth)
    return applied(_Step, pre_acts, threshold, bandwidth)


def _check(pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> None:
    for name, tensor in (("pre_acts", pre_acts), ("threshold", threshold)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating point tensor, got {found}")
    if pre_acts.ndim == 0:
        raise ValueError("pre_acts must have shape (..., n), got ()")
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be > 0, got {bandwidth}")
    shapes = tuple(threshold.shape), tuple(pre_acts.shape)
    if len(shapes[0]) > len(shapes[1]) or any(
        t not in (1, a) for t, a in zip(shapes[0][::-1], shapes[1][::-1], strict=False)
    ):
        raise ValueError(f"threshold {shapes[0]} does not broadcast to pre_acts {shapes[1]}")


def _kernel_sum(grad: Tensor, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Sum of the gradient within half a bandwidth of the threshold, in its shape."""
    threshold = threshold.to(torch.promote_types(threshold.dtype, torch.float32))
    total = torch.zeros_like(threshold)
    parts: Iterable[slice] = [slice(None)]
    if threshold.ndim <= 1 and pre_acts.numel():
        grad, pre_acts = (t.reshape(-1, t.shape[-1]) for t in (grad, pre_acts))
        parts = blocks(pre_acts)  # keeps the temporaries in cache
    for at in parts:
        near = (pre_acts[at] - threshold).abs_() < bandwidth / 2
        total += grad[at].to(threshold.dtype).where(near, 0).sum_to_size(threshold.shape)
    return total


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return pre_acts.where(pre_acts > threshold, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        pre_acts, threshold = ctx.saved_tensors
        grad_threshold = None
        if ctx.needs_input_grad[1]:
            total = _kernel_sum(grad, pre_acts, threshold, ctx.bandwidth)
            grad_threshold = (-threshold / ctx.bandwidth * total).to(threshold.dtype)
        return grad.where(pre_acts > threshold, 0), grad_threshold, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return (pre_acts > threshold).to(pre_acts.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        pre_acts, threshold = ctx.saved_tensors
        total = _kernel_sum(grad, pre_acts, threshold, ctx.bandwidth)
        return None, (total / -ctx.bandwidth).to(threshold.dtype), None
