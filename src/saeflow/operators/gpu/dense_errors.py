"""Errors of a reconstruction by dense latents: one pass over the product finds them, and one what goes back through it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saeflow.operators import gpu


def squared_errors(
    latents: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor, lower: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the squared errors (B,) of latents W_dec + b_dec, with gradient, and x_hat - target (B, d), without.

    Args:
        latents: (B, M).
        W_dec: (M, d).
        b_dec: (d,).
        target: (B, d).
        lower: a copy of W_dec in the precision of the product; None: W_dec itself.
    """
    result: tuple[Tensor, Tensor] = _SquaredErrors.apply(  # type: ignore[no-untyped-call]
        latents, W_dec, b_dec, target, lower
    )
    return result


class _SquaredErrors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        latents: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        target: Tensor,
        lower: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        by = W_dec if lower is None else lower
        ctx.lower, ctx.dtype, latents = lower, latents.dtype, latents.to(by.dtype)
        product = latents @ by
        error = torch.empty_like(product, dtype=W_dec.dtype)
        if gpu.serves_scores(product):
            squares = error.new_empty(len(error))
            of_rows = product, b_dec.contiguous(), target.contiguous(), error, squares
            _launch("error_dense", *of_rows)
        else:
            squares = torch.sub(product + b_dec, target, out=error).square().sum(1)
        ctx.save_for_backward(latents, W_dec, error)  # the copy is written after the backward pass
        ctx.mark_non_differentiable(error)
        ctx.set_materialize_grads(False)
        return squares, error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        latents, W_dec, error = ctx.saved_tensors
        by, twice = W_dec if ctx.lower is None else ctx.lower, 2 * grad
        of_product = torch.empty_like(error, dtype=by.dtype)
        if gpu.serves_scores(error):
            _launch("scaled_dense", error, twice, of_product)
        else:
            of_product.copy_(twice[:, None] * error)
        of_latents, of_W_dec, of_b_dec, of_target = None, None, None, None
        if ctx.needs_input_grad[0]:
            of_latents = (of_product @ by.t()).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            of_W_dec = (latents.t() @ of_product).to(W_dec.dtype)
        if ctx.needs_input_grad[2]:
            of_b_dec = torch.mv(error.t(), twice)
        if ctx.needs_input_grad[3]:
            of_target = -twice[:, None] * error
        return of_latents, of_W_dec, of_b_dec, of_target, None


def _launch(kernel: str, rows: Tensor, *arguments: Tensor) -> None:
    """Run a kernel that holds a row in registers."""
    function, width = getattr(gpu.load("dense"), kernel), rows.shape[1]
    function[(len(rows),)](rows, *arguments, width, **gpu.of_rows(width))
