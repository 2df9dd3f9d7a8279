"""Errors of two reconstructions by values of the same entries, of which one takes the decoder as a constant."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saeflow.operators.gpu import sparse, weights
from saeflow.operators.gpu.lists import Lists
from saeflow.operators.gpu.shadows import multiplies_in_bf16, shadow
from saeflow.operators.gpu.sparse import Decoded


def decode_pair(
    lists: Lists,
    others: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    x: Tensor,
    lower: torch.dtype = torch.float32,
) -> tuple[Decoded, Tensor, Tensor]:
    """Do `decode_error` for the values of lists and for other values of the same entries, in one reading of W_dec's rows.

    Args:
        lists, W_dec, x, lower: as for `decode_error`.
        others: (R, C), 0 where not real.
        b_dec: (d,).

    Returns:
        What `decode_error` gives of the lists; and of the others the squares (B,) and the products (R, C).
    """
    beside = lists.with_values(others)
    if not sparse.runs_triton(x, lists):
        other = sparse.decode_error(beside, W_dec, b_dec, x, lower)
        return sparse.decode_error(lists, W_dec, b_dec, x, lower), other.squares, other.products
    first, other = sparse.room_for_error(lists, x, lower), sparse.room_for_error(beside, x)
    columns, values, counts, _, parts = sparse.entries(lists)
    entries = columns, values, others.detach().contiguous(), counts, parts
    inputs = x.detach().contiguous(), W_dec.detach().contiguous(), b_dec.detach().contiguous()
    results = *first[:4], other.squares, other.products
    has_lower = lower != torch.float32
    width = x.shape[1]
    sparse.launch("decode_pair_of_lists", len(x), width, lists, *inputs, *entries, *results, HAS_LOWER=has_lower)  # fmt: skip
    sparse.decode_parts(lists, *inputs, first)
    sparse.decode_parts(beside, *inputs, other)
    return first, other.squares, other.products


def squared_errors_of_two(
    lists: Lists, others: Tensor, W_dec: Tensor, b_dec: Tensor, x: Tensor, of: weights.Walk
) -> tuple[Tensor, Tensor, Tensor]:
    """Do `weights.squared_errors`, and the same for other values of the same entries with the decoder as a constant.

    Args:
        lists, W_dec, x: as there; x without gradient.
        others: (R, C), 0 where not real.
        b_dec: (d,).
        of: the step whose decoder this is.

    Returns:
        As there, and the squared errors (B,) by the others, differentiable in these alone.
    """
    lower = shadow(W_dec) if multiplies_in_bf16(W_dec) else None
    given = of.token, W_dec.detach(), others, b_dec, x, lists, of.left, lower
    result: tuple[Tensor, Tensor, Tensor] = _SquaredErrorsOfTwo.apply(lists.values, *given)  # type: ignore[no-untyped-call]
    return result


class _SquaredErrorsOfTwo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        token: Tensor,
        W_dec: Tensor,
        others: Tensor,
        b_dec: Tensor,
        x: Tensor,
        lists: Lists,
        left: weights.Left,
        lower: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = W_dec if lower is None else lower
        found, squares, products = decode_pair(lists, others, rows, b_dec, x, rows.dtype)
        ctx.save_for_backward(found.kept, found.products, found.of_all, products)
        ctx.lists, ctx.left, ctx.number = lists, left, left.number()
        ctx.mark_non_differentiable(found.error)
        ctx.set_materialize_grads(False)
        return found.squares, found.error, squares

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, _: None, of_others: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        error, products, of_all, beside = ctx.saved_tensors
        scaled = None
        if of_others is not None:
            scaled = sparse.twice_scaled(ctx.lists, beside, of_others)[1]
        if grad is None:
            return (None, None, None, scaled, *(None,) * 5)
        twice, of_values = sparse.twice_scaled(ctx.lists, products, grad)
        of_b_dec = torch.mv(of_all.t(), twice) if ctx.needs_input_grad[4] else None
        weights.leave(ctx, weights.OfDecoder(ctx.lists, error, None, twice))
        return of_values, None, None, scaled, of_b_dec, None, None, None, None
