"""Batch top-k: keep the largest entries of a whole batch, k per row on average."""

import math
from collections.abc import Callable
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from saeflow.operators import gpu, native
from saeflow.operators.gpu import selection
from saeflow.operators.gpu.lists import MOST_ON_A_LIST, NAN, capacity_for, spare_for
from saeflow.operators.rows import (
    as_rows,
    blocks,
    group_maxima,
    group_size,
    positions,
    refuse_row,
    refuse_rows,
)
from saeflow.operators.sparse import SparseLatents, room
from saeflow.operators.topk import keep_positions

SAMPLE, ROOM = 64, 256  # rows that the first floor is guessed from; spare entries a row
FACTORS = (1.5, 4.0)  # of the wanted entries that are to lie above the guess


def batch_topk(values: Tensor, k: float) -> Tensor:
    """Zero all but the round(rows * k) largest entries of the batch.

    Of equal entries the one with the lower flat index is kept. The batch is not sorted: the
    K-th largest of the group maxima is a proven floor, and the exact choice is made among the
    entries at or above it.

    Args:
        values: (..., n) floating point, n >= 1. Infinities are ordinary values.
        k: mean number of entries to keep per row, a number >= 0; k > n keeps all.

    Returns:
        (..., n), dtype and device of `values`. Differentiable: the gradient passes unchanged
        through the kept entries and is zero elsewhere.

    Raises:
        TypeError: `values` is not floating point, or `k` not a number.
        ValueError: `k` is negative or not finite, or a row holds NaN (named).

    Source: Bussmann et al. 2024 (arXiv:2412.06410), section 3.
    """
    return keep_positions(values, _choose(values, k).flat)


def batch_topk_sparse(values: Tensor, k: float | Tensor, most: int | None = None) -> SparseLatents:
    """`batch_topk` of a (B, n) matrix as sparse latents: round(B * k) entries, rows of any length.

    Args, Raises: as `batch_topk`, with one leading dimension. Differentiable in the values.
        most: see `sparse.room`; then nothing is raised for what a row holds, the values are constants, and k
            may be () float64 on the device.
    """
    if values.ndim != 2:
        raise ValueError(f"values must be (B, n), got {tuple(values.shape)}")
    if (capacity := room(values, most)) is not None:
        wanted, spare = len(values) * k, spare_for(len(values))
        total = wanted.round().long() if isinstance(wanted, Tensor) else round(wanted)
        return SparseLatents.of(selection.batch_topk(values, total, capacity, spare))
    return _choose(values, k).taken_from(values)


def _choose(values: Tensor, k: float | Tensor) -> SparseLatents:
    """The kept entries of (..., n) as rows, without gradient."""
    rows = as_rows(values, "values")
    if isinstance(k, bool) or not isinstance(k, Real):
        raise TypeError(f"k must be a number, the mean per row, got {type(k).__name__}")
    if not (math.isfinite(k) and k >= 0):
        raise ValueError(f"k must be finite and >= 0, got {k}")
    total = min(round(len(rows) * k), rows.numel())
    if native.serves(rows) and (chosen := _choose_natively(rows, total)) is not None:
        return chosen
    if gpu.serves_scores(values) and (found := _choose_on_gpu(values, total)) is not None:
        return found
    flat = _positions(rows, total, math.ceil(k))
    return SparseLatents.from_positions(flat, rows.view(-1)[flat], *rows.shape)


def _positions(rows: Tensor, total: int, k: int) -> Tensor:
    """Ascending flat positions of the largest entries of all rows, about k a row."""
    size = group_size(rows.shape[1], k)
    maxima = [rows.new_empty(0)]
    for at in blocks(rows):
        of_block = group_maxima(rows[at], size)
        refuse_rows(of_block.isnan().any(1), at.start, "values hold NaN")
        maxima.append(of_block.view(-1))
    if total == 0:
        return torch.empty(0, dtype=torch.int64, device=rows.device)
    floor = _kth_largest(torch.cat(maxima), total)  # at least `total` entries are at or above it
    flat = _where(rows, lambda block: block > floor, rows.numel())
    entries = rows.view(-1)[flat]
    if len(flat) < total:  # the floor is the K-th largest
        ties = _where(rows, lambda block: block == floor, total - len(flat))
        return torch.cat((flat, ties)).sort().values
    threshold = _kth_largest(entries, total)
    above = entries > threshold
    ties = entries == threshold
    return flat[above | (ties & (ties.cumsum(0) <= total - above.sum()))]


def _choose_natively(rows: Tensor, total: int) -> SparseLatents | None:
    """The entries, from one reading of the rows; None where no floor fits in a few attempts.

    The floor is guessed from a sample of rows, so that somewhat more entries than wanted are at or
    above it, and the choice among them is exact.
    """
    n, mean = rows.shape[1], max(1, math.ceil(total / max(1, len(rows))))
    groups = native.call("selection.group_count", n, mean)
    if total == 0 or groups == n or len(rows) < SAMPLE:
        return None
    maxima = torch.empty(SAMPLE, groups)
    native.call("selection.sample_maxima", rows, groups, len(rows) // SAMPLE, maxima)
    counts, begins = torch.empty(2, len(rows), dtype=torch.int64)
    offsets = torch.zeros(len(rows) + 1, dtype=torch.int64)
    chosen = offsets, torch.empty(total, dtype=torch.int64), torch.empty(total)
    for factor in FACTORS:
        wanted = math.ceil(factor * total / len(rows) * SAMPLE)
        if wanted > maxima.numel():
            return None
        floor = np.float32(_kth_largest(maxima.view(-1), wanted))
        room = math.ceil(4 * factor * mean) + ROOM
        entries = torch.empty(len(rows) * room), torch.empty(len(rows) * room, dtype=torch.int32)
        found = native.spread(
            "selection.rows_from", len(rows), rows, groups, floor, room, counts, begins, *entries
        )
        refuse_row(max(found), "values hold NaN")
        if min(found) == -1 and native.call(
            "selection.batch_largest", total, counts, begins, *entries, *chosen
        ):
            return SparseLatents(*chosen, n)
    return None


def _choose_on_gpu(values: Tensor, total: int) -> SparseLatents | None:
    """The entries, by a list of each row; None where some row may have more than there is room for."""
    rows = values.reshape(-1, values.shape[-1])
    room = min(rows.shape[1], 2 * math.ceil(total / len(rows)), MOST_ON_A_LIST)
    found = selection.batch_topk(rows, total, capacity_for(room), spare_for(len(rows)))
    refuse_rows((found.status & NAN) > 0, 0, "values hold NaN")
    is_whole = not found.status.any() and int(found.counts.sum()) == total
    return SparseLatents.from_lists(found) if is_whole else None


def _where(rows: Tensor, test: Callable[[Tensor], Tensor], most: int) -> Tensor:
    """The first `most` flat positions whose entries pass the test, ascending."""
    found = []
    for at in blocks(rows):
        found.append(positions(test(rows[at]))[:most] + at.start * rows.shape[1])
        most -= len(found[-1])
        if most == 0:
            break
    return torch.cat(found)


def _kth_largest(entries: Tensor, k: int) -> Tensor:
    return entries.topk(k, sorted=False).values.amin()
