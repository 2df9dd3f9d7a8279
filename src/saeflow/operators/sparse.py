"""Sparse latents: only the active entries are stored, decoded and differentiated.

Every product of a step with a few active latents per row is a weighted sum of rows of a matrix,
chosen by index, and torch's embedding-bag kernel is the fastest of those on a CPU: decoding sums
rows of `W_dec` for each input, the weight gradients sum inputs for each latent. Each sum runs in a
fixed order, so the same input gives the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from saeflow.operators import gpu, native
from saeflow.operators.rows import pad, positions


class ByColumn(NamedTuple):
    """The same entries ordered by column, then row: the transpose's structure."""

    order: Tensor  # (count,) position of each entry in the order by row
    rows: Tensor  # (count,)
    offsets: Tensor  # (d_sae + 1,)


@dataclass(frozen=True, eq=False)
class SparseLatents:
    """The active entries of a (B, d_sae) matrix, by rows (CSR).

    One form serves top-k, batch top-k and a k per row: rows may differ in length. For a fixed k it
    costs nothing over a (B, k) rectangle, since the kernels take offsets either way.

    Attributes:
        offsets: (B + 1,) int64; row b holds entries offsets[b] up to offsets[b + 1].
        columns: (count,) int64 in 0..d_sae-1, ascending within a row, no column twice in a row.
        values: (count,) floating point; the only differentiable part.
        d_sae: number of columns.
    """

    offsets: Tensor
    columns: Tensor
    values: Tensor
    d_sae: int

    @staticmethod
    def from_positions(flat: Tensor, values: Tensor, n_rows: int, d_sae: int) -> "SparseLatents":
        """Entries at ascending flat positions (count,) of an (n_rows, d_sae) matrix."""
        rows = flat.div(d_sae, rounding_mode="floor")
        return SparseLatents(_offsets(rows, n_rows), flat - rows * d_sae, values, d_sae)

    @staticmethod
    def room(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets of rows of counts (B,) entries, and memory for their columns and float32 values."""
        offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        count = int(offsets[-1])
        return offsets, torch.empty(count, dtype=torch.int64), torch.empty(count)

    @staticmethod
    def from_mask(values: Tensor, mask: Tensor) -> "SparseLatents":
        """Entries of values (B, d_sae) where the mask (B, d_sae) is true, differentiable."""
        if values.ndim != 2 or mask.shape != values.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"expected values (B, d_sae) and a bool mask of that shape, got "
                f"{tuple(values.shape)} and {mask.dtype} {tuple(mask.shape)}"
            )
        flat = positions(mask)
        return SparseLatents.from_positions(flat, values.reshape(-1)[flat], *values.shape)

    @staticmethod
    def from_above(values: Tensor, threshold: Tensor | float) -> "SparseLatents":
        """Entries of values (B, d_sae) above a threshold, one or (d_sae,), differentiable."""
        limits = torch.as_tensor(threshold, dtype=values.dtype, device=values.device).detach()
        rows = values.detach()
        if not (native.serves(rows) and rows.is_contiguous()):
            return SparseLatents.from_mask(values, rows > limits)
        limits = limits.expand(values.shape[1]).contiguous()
        counts = torch.empty(len(rows), dtype=torch.int64)
        native.spread("selection.count_above", len(rows), rows, limits, counts)
        chosen = SparseLatents(*SparseLatents.room(counts), values.shape[1])
        arrays = (rows, limits, chosen.offsets, chosen.columns, chosen.values)
        native.spread("selection.columns_above", len(rows), *arrays)
        return chosen.taken_from(values)

    @staticmethod
    def from_dense(latents: Tensor) -> "SparseLatents":
        """The non-zero entries of latents (B, d_sae), differentiable."""
        return SparseLatents.from_mask(latents, latents.detach() != 0)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def rows(self) -> Tensor:
        """(count,) int64: the row of each entry."""
        return torch.repeat_interleave(self.offsets.diff(), output_size=len(self.columns))

    @cached_property
    def flat(self) -> Tensor:
        """(count,) int64: the place of each entry in the flattened matrix."""
        return self.rows * self.d_sae + self.columns

    @cached_property
    def by_column(self) -> ByColumn:
        """The transpose's structure, worked out once and shared by every `with_values`."""
        if native.serves(self.values):
            order, rows = torch.empty(2, len(self.columns), dtype=torch.int64)
            offsets = torch.empty(self.d_sae + 1, dtype=torch.int64)
            arrays = (self.offsets, self.columns, self.d_sae, order, rows, offsets)
            native.call("sparse.transpose", *arrays)
            return ByColumn(order, rows, offsets)
        columns, order = self.columns.sort(stable=True)
        return ByColumn(order, self.rows[order], _offsets(columns, self.d_sae))

    def with_values(self, values: Tensor) -> "SparseLatents":
        """The same entries with other values (count,)."""
        if values.shape != self.columns.shape:
            raise ValueError(f"expected {len(self.columns)} values, got {tuple(values.shape)}")
        other = replace(self, values=values)
        for name in ("rows", "flat", "by_column"):
            if name in self.__dict__:
                other.__dict__[name] = self.__dict__[name]
        return other

    def keep(self, chosen: Tensor) -> "SparseLatents":
        """The entries that a mask (count,) chooses."""
        offsets = _offsets(self.rows[chosen], len(self))
        return SparseLatents(offsets, self.columns[chosen], self.values[chosen], self.d_sae)

    @staticmethod
    def from_rows_above(values: Tensor, bounds: Tensor) -> "SparseLatents":
        """Entries of values (B, d_sae) that reach their row's bound (B,), differentiable."""
        return SparseLatents.from_mask(values, values.detach() >= bounds[:, None])

    def least(self) -> Tensor:
        """(B,) the smallest value of each row, inf where a row has none; without gradient."""
        return torch.segment_reduce(
            self.values.detach(), "min", offsets=self.offsets, initial=torch.inf
        )

    def taken_from(self, matrix: Tensor) -> "SparseLatents":
        """The same entries of the matrix (B, d_sae) they were chosen from, with its gradient."""
        if matrix.requires_grad and torch.is_grad_enabled():
            return self.with_values(matrix.reshape(-1)[self.flat])
        return self.with_values(self.values.to(matrix.dtype))

    def map_rows(self, operator: Callable[[Tensor], Tensor]) -> "SparseLatents":
        """Apply a row operator that gives absent entries (-inf) the value 0, such as sparsemax.

        The operator sees a (B, longest row) rectangle. The result is that of the dense operator
        if the entries include every one to which the dense operator gives a value.
        """
        padded, real = pad(self.values, self.offsets.diff(), float("-inf"))
        return self.with_values(operator(padded)[real])

    def split_columns(self, boundaries: Tensor) -> "SparseLatents":
        """Cut each row at column boundaries (G - 1,), ascending: B rows become B * G, in order."""
        groups = len(boundaries) + 1
        pieces = self.rows * groups + torch.bucketize(self.columns, boundaries, right=True)
        offsets = _offsets(pieces, len(self) * groups)
        return SparseLatents(offsets, self.columns, self.values, self.d_sae)

    def dense(self) -> Tensor:
        """(B, d_sae) with zeros elsewhere, differentiable in the values."""
        out = self.values.new_zeros(len(self) * self.d_sae)
        return out.scatter(0, self.flat, self.values).view(len(self), self.d_sae)

    def l0(self) -> Tensor:
        """(B,) int64: number of non-zero values in each row."""
        return torch.bincount(self.rows[self.values.detach() != 0], minlength=len(self))


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
    x_hat = _Decode.apply(latents.values, W_dec, latents)
    return x_hat if b_dec is None else x_hat + b_dec


def gather_pre_acts(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    selection: SparseLatents,
    *,
    is_rounded: bool = False,
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
    return selection.with_values(
        _GatherPreActs.apply(x, W_enc, b_enc, b_dec, selection, is_rounded)
    )


def gather_columns(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, pre_acts: Tensor, columns: Tensor
) -> Tensor:
    """Some columns (n,) of a = (x - b_dec) W_enc + b_enc, with the encoder's gradient.

    Returns:
        (B, n), dtype of `W_enc`, differentiable in W_enc, b_enc and b_dec, not in x.
    """
    return _GatherColumns.apply(x, W_enc, b_enc, b_dec, pre_acts, columns)


def _offsets(sorted_ids: Tensor, count: int) -> Tensor:
    """(n,) ids in 0..count-1 -> (count + 1,) where each id's run starts."""
    offsets = sorted_ids.new_zeros(count + 1)
    torch.cumsum(torch.bincount(sorted_ids, minlength=count), 0, out=offsets[1:])
    return offsets


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
        latents, by_column = ctx.latents, ctx.latents.by_column
        grad, W_dec = grad.contiguous(), W_dec.contiguous()
        of_values, of_W, _ = ctx.needs_input_grad
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
        pre_acts: Tensor,
        columns: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_dec, columns)
        return pre_acts.index_select(1, columns).to(W_enc.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_dec, columns = ctx.saved_tensors
        grad_W, grad_b_enc = torch.zeros_like(W_enc.t()), W_enc.new_zeros(W_enc.shape[1])
        grad_W[columns] = grad.t() @ (x - b_dec).to(grad.dtype)
        grad_b_enc[columns] = grad.sum(0)
        return None, grad_W.t(), grad_b_enc, -(W_enc @ grad_b_enc), None, None
