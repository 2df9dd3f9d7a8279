"""Products with sparse latents: decoding, and the encoder's gradient of chosen pre-activations.

Every product of a step with a few active latents per row is a weighted sum of rows of a matrix,
chosen by index, and torch's embedding-bag kernel is the fastest of those on a CPU: decoding sums
rows of `W_dec` for each input, the weight gradients sum inputs for each latent. Each sum runs in a
fixed order, so the same input gives the same bits.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from saeflow.operators import gpu, native
from saeflow.operators.autograd import applied
from saeflow.operators.gpu import weights as on_lists
from saeflow.operators.sparse import SparseLatents


def decode_sparse(latents: SparseLatents, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """Reconstruct from the active latents alone: x_hat = z W_dec + b_dec.

    Args:
        latents: (B, d_sae) entries; values in the dtype of `W_dec`.
        W_dec: (d_sae, d_in), row i the direction of latent i.
        b_dec: (d_in), or None for no bias.

    Returns:
        (B, d_in). Differentiable with g the gradient of x_hat: dW_dec = z^T g, dense but summed
        over active entries only; dz at the active entries = g . W_dec[column]; db_dec = sum_B g.

    Raises:
        ValueError: shapes or dtypes do not fit together.

    Source: Gao et al. 2024 (arXiv:2406.04093), section 2.2 and appendix D (sparse kernels).
    """
    if W_dec.ndim != 2 or len(W_dec) != latents.d_sae:
        raise ValueError(f"W_dec must be ({latents.d_sae}, d_in), got {tuple(W_dec.shape)}")
    if W_dec.dtype != latents.values.dtype:
        raise ValueError(f"latents are {latents.values.dtype} but W_dec is {W_dec.dtype}")
    if latents.lists is None:
        x_hat = applied(_Decode, latents.values, W_dec, latents)
    else:
        x_hat = on_lists.decode(latents.lists, W_dec, latents.walk)
    return x_hat if b_dec is None else x_hat + b_dec


def squared_errors(
    latents: SparseLatents,
    W_dec: Tensor,
    b_dec: Tensor,
    x: Tensor,
    boundaries: Tensor | None = None,
    lower: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the squared error of what rows of the same room rebuild; one pass finds all that its gradients need.

    Args:
        latents: (B, d_sae) entries with `lists`.
        W_dec: (d_sae, d_in).
        b_dec: (d_in,), or (n, d_in) where rows are in n blocks of one size, each with its own.
        x: (B, d_in).
        boundaries: (G - 1,), where latents are in groups: the sum of the squared errors of all prefixes of groups.
        lower: a copy of W_dec in lower precision, which is multiplied in its place.

    Returns:
        (B,) squared errors, differentiable, and (B, d_in) x_hat - x, which is not.

    Raises:
        ValueError: rows may be of any length.
    """
    if latents.lists is None:
        raise ValueError("expected rows of the same room, got rows of any length")
    return on_lists.squared_errors(latents.lists, W_dec, b_dec, x, latents.walk, boundaries, lower)


def gather_pre_acts(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    selection: SparseLatents,
    *,
    is_rounded: bool = False,
    W_dec: Tensor | None = None,
    beside: SparseLatents | None = None,
) -> SparseLatents:
    """Give entries chosen from a = (x - b_dec) W_enc + b_enc the encoder's gradient.

    The product is computed once, without gradient, to choose the entries. The backward pass never
    builds a (B, d_sae) tensor.

    Args:
        x: (B, d_in).
        W_enc: (d_in, d_sae). Its gradient is laid out by columns: keep `W_enc.t()` contiguous
            (`torch.empty(d_sae, d_in).t()`), or each step pays for a transposed copy.
        b_enc: (d_sae).
        b_dec: (d_in).
        selection: the entries, without gradient.
        is_rounded: they were chosen from a product of lower precision; their values are worked out again
            from the weights, in the precision of those.
        W_dec: (d_sae, d_in), the decoder of these entries: where rows have the same room, its gradient is
            summed in one walk with that of W_enc.
        beside: other entries of the same weights, gathered before, whose walk these then share.

    Returns:
        The selection in the dtype of `W_enc`. Differentiable in x, W_enc, b_enc and b_dec, with G the sparse gradient: dW_enc = (x - b_dec)^T G, db_enc = sum_B G,
        dx = G W_enc^T, and db_dec = -W_enc db_enc, which needs no product over the batch.

    Raises:
        ValueError: shapes do not fit together, or the selection requires a gradient.
    """
    shape = (len(selection), selection.d_sae)
    if selection.values.requires_grad:
        raise ValueError("the selection must be made without gradient (torch.no_grad)")
    if W_enc.shape != (x.shape[-1], shape[1]) or len(x) != shape[0]:
        raise ValueError(
            f"selection is {shape}, but x is {tuple(x.shape)} and W_enc {tuple(W_enc.shape)}"
        )
    if (lists := selection.lists) is None:
        values = applied(_GatherPreActs, x, W_enc, b_enc, b_dec, selection, is_rounded)
        return selection.with_values(values)
    walk = None if beside is None else beside.walk
    if walk is None:
        decoder = W_enc.detach().t() if W_dec is None else W_dec
        walk = on_lists.walk(W_enc, b_enc, b_dec, decoder)
    values = on_lists.gather(x, lists, walk, is_rounded=is_rounded)
    return replace(selection.with_whole(values.view(-1)), walk=walk)


def gather_columns(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    pre_acts: Tensor | None,
    columns: Tensor,
) -> Tensor:
    """Some columns (n,) of a = (x - b_dec) W_enc + b_enc, with the encoder's gradient.

    Args:
        pre_acts: a (B, d_sae); None, where it is rounded: the columns are worked out here.

    Returns:
        (B, n), dtype of `W_enc`, differentiable in W_enc, b_enc and b_dec, not in x.
    """
    return applied(_GatherColumns, x, W_enc, b_enc, b_dec, pre_acts, columns)


def _sum_rows(matrix: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """out[b] = sum over entries e of bag b of weights[e] * matrix[ids[e]]."""
    if gpu.serves(matrix, weights):
        return gpu.sum_rows(matrix, ids, offsets, weights)
    return embedding_bag(
        ids, matrix, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _row_products(left: Tensor, right: Tensor, entries: SparseLatents) -> Tensor:
    """(count,) in order by row: left[row] . right[column] for each entry.

    Walking by column reads each row of `right`, the larger matrix, once: two to three times
    faster than by row.
    """
    by_column = entries.by_column
    if native.serves(left, right):
        products = torch.empty(len(entries.columns))
        native.spread("sparse.products", len(right), left, right, *by_column, products)
        return products
    if gpu.serves(left, right):
        return gpu.row_products(left, right, *by_column)
    # The gradient kernel of embedding_bag; reaching it by autograd would repeat the forward pass.
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        right, left, by_column.rows, by_column.offsets[:-1], entries.columns[by_column.order], 0
    )
    return torch.empty_like(products).scatter_(0, by_column.order, products)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, latents: SparseLatents) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.latents = latents
        return _sum_rows(W_dec.contiguous(), latents.columns, latents.offsets, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        grad, W_dec = grad.contiguous(), W_dec.contiguous()
        of_values, of_W, _ = ctx.needs_input_grad
        latents, by_column = ctx.latents, ctx.latents.by_column
        if of_values and of_W and native.serves(grad, W_dec, values):
            grad_values, grad_W = torch.empty_like(values), torch.empty_like(W_dec)
            arrays = (grad, W_dec, values, *by_column, grad_values, grad_W)
            native.spread("sparse.decoder_gradient", len(W_dec), *arrays)
            return grad_values, grad_W, None
        by_latent = values[by_column.order]
        return (
            _row_products(grad, W_dec, latents) if of_values else None,
            _sum_rows(grad, by_column.rows, by_column.offsets, by_latent) if of_W else None,
            None,
        )


class _GatherPreActs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        selection: SparseLatents,
        is_rounded: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_dec)
        ctx.selection = selection
        if any(ctx.needs_input_grad):
            selection.by_column  # noqa: B018  # worked out here, so that the decoder shares it
        if is_rounded:
            centred = (x - b_dec).to(W_enc.dtype)
            products = _row_products(centred, W_enc.t().contiguous(), selection)
            return products + b_enc[selection.columns]
        return selection.values.to(W_enc.dtype, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_dec = ctx.saved_tensors
        selection = ctx.selection
        grad_x = None
        if ctx.needs_input_grad[0]:
            directions = W_enc.t().contiguous()
            grad_x = _sum_rows(directions, selection.columns, selection.offsets, grad)
        centred = (x - b_dec).to(W_enc.dtype)
        grad_W, grad_b_enc = _sum_by_column(centred, grad.contiguous(), selection)
        return grad_x, grad_W.t(), grad_b_enc, -(W_enc @ grad_b_enc), None, None


def _sum_by_column(
    matrix: Tensor, weights: Tensor, entries: SparseLatents
) -> tuple[Tensor, Tensor]:
    """(d_sae, n) and (d_sae,): each column's sums of weight * matrix[row], and of weights."""
    by_column = entries.by_column
    if native.serves(matrix, weights):
        sums, totals = torch.empty(entries.d_sae, matrix.shape[1]), torch.empty(entries.d_sae)
        arrays = (matrix.contiguous(), weights, *by_column, sums, totals)
        native.spread("sparse.encoder_gradient", entries.d_sae, *arrays)
        return sums, totals
    by_latent = weights[by_column.order]
    totals = torch.segment_reduce(by_latent, "sum", offsets=by_column.offsets)
    return _sum_rows(matrix, by_column.rows, by_column.offsets, by_latent), totals


class _GatherColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        pre_acts: Tensor | None,
        columns: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_dec, columns)
        if pre_acts is None:
            rows = W_enc.t().index_select(0, columns)
            return torch.addmm(b_enc[columns], (x - b_dec).to(W_enc.dtype), rows.t())
        return pre_acts.index_select(1, columns).to(W_enc.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_dec, columns = ctx.saved_tensors
        grad_W, grad_b_enc = torch.zeros_like(W_enc.t()), W_enc.new_zeros(W_enc.shape[1])
        grad_W[columns] = grad.t() @ (x - b_dec).to(grad.dtype)
        grad_b_enc[columns] = grad.sum(0)
        return None, grad_W.t(), grad_b_enc, -(W_enc @ grad_b_enc), None, None
