"""Hard top-k: keep the k largest entries of each row, ties to the lower index."""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from saeflow.operators import gpu, native
from saeflow.operators.autograd import applied
from saeflow.operators.gpu import selection
from saeflow.operators.gpu.lists import MOST_ON_A_LIST, NAN, capacity_for
from saeflow.operators.rows import (
    SomeEntries,
    as_rows,
    blocks,
    group_maxima,
    group_size,
    kth_largest,
    kth_largest_by_bisection,
    next_below,
    pad,
    positions,
    refuse_row,
    refuse_rows,
)
from saeflow.operators.sparse import SparseLatents, room


def keep_topk(values: Tensor, k: int | Tensor) -> Tensor:
    """Zero all but the k largest entries of each row.

    Of equal entries the one with the lower index is kept, so the result is deterministic. No row
    is sorted: the k-th largest of the group maxima is a proven floor, and the exact choice is made
    among the few entries above it, then, if they are too few, among those equal to it.

    Args:
        values: (..., n) floating point, n >= 1. Infinities are ordinary values.
        k: entries to keep per row, an int or an integer tensor of the leading shape; k >= 0,
            and k > n keeps all.

    Returns:
        (..., n), dtype and device of `values`. Differentiable: the gradient passes unchanged
        through the kept entries and is zero elsewhere.

    Raises:
        TypeError: `values` is not floating point, or `k` not an integer.
        ValueError: `k` is negative or of another shape, or a row holds NaN (named).

    Source: Gao et al. 2024 (arXiv:2406.04093), eq. 4.
    """
    return keep_positions(values, _choose(values, k).flat)


def topk_indices(values: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row: their indices, ascending, and values.

    The choice is that of `keep_topk`. With a k per row, rows are filled up on the right to the
    largest k; an unused slot has index 0 and value 0, so it adds nothing to a sum.

    Args:
        values: (..., n) floating point, n >= 1.
        k: entries per row, as in `keep_topk`.

    Returns:
        indices (..., min(max k, n)) int64 and values of that shape, differentiable.

    Raises:
        TypeError, ValueError: as `keep_topk`.
    """
    chosen = _choose(values, k)
    counts = chosen.offsets.diff()
    indices, real = pad(chosen.columns, counts, 0)
    width = int(counts.max()) if len(counts) else 0
    shape = (*values.shape[:-1], width)
    indices, real = indices[:, :width].reshape(shape), real[:, :width].reshape(shape)
    return indices, values.gather(-1, indices).masked_fill(~real, 0)


def topk_sparse(values: Tensor, k: int | Tensor, most: int | None = None) -> SparseLatents:
    """`keep_topk` of a (B, n) matrix as sparse latents: exactly k entries a row, zeros included.

    Args, Raises: as `keep_topk`, with one leading dimension. Differentiable in the values.
        most: see `sparse.room`; then nothing is raised for what a row holds, the values are constants, and k
            may be () on the device, at most the room.
    """
    if values.ndim != 2:
        raise ValueError(f"values must be (B, n), got {tuple(values.shape)}")
    if (capacity := room(values, most)) is not None:
        return SparseLatents.of(selection.topk(values, k, capacity))
    return _choose(values, k).taken_from(values)


def _choose(values: Tensor, k: int | Tensor) -> SparseLatents:
    """The kept entries of (..., n) as rows, without gradient."""
    rows = as_rows(values, "values")
    counts = _counts(k, values).clamp(max=rows.shape[1])
    if native.serves(rows):
        offsets, columns, kept = SparseLatents.room_for(counts)
        arrays = (rows, counts, offsets[1:], columns, kept)
        for bad in native.spread("selection.topk_rows", len(rows), *arrays):
            refuse_row(bad, "values hold NaN")
        return SparseLatents(offsets, columns, kept, rows.shape[1])
    if gpu.serves_scores(values) and (chosen := _choose_on_gpu(values, counts)) is not None:
        return chosen
    found = [
        _positions_in_block(rows[at], counts[at], at.start) + at.start * rows.shape[1]
        for at in blocks(rows)
    ]
    flat = torch.cat(found) if found else counts.new_empty(0)
    return SparseLatents.from_positions(flat, rows.view(-1)[flat], *rows.shape)


def _choose_on_gpu(values: Tensor, counts: Tensor) -> SparseLatents | None:
    """The entries, by a list of each row; None where a k is too large, or reaches -inf."""
    most = int(counts.max())
    if most > MOST_ON_A_LIST:
        return None
    rows = values.reshape(len(counts), values.shape[-1])
    found = selection.topk(rows, counts, capacity_for(most))
    refuse_rows((found.status & NAN) > 0, 0, "values hold NaN")
    return SparseLatents.from_lists(found) if torch.equal(found.counts, counts.int()) else None


def keep_positions(values: Tensor, flat: Tensor) -> Tensor:
    """Zero all entries but those at the flat positions, each given once."""
    return applied(_KeepPositions, values, flat)


def _counts(k: int | Tensor, values: Tensor) -> Tensor:
    """k as (rows,) int64."""
    leading = values.shape[:-1]
    if isinstance(k, bool) or not isinstance(k, Integral | Tensor):
        raise TypeError(f"k must be an int or an integer tensor, got {type(k).__name__}")
    if not isinstance(k, Tensor):
        k = torch.full(leading, int(k), device=values.device)
    if k.is_floating_point() or k.dtype == torch.bool or k.is_complex():
        raise TypeError(f"k must be an int or an integer tensor, got {k.dtype}")
    if k.shape != leading:
        raise ValueError(f"k must have the leading shape {tuple(leading)}, got {tuple(k.shape)}")
    counts = k.reshape(-1).to(values.device, torch.int64)
    refuse_rows(counts < 0, 0, "k must be >= 0", counts)
    return counts


def _positions_in_block(block: Tensor, k: Tensor, start: int) -> Tensor:
    size = group_size(block.shape[1], int(k.max()))
    if size == 1:
        refuse_rows(block.isnan().any(1), start, "values hold NaN")
        return positions(_topk_mask(block, kth_largest_by_bisection(block, k), k))
    maxima = group_maxima(block, size)
    refuse_rows(maxima.isnan().any(1), start, "values hold NaN")
    floor = kth_largest(maxima, k)  # at least k entries are at or above it
    is_crowded = (maxima == floor[:, None]).sum(1) > k  # a common value, such as 0 after a relu
    candidates = SomeEntries.above(block, floor.where(is_crowded, next_below(floor)))
    entries = candidates.gather(block, float("-inf"))
    from_above = candidates.counts.minimum(k)
    kept = _topk_mask(entries, kth_largest(entries, from_above), from_above)
    flat = candidates.flat[candidates.ungather(kept)]
    short = (from_above < k).nonzero()[:, 0]  # crowded, and the floor is the k-th largest
    if len(short) == 0:
        return flat
    ties = _first(block[short] == floor[short, None], (k - from_above)[short])
    tied_rows, tied_columns = ties.nonzero(as_tuple=True)
    return torch.cat((flat, short[tied_rows] * block.shape[1] + tied_columns)).sort().values


def _topk_mask(entries: Tensor, threshold: Tensor, k: Tensor) -> Tensor:
    """Mark the k largest entries, given the k-th largest."""
    above = entries > threshold[:, None]
    return above | _first(entries == threshold[:, None], k - above.sum(1))


def _first(mask: Tensor, count: Tensor) -> Tensor:
    """The first `count` (rows,) true entries of each row."""
    return mask & (mask.cumsum(1, dtype=torch.int32) <= count[:, None])


class _KeepPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, flat: Tensor) -> Tensor:
        ctx.save_for_backward(flat)
        kept = values.new_zeros(values.shape)
        kept.view(-1)[flat] = values.reshape(-1)[flat]
        return kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return keep_positions(grad, *ctx.saved_tensors), None
