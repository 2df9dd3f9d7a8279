"""Products with lists: decoding, its error with the gradient at the latents, gradients of the weights."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from saeflow.operators import gpu
from saeflow.operators.gpu.lists import Lists


class Decoded(NamedTuple):
    """Results of one pass over the entries of each row."""

    error: Tensor  # (B, d) float32, x_hat - x
    squares: Tensor  # (B,) float32, |error|^2
    products: Tensor  # (B, C) float32, error . W_dec[column] of each entry, 0 where not real


class Gradients(NamedTuple):
    """Gradients of the weights that have a row, or an entry, for each latent; float32."""

    W_enc: Tensor  # (M, d) by rows
    b_enc: Tensor  # (M,)
    W_dec: Tensor  # (M, d)
    squares: Tensor  # (M,) sum of squares of the three


def rescore(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, lists: Lists) -> Tensor:
    """(B, C) float32 pre-activations (x - b_dec) . W_enc[column] + b_enc[column] of the entries.

    Args:
        x: (B, d).
        W_enc: (M, d) float32, by rows: `W_enc.t()` of an SAE.
        b_enc: (M,).
        b_dec: (d,).
        lists: whose values are left aside.
    """
    if not _runs_triton(x, lists):
        products = row_products(x - b_dec, W_enc, lists)
        return torch.where(lists.real, products + b_enc[lists.columns.long()], 0)
    out = torch.empty_like(lists.values)
    tensors = (_whole(x), _whole(W_enc), b_enc, b_dec, lists.columns, lists.counts, out)
    _launch("rescore_lists", len(x), x.shape[1], *tensors, CAPACITY=lists.capacity)
    return out


def decode(lists: Lists, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """(B, d) float32, the sum of values times rows of W_dec (M, d) float32 or bfloat16, plus b_dec (d,)."""
    if not _runs_triton(W_dec, lists):
        out = torch.zeros(len(lists.columns), W_dec.shape[1], device=W_dec.device)
        out = out if b_dec is None else out + b_dec
        for columns, values in _by_slot(lists.columns, lists.values.detach()):
            out = out + values[:, None] * W_dec[columns].float()
        return out
    out = lists.values.new_empty(len(lists.columns), W_dec.shape[1])
    b = out if b_dec is None else b_dec
    tensors = (_whole(W_dec), b, lists.columns, lists.values.detach(), lists.counts, out)
    constants = {"CAPACITY": lists.capacity, "HAS_BIAS": b_dec is not None}
    _launch("decode_lists", len(out), W_dec.shape[1], *tensors, **constants)
    return out


def row_products(left: Tensor, right: Tensor, lists: Lists) -> Tensor:
    """(B, C) float32, left[b] (B, d) . right[column] (M, d) of each entry, 0 where not real."""
    if not _runs_triton(left, lists):
        found = [
            (left.float() * right[columns].float()).sum(1)
            for columns, _ in _by_slot(lists.columns, lists.values)
        ]
        return torch.where(lists.real, torch.stack(found, 1), 0)
    out = torch.empty_like(lists.values)
    tensors = (_whole(left), _whole(right), lists.columns, lists.counts, out)
    _launch("products_of_lists", len(left), left.shape[1], *tensors, CAPACITY=lists.capacity)
    return out


def decode_error(lists: Lists, W_dec: Tensor, b_dec: Tensor, x: Tensor) -> Decoded:
    """The error of a reconstruction, and all that its square's gradients need, in one pass.

    Args:
        lists: latents.
        W_dec: (M, d) float32 or bfloat16.
        b_dec: (d,).
        x: (B, d).

    Returns:
        `Decoded`. The gradient of the sum of squares at the values is 2 products, at x_hat 2 error.
    """
    if not _runs_triton(x, lists):
        error = decode(lists, W_dec, b_dec) - x
        return Decoded(error, error.square().sum(1), row_products(error, W_dec, lists))
    error = torch.empty(x.shape, device=x.device)
    squares, products = error.new_empty(len(x)), torch.empty_like(lists.values)
    tensors = (_whole(x), _whole(W_dec), b_dec, lists.columns, lists.values.detach(), lists.counts)
    out = (error, squares, products)
    _launch("decode_error_of_lists", len(x), x.shape[1], *tensors, *out, CAPACITY=lists.capacity)
    return Decoded(*out)


def weight_gradients(
    centred: Tensor,
    grad: Tensor,
    lists: Lists,
    value_grads: Tensor,
    unit_rows: Tensor | None = None,
    into: Gradients | None = None,
) -> Gradients:
    """Gradients of encoder and decoder, in one walk over the entries of each latent.

    Args:
        centred: (B, d) x - b_dec.
        grad: (B, d) gradient at x_hat.
        lists: latents, of which the decoder's gradient is the sum of value * grad[row].
        value_grads: (B, C) gradient at the pre-activations, of which the encoder's is the sum of
            value_grad * centred[row]; 0 where an entry is not real.
        unit_rows: (M, d), the decoder, where its rows have unit norm: the part of its gradient along
            each row is left out.
        into: gradients that these are added to; their memory is used.

    Returns:
        `Gradients`, float32. A latent's sums run in the order of rows, so they are the same each time.
    """
    M, d = lists.d_sae, centred.shape[1]
    is_added = into is not None
    if not _runs_triton(centred, lists):
        W_enc, W_dec = centred.new_zeros(2, M, d, dtype=torch.float32)
        b_enc = W_enc.new_zeros(M)
        slots = zip(lists.columns.T.long(), lists.values.detach().T, value_grads.T, strict=True)
        for columns, values, grads in slots:
            W_enc.index_add_(0, columns, grads[:, None] * centred.float())
            W_dec.index_add_(0, columns, values[:, None] * grad.float())
            b_enc.index_add_(0, columns, grads)
        if unit_rows is not None:
            W_dec -= torch.linalg.vecdot(W_dec, unit_rows)[:, None] * unit_rows
        if into is not None:
            for old, new in zip(into[:3], (W_enc, b_enc, W_dec), strict=True):
                new += old
        squares = W_enc.square().sum(1) + W_dec.square().sum(1) + b_enc.square()
        return Gradients(W_enc, b_enc, W_dec, squares)
    if into is None:
        empty = (
            torch.empty(2, M, d, device=centred.device),
            torch.empty(2, M, device=centred.device),
        )
        into = Gradients(empty[0][0], empty[1][0], empty[0][1], empty[1][1])
    order, offsets = lists.transposed
    has_unit_rows = unit_rows is not None
    rows = into.W_dec if unit_rows is None else _whole(unit_rows)
    tensors = (_whole(centred), _whole(grad), rows, order, offsets)
    values = (lists.values.detach().contiguous(), value_grads.contiguous())
    constants = {"CAPACITY": lists.capacity, "IS_ADDED": is_added, "HAS_UNIT_ROWS": has_unit_rows}
    _launch("gradients_of_weights", M, d, *tensors, *values, *into, **constants)
    return into


def column_sums(matrix: Tensor, lists: Lists, weights: Tensor) -> tuple[Tensor, Tensor]:
    """One of the gradients of `weight_gradients`, where the other is not wanted with it.

    Args:
        matrix: (B, d).
        lists: whose values are left aside.
        weights: (B, C), 0 where an entry is not real.

    Returns:
        (M, d) and (M,) float32: each column's sums of weight * matrix[row] and of weights.
    """
    M, d = lists.d_sae, matrix.shape[1]
    if not _runs_triton(matrix, lists):
        sums = matrix.new_zeros(M, d, dtype=torch.float32)
        totals = sums.new_zeros(M)
        for columns, of_slot in _by_slot(lists.columns, weights):
            sums.index_add_(0, columns, of_slot[:, None] * matrix.float())
            totals.index_add_(0, columns, of_slot)
        return sums, totals
    sums, totals = torch.empty(M, d, device=matrix.device), torch.empty(M, device=matrix.device)
    tensors = (_whole(matrix), *lists.transposed, _whole(weights), sums, totals)
    _launch("sums_by_columns", M, d, *tensors, CAPACITY=lists.capacity)
    return sums, totals


def _by_slot(columns: Tensor, values: Tensor) -> Any:
    """Columns (B,) and values (B,) of the first entry of each row, of the second, ..."""
    return zip(columns.T.long(), values.T, strict=True)


def _runs_triton(tensor: Tensor, lists: Lists) -> bool:
    return gpu.runs_triton(tensor, lists.columns) and tensor.numel() > 0


def _whole(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous()


def _launch(kernel: str, programs: int, width: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel that holds a row of `width` numbers in registers."""
    block = 1 << max(4, (width - 1).bit_length())
    function = getattr(gpu.load("sparse"), kernel)
    warps = max(1, min(16, block // 256))
    function[(programs,)](*arguments, width, BLOCK=block, num_warps=warps, **constants)
