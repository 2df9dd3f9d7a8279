"""Products with lists: decoding, its error with the gradient at the latents, gradients of the weights."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from saeflow.operators import gpu
from saeflow.operators.gpu.lists import Lists

PIECE = 256
"""Entries of a column that one program sums up."""
MODULE = {"walk_columns": "columns", "decode_pair_of_lists": "pairs"}
"""Modules of kernels, "sparse" unless said."""
EACH = {"rescore_lists": 2}
"""Rows of a matrix that a kernel reads at a time, 4 unless said; measured on an H200."""


class Decoded(NamedTuple):
    """Results of one pass over the entries of each row."""

    error: Tensor  # (B, d) float32, x_hat - x
    kept: Tensor  # the same in the precision asked for; in groups (B, G, d), see `nested_errors`
    squares: Tensor  # (B,) float32, |error|^2
    products: Tensor  # (B, C) float32, error . W_dec[column] of each entry, 0 where not real
    of_all: (
        Tensor  # (B, d) float32, the sum of the errors of all prefixes of groups, of one the error
    )


class Gradients(NamedTuple):
    """Gradients of the weights that have a row, or an entry, for each latent; float32."""

    W_enc: Tensor  # (M, d) by rows
    b_enc: Tensor  # (M,)
    W_dec: Tensor  # (M, d)


def rescore(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    lists: Lists,
    lower: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Work out pre-activations (x - b_dec) . W_enc[column] + b_enc[column] of the entries.

    Args:
        x: (B, d).
        W_enc: (M, d) float32, by rows: `W_enc.t()` of an SAE.
        b_enc: (M,).
        b_dec: (d,).
        lists: whose values are left aside.
        lower: precision in which x - b_dec is returned; what is multiplied is in float32.

    Returns:
        (B, C) float32, and x - b_dec (B, d).
    """
    if not runs_triton(x, lists):
        products = row_products(x - b_dec, W_enc, lists)
        scores = torch.where(lists.real, products + b_enc[lists.columns.long()], 0)
        return scores, (x - b_dec).to(lower)
    out, kept = torch.empty_like(lists.values), torch.empty_like(x, dtype=lower)
    tensors = (_whole(x), _whole(W_enc), b_enc, b_dec, lists.columns, lists.counts, _owners(lists))
    launch("rescore_lists", len(out), x.shape[1], lists, *tensors, out, kept, len(x))
    return out, kept


def decode(lists: Lists, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """(B, d) float32, the sum of values times rows of W_dec (M, d) float32 or bfloat16, plus b_dec (d,)."""
    if not runs_triton(W_dec, lists):
        total = torch.zeros(len(lists.columns), W_dec.shape[1], device=W_dec.device)
        for columns, values in _by_slot(lists, lists.values.detach()):
            total = total + values[:, None] * W_dec[columns].float()
        total = lists.of_rows(total)
        return total if b_dec is None else total + b_dec
    out = lists.values.new_empty(len(lists.status), W_dec.shape[1])
    b = out if b_dec is None else b_dec
    tensors = (_whole(W_dec), b, *entries(lists), out)
    launch("decode_lists", len(out), W_dec.shape[1], lists, *tensors, HAS_BIAS=b_dec is not None)
    return out


def row_products(left: Tensor, right: Tensor, lists: Lists) -> Tensor:
    """(B, C) float32, left[b] (B, d) . right[column] (M, d) of each entry, 0 where not real."""
    if not runs_triton(left, lists):
        rows = lists.of_lists(left).float()
        found = [
            (rows * right[columns].float()).sum(1) for columns, _ in _by_slot(lists, lists.values)
        ]
        return torch.where(lists.real, torch.stack(found, 1), 0)
    out = torch.empty_like(lists.values)
    tensors = (_whole(left), _whole(right), lists.columns, lists.counts, _owners(lists), out)
    launch("products_of_lists", len(out), left.shape[1], lists, *tensors)
    return out


def decode_error(
    lists: Lists, W_dec: Tensor, b_dec: Tensor, x: Tensor, lower: torch.dtype = torch.float32
) -> Decoded:
    """The error of a reconstruction, and all that its square's gradients need, in one pass.

    Args:
        lists: latents.
        W_dec: (M, d) float32 or bfloat16.
        b_dec: (d,), or (n, d) where rows are in n blocks of one size, each with its own.
        x: (B, d).
        lower: precision of the error that gradients of weights are summed from.

    Returns:
        `Decoded`. The gradient of the sum of squares at the values is 2 products, at x_hat 2 error.
    """
    if not runs_triton(x, lists):
        bias = b_dec if b_dec.ndim == 1 else b_dec.repeat_interleave(len(x) // len(b_dec), 0)
        error = decode(lists, W_dec) + bias - x
        squares, products = error.square().sum(1), row_products(error, W_dec, lists)
        return Decoded(error, error.to(lower), squares, products, error)
    found, (n_rows, width) = room_for_error(lists, x, lower), x.shape
    inputs = _whole(x), _whole(W_dec), _whole(b_dec)
    columns, values, counts, _, parts = entries(lists)
    rows_each, has_lower = n_rows // (b_dec.numel() // width), found.kept is not found.error
    launch(
        "decode_error_of_lists", n_rows, width, lists, *inputs, columns, values, counts, parts, *found[:4], rows_each,
        HAS_LOWER=has_lower,
    )  # fmt: skip
    decode_parts(lists, *inputs, found)
    return found


def room_for_error(lists: Lists, x: Tensor, lower: torch.dtype = torch.float32) -> Decoded:
    """Make room for what `decode_error` finds."""
    error = torch.empty(x.shape, device=x.device)
    kept = error if lower == torch.float32 else torch.empty_like(error, dtype=lower)
    products = torch.empty_like(lists.values.detach())
    return Decoded(error, kept, error.new_empty(len(x)), products, error)


def decode_parts(lists: Lists, x: Tensor, W_dec: Tensor, b_dec: Tensor, found: Decoded) -> None:
    """Write what `decode_error` finds of the rows with several lists.

    A row's lists are summed side by side: one that has many would keep all others waiting.
    """
    if lists.spill is None:
        return
    (n_rows, width), owners = x.shape, lists.spill.owners
    columns, values, counts, first, parts = entries(lists)
    sums = found.error.new_empty(len(columns), width)
    launch("sums_of_parts", len(columns), width, lists, W_dec, columns, values, counts, owners, parts, sums)  # fmt: skip
    gpu.load("sparse").error_of_parts[(n_rows,)](
        x, b_dec, sums, first, parts, *found[:3], n_rows // (b_dec.numel() // width), width,
        HAS_LOWER=found.kept is not found.error, **gpu.of_rows(width),
    )  # fmt: skip
    launch("products_of_parts", len(columns), width, lists, found.error, W_dec, columns, counts, owners, parts, found.products, n_rows)  # fmt: skip


def twice_scaled(lists: Lists, products: Tensor, of_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return 2 of_rows (B,), and the products (R, C) of each list times that of its row."""
    if not runs_triton(products, lists):
        twice = 2 * of_rows
        return twice, lists.of_lists(twice)[:, None] * products
    twice, out = products.new_empty(len(of_rows)), torch.empty_like(products)
    gpu.load("sparse").scale_lists[(len(products),)](
        products, of_rows, _owners(lists), twice, out, of_rows.stride(0), len(twice),
        CAPACITY=lists.capacity, HAS_SPILL=lists.spill is not None, num_warps=gpu.warps_for(lists.capacity),
    )  # fmt: skip
    return twice, out


def nested_errors(
    lists: Lists,
    W_dec: Tensor,
    b_dec: Tensor,
    x: Tensor,
    boundaries: Tensor,
    lower: torch.dtype = torch.float32,
) -> Decoded:
    """Do `decode_error` for the reconstructions from the first group of latents, from the first two, and so on.

    Args:
        lists, W_dec, b_dec, x, lower: as for `decode_error`.
        boundaries: (G - 1,) int64, ascending: where each group but the last ends.

    Returns:
        `Decoded`: kept (B, G, d), at g the sum of the errors of the reconstructions from g + 1 groups or
        more, which is half of the gradient at what group g adds; squares, of all G together; products, with the
        error of each entry's group.
    """
    (n_rows, width), groups = x.shape, len(boundaries) + 1
    if not runs_triton(x, lists):
        row = torch.arange(len(lists.columns), device=x.device)
        parts = x.new_zeros(len(row), groups, width)
        of = torch.bucketize(lists.columns, boundaries.to(torch.int32), right=True)
        slots = list(_by_slot(lists, lists.values.detach()))
        for group, (columns, values) in zip(of.T, slots, strict=True):
            parts[row, group] = parts[row, group] + values[:, None] * W_dec[columns].float()
        errors = lists.of_rows(parts).cumsum(1) + (b_dec - x)[:, None]
        sums = errors.flip(1).cumsum(1).flip(1)
        of_lists = lists.of_lists(sums)
        found = [
            (of_lists[row, group] * W_dec[columns].float()).sum(1)
            for group, (columns, _) in zip(of.T, slots, strict=True)
        ]
        products = torch.where(lists.real, torch.stack(found, 1), 0)
        squares = errors.square().sum((1, 2))
        return Decoded(errors[:, -1], sums.to(lower), squares, products, sums[:, 0])
    error, of_all = torch.empty(2, *x.shape, device=x.device).unbind()
    sums = error.new_empty(n_rows, groups, width, dtype=lower)
    out = Decoded(error, sums, error.new_empty(n_rows), _products(lists), of_all)
    tensors = (_whole(x), _whole(W_dec), b_dec, boundaries, *entries(lists))
    launch("nested_errors_of_lists", n_rows, width, lists, *tensors, *out, GROUPS=groups)
    return out


def weight_gradients(
    centred: Tensor,
    grad: Tensor,
    lists: Lists,
    value_grads: Tensor,
    *,
    into: Gradients | None = None,
    boundaries: Tensor | None = None,
    scales: Tensor | None = None,
) -> Gradients:
    """Gradients of encoder and decoder, in one walk over the entries of each latent.

    Args:
        centred: (B, d) x - b_dec.
        grad: (B, d) gradient at x_hat, or (B, G, d) at what each group of latents adds to it.
        lists: latents, of which the decoder's gradient is the sum of value * grad[row].
        value_grads: (B, C) gradient at the pre-activations, of which the encoder's is the sum of
            value_grad * centred[row].
        into: gradients that these are added to; their memory is used.
        boundaries: (G - 1,) int64, of the groups.
        scales: (B,) float32, what each row of grad is to be multiplied with; None: 1.

    Returns:
        `Gradients`, float32. A latent's sums run in the order of rows, so they are the same each time.
    """
    M, d = lists.d_sae, centred.shape[1]
    if not runs_triton(centred, lists):
        W_enc, b_enc = column_sums(centred, lists, value_grads)
        W_dec, _ = column_sums(grad, lists, lists.values.detach(), boundaries, scales)
        if into is None:
            return Gradients(W_enc, b_enc, W_dec)
        for old, new in zip(into, (W_enc, b_enc, W_dec), strict=True):
            old += new
        return into
    is_added = into is not None
    if into is None:
        W_enc, W_dec = torch.empty(2, M, d, device=centred.device).unbind()
        into = Gradients(W_enc, torch.empty(M, device=centred.device), W_dec)
    _walk(lists, lists.values, grad, into, boundaries, scales, centred, value_grads, is_added)
    return into


def column_sums(
    matrix: Tensor,
    lists: Lists,
    weights: Tensor,
    boundaries: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One of the gradients of `weight_gradients`, where the other is not wanted with it.

    Args:
        matrix: (B, d), or (B, G, d) with one row for each group of latents.
        lists: whose values are left aside.
        weights: (B, C).
        boundaries: (G - 1,) int64, of the groups.
        scales: (B,) float32, what each row of the matrix is to be multiplied with; None: 1.

    Returns:
        (M, d) and (M,) float32: each column's sums of weight * matrix[row] and of weights.
    """
    M, d = lists.d_sae, matrix.shape[-1]
    if not runs_triton(matrix, lists):
        if scales is not None:
            matrix = matrix.float() * scales.view(-1, *[1] * (matrix.ndim - 1))
        sums = matrix.new_zeros(M, d, dtype=torch.float32)
        totals = sums.new_zeros(M)
        of_lists = lists.of_lists(matrix)
        row = torch.arange(len(of_lists), device=matrix.device)
        for columns, of_slot in _by_slot(lists, weights):
            rows = of_lists
            if boundaries is not None:
                rows = of_lists[row, torch.bucketize(columns.contiguous(), boundaries, right=True)]
            sums.index_add_(0, columns, of_slot[:, None] * rows.float())
            totals.index_add_(0, columns, of_slot)
        return sums, totals
    sums, totals = torch.empty(M, d, device=matrix.device), torch.empty(M, device=matrix.device)
    _walk(lists, weights, matrix, Gradients(sums, totals, sums), boundaries, scales)
    return sums, totals


def column_totals(lists: Lists, weights: Tensor) -> Tensor:
    """Return each column's sum (M,) float32 of the weights (B, C) float32 of its real entries."""
    if not runs_triton(weights, lists):
        flat = lists.columns.long().view(-1)
        kept = torch.where(lists.real, weights, 0).view(-1)
        return weights.new_zeros(lists.d_sae).index_add_(0, flat, kept)
    totals = torch.empty(lists.d_sae, device=weights.device)
    arguments = (_whole(weights), *lists.transposed, totals)
    gpu.load("columns").totals_by_columns[(lists.d_sae,)](*arguments, BLOCK=64, num_warps=1)
    return totals


def _walk(
    lists: Lists,
    values: Tensor,
    right: Tensor,
    into: Gradients,
    boundaries: Tensor | None,
    scales: Tensor | None,
    left: Tensor | None = None,
    value_grads: Tensor | None = None,
    is_added: bool = False,
) -> None:
    """Sum over each column's entries into gradients, of the left only where it is given; long columns in pieces."""
    M, d = lists.d_sae, right.shape[-1]
    has_left, count = left is not None, max(1, lists.columns.numel() // PIECE)
    parts = [into.W_dec.new_empty(count, d) for _ in range(1 + has_left)]
    of_parts = (parts[0], into.b_enc.new_empty(count), parts[-1])
    none = lists.columns  # where a kernel reads nothing
    launch(
        "walk_columns", M + count, d, lists,
        none if left is None else _whole(left), _whole(right), none if scales is None else _whole(scales),
        none if boundaries is None else boundaries, _owners(lists), lists.columns, *lists.transposed,
        _whole(values), none if value_grads is None else _whole(value_grads), *into, *of_parts, M,
        GROUPS=1 if boundaries is None else len(boundaries) + 1, HAS_SCALES=scales is not None,
        IS_ADDED=is_added, PIECE=PIECE, HAS_LEFT=has_left,
    )  # fmt: skip
    gpu.load("columns").add_pieces[(count,)](
        lists.columns, *lists.transposed, *into, *of_parts, M, d,
        PIECE=PIECE, HAS_LEFT=has_left, **gpu.of_rows(d),
    )  # fmt: skip


def _owners(lists: Lists) -> Tensor:
    """Return the owners of lists for a kernel, or something that it does not read."""
    return lists.columns if lists.spill is None else lists.spill.owners


def entries(lists: Lists) -> tuple[Tensor, ...]:
    """Return what a kernel needs to go through the entries of rows."""
    spill = (lists.columns,) * 2 if lists.spill is None else lists.spill[1:]
    return (lists.columns, _whole(lists.values), lists.counts, *spill)


def _products(lists: Lists) -> Tensor:
    """Make room for a number for each entry; 0 in spare lists that no row has."""
    values = lists.values.detach()
    return torch.empty_like(values) if lists.spill is None else torch.zeros_like(values)


def _by_slot(lists: Lists, values: Tensor) -> Any:
    """Columns (R,) and values (R,) of the first entry of each list, of the second, ...; 0 where there is none."""
    return zip(lists.columns.T.long(), values.where(lists.real, 0).T, strict=True)


def runs_triton(tensor: Tensor, lists: Lists) -> bool:
    return gpu.runs_triton(tensor, lists.columns) and tensor.numel() > 0


def _whole(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous()


def launch(
    kernel: str, programs: int, width: int, lists: Lists, *arguments: Any, **constants: Any
) -> None:
    """Run a kernel that holds rows of `width` numbers in registers."""
    constants["CAPACITY"] = lists.capacity
    if not kernel.endswith("_parts"):  # which there are of spare lists alone
        constants["HAS_SPILL"] = lists.spill is not None
    each = max(1, min(EACH.get(kernel, 4), 4096 // gpu.block_for(width)))
    getattr(gpu.load(MODULE.get(kernel, "sparse")), kernel)[(programs,)](
        *arguments, width, EACH=each, **gpu.of_rows(width), **constants
    )
