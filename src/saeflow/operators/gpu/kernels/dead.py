"""Kernels of AuxK: which latents are dead, the largest of them in each row, and the share of the error that they leave."""

import triton
import triton.language as tl

from saeflow.operators.gpu.kernels.ranks import keys_of, kth_largest


@triton.jit(do_not_specialize=["count"])
def dead_columns(dead, columns, numbers, count, n, WIDE: tl.constexpr):
    """Write the first `count` of the dead columns, ascending, then of the others; how many are dead, and again if that is more."""
    at = tl.arange(0, WIDE)
    total = tl.full((), 0, tl.int32)
    for start in range(0, n, WIDE):
        flag = tl.load(dead + start + at, mask=start + at < n, other=0)
        total += tl.sum((flag != 0).to(tl.int32), 0)
    before = tl.full((), 0, tl.int32)
    for start in range(0, n, WIDE):
        column = start + at
        is_dead = tl.load(dead + column, mask=column < n, other=0) != 0
        upto = before + tl.cumsum(is_dead.to(tl.int32), 0)
        place = tl.where(is_dead, upto - 1, total + column - upto)
        tl.store(columns + place, column.to(tl.int64), mask=(column < n) & (place < count))
        before += tl.sum(is_dead.to(tl.int32), 0)
    tl.store(numbers, total.to(tl.int64))
    tl.store(numbers + 1, tl.where(total > count, total, 0).to(tl.int64))


@triton.jit(do_not_specialize=["k"])
def dead_rows(
    scores, columns, numbers, out, k, n, width,
    PLACES: tl.constexpr, IS_SIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write the k largest positive scores of each row in the dead columns, of equal ones the first, and 0 for the others.

    IS_SIGNED: the largest by size. One program holds a row's scores in these columns.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDE)
    inside = (at < n) & (at < tl.load(numbers))
    column = tl.load(columns + at, mask=inside, other=0)
    score = tl.load(scores + row * width + column, mask=inside, other=0.0).to(tl.float32)
    size = score
    if IS_SIGNED:
        size = tl.abs(score)
    size = tl.where(size > 0, size, 0.0)
    keys = keys_of(size, PLACES)
    threshold = kth_largest(keys, k, PLACES)
    above = keys > threshold
    ties = (keys == threshold) & (size > 0)
    left = k - tl.sum(above.to(tl.int32), 0)
    kept = above | (ties & (tl.cumsum(ties.to(tl.int32), 0) <= left))
    tl.store(out + row * n + at, tl.where(kept & (size > 0), score, 0.0), mask=at < n)


@triton.jit(do_not_specialize=["n_rows"])
def dead_gradient_columns(
    grad, active, out, sums, n, n_rows, ROWS: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr
):
    """out = grad where a latent is active, else 0; for each block of rows and column, the sum of out."""
    column = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    block = tl.program_id(1).to(tl.int64)
    inside = column < n
    total = tl.zeros((ROWS, WIDE), tl.float32)
    for start in range(0, TALL, ROWS):
        row = block * TALL + start + tl.arange(0, ROWS)
        at = row[:, None] * n + column[None, :]
        mask = (row < n_rows)[:, None] & inside[None, :]
        z = tl.load(active + at, mask=mask, other=0.0)
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.where(z != 0, g, 0.0)
        tl.store(out + at, g, mask=mask)
        total += g
    tl.store(sums + block * n + column, tl.sum(total, 0), mask=inside)


@triton.jit
def add_rows(matrix, columns, part, width, BLOCK: tl.constexpr):
    """matrix[columns[i]] += part[i]; no column comes twice."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    where = matrix + tl.load(columns + row) * width + at
    more = tl.load(part + row * width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(where, tl.load(where, mask=inside, other=0.0) + more, mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def share_rows(error, e_hat, sums, spreads, squares, n_rows, width, BLOCK: tl.constexpr):
    """spreads[b] = |error - sums / n_rows|^2 and squares[b] = |error + e_hat|^2."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    e = tl.load(error + row * width + at, mask=inside, other=0.0)
    rebuilt = tl.load(e_hat + row * width + at, mask=inside, other=0.0).to(tl.float32)
    off = e - tl.load(sums + at, mask=inside, other=0.0) / n_rows
    tl.store(spreads + row, tl.sum(off * off, 0))
    tl.store(squares + row, tl.sum((e + rebuilt) * (e + rebuilt), 0))


@triton.jit
def defined_share(spread, squares, number, share, inverse):
    """share = squares / spread and inverse = 1 / spread; 0 where these are undefined, or the number is 0."""
    below = tl.load(spread)
    is_defined = (below > 0) & (below < float("inf")) & (tl.load(number) > 0)
    below = tl.where(is_defined, below, 1.0)
    tl.store(share, tl.where(is_defined, tl.load(squares) / below, 0.0))
    tl.store(inverse, tl.where(is_defined, 1.0 / below, 0.0))


@triton.jit
def share_gradient_rows(error, e_hat, scale, out, width, BLOCK: tl.constexpr):
    """out = 2 scale (error + e_hat); 0 where the scale is, whatever the error."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    twice = 2 * tl.load(scale)
    e = tl.load(error + row * width + at, mask=inside, other=0.0)
    rebuilt = tl.load(e_hat + row * width + at, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.where(twice != 0, twice * (e + rebuilt), 0.0)
    tl.store(out + row * width + at, gradient, mask=inside)
