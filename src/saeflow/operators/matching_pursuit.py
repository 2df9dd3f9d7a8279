"""Matching pursuit: one direction after the other is taken out of what is left of an input."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saeflow.operators.autograd import applied
from saeflow.operators.sparse import acts_as_gpu


def matching_pursuit(
    x: Tensor,
    W_dec: Tensor,
    threshold: Tensor | float,
    most_steps: int,
    *,
    stops_on_repeat: bool = True,
) -> Tensor:
    """Latents of an input by a pursuit with rows of W_dec.

    A step takes the direction of largest product with the residual r (that of the lower index, if several have it),
    adds relu(r . w) to its latent and takes relu(r . w) w from r, which is x at first. A row stops after a step that
    leaves |r| below the threshold, or that takes no latent which it did not have.

    Args:
        x: (B, d_in) floating point.
        W_dec: (d_sae, d_in) of the same dtype.
        threshold: of the norm of the residual, in the units of x; 0 stops no row.
        most_steps: steps of a row at most.
        stops_on_repeat: whether a row stops after a step that takes no new latent; with False it may take one again.

    Returns:
        (B, d_sae), none below 0. Differentiable in x and W_dec through every step, the choices taken as constants;
        the backward pass walks back over the steps and keeps a direction and a value of each. On a GPU the host
        waits for nothing, so that all steps are taken, without effect on rows that have stopped.

    Source: Costa et al. 2025 (arXiv:2506.03093); the stopping rules are those of SAELens 6.54.
    """
    return applied(_Pursuit, x, W_dec, threshold, most_steps, stops_on_repeat)


class _Pursuit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_dec: Tensor,
        threshold: Tensor | float,
        most_steps: int,
        stops_on_repeat: bool,
    ) -> Tensor:
        latents = x.new_zeros(len(x), len(W_dec))
        support = torch.zeros_like(latents, dtype=torch.bool)
        going = torch.ones(len(x), dtype=torch.bool, device=x.device)
        may_wait = not acts_as_gpu(x)
        residual, picks, values = x, [], []
        for _ in range(most_steps):
            pick = (residual @ W_dec.t()).argmax(1)
            direction = W_dec[pick]
            value = _dots(residual, direction).relu() * going
            latents.scatter_add_(1, pick[:, None], value[:, None])
            residual = residual - value[:, None] * direction
            picks.append(pick)
            values.append(value)
            if stops_on_repeat:
                going = going & (value > 0) & ~support.gather(1, pick[:, None])[:, 0]
                support.scatter_(1, pick[:, None], True)
            going = going & ~(torch.linalg.vector_norm(residual, dim=1) < threshold)
            if may_wait and not going.any():
                break
        ctx.save_for_backward(W_dec, residual, torch.stack(picks), torch.stack(values))
        return latents

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        W_dec, residual, picks, values = ctx.saved_tensors
        of_residual, of_W = torch.zeros_like(residual), torch.zeros_like(W_dec)
        may_wait = not acts_as_gpu(grad)
        for pick, value in zip(picks.flip(0), values.flip(0), strict=True):
            direction = W_dec[pick]
            before = residual + value[:, None] * direction
            of_value = grad.gather(1, pick[:, None])[:, 0]
            of_value = of_value - _dots(of_residual, direction)
            of_value = of_value * (value > 0)  # relu, and rows that had stopped
            of_direction = of_value[:, None] * before - value[:, None] * of_residual
            if may_wait:
                of_W.index_add_(0, pick, of_direction)
            else:  # where such sums have no fixed order
                chosen = torch.zeros_like(grad).scatter_(1, pick[:, None], 1)
                of_W.addmm_(chosen.t(), of_direction)
            of_residual = of_residual + of_value[:, None] * direction
            residual = before
        return of_residual, of_W, None, None, None


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Return the product (B,) of each pair of rows; torch.linalg.vecdot would round under autocast."""
    return (a * b).sum(1)
