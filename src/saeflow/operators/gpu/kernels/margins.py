"""Kernels of how far rounded scores may lie from exact ones."""

import triton
import triton.language as tl

from saeflow.operators.gpu.kernels.units import minus_centre


@triton.jit
def squares_of_pieces(
    x, centre, matrix, parts, width, n_rows, of_x, n_matrix,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Sum the squares of each ROWS rows of x - centre, the first of_x parts, and then of each piece of a matrix."""
    part = tl.program_id(0).to(tl.int64)
    if part < of_x:
        _row, _where, _mask, off = minus_centre(x, centre, n_rows, width, True, ROWS, BLOCK)
        tl.store(parts + part, tl.sum(tl.sum(off * off, 1), 0))
    else:
        where = (part - of_x) * PIECE + tl.arange(0, PIECE)
        value = tl.load(matrix + where, mask=where < n_matrix, other=0.0).to(tl.float32)
        tl.store(parts + part, tl.sum(value * value, 0))


@triton.jit
def margin_of_parts(parts, margin, of_x, n, times, WIDE: tl.constexpr):
    """margin = times |x - centre| |matrix|, of the parts of `squares_of_pieces`."""
    at = tl.arange(0, WIDE)
    square_x, square_matrix = tl.zeros((WIDE,), tl.float32), tl.zeros((WIDE,), tl.float32)
    for start in range(0, n, WIDE):
        place = start + at
        square = tl.load(parts + place, mask=place < n, other=0.0)
        square_x += tl.where(place < of_x, square, 0.0)
        square_matrix += tl.where(place < of_x, 0.0, square)
    norms = tl.sqrt(tl.sum(square_x, 0)) * tl.sqrt(tl.sum(square_matrix, 0))
    tl.store(margin, norms * times)


@triton.jit
def lowered_columns(
    thresholds, margin, out, below, share, n, OF_LOG: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """out = t - share |t| - margin for t, each threshold less `below`; OF_LOG: thresholds are given as their logs."""
    at = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    inside = at < n
    t = tl.load(thresholds + at, mask=inside, other=0.0)
    if OF_LOG:
        t = tl.exp(t)
    t -= below
    tl.store(out + at, t - share * tl.abs(t) - tl.load(margin), mask=inside)
