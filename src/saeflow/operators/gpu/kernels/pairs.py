"""Kernel of two reconstructions by values of the same entries: rows of the decoder are read once for both."""

import triton
import triton.language as tl

from saeflow.operators.gpu.kernels.sparse import (
    bias_of,
    entries_of,
    lists_of,
    rows_at,
    write_error,
    zero_rest,
)


@triton.jit
def decode_pair_of_lists(
    x, W_dec, b_dec, columns, values, others, counts, parts,
    error, lower, squares, products, other_squares, other_products, width,
    CAPACITY: tl.constexpr, HAS_SPILL: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr,
    HAS_LOWER: tl.constexpr,
):  # fmt: skip
    """Do `decode_error_of_lists` for values, and for other values of the same entries, whose error is not written."""
    row = tl.program_id(0).to(tl.int64)
    if lists_of(row, parts, HAS_SPILL) == 1:
        at = tl.arange(0, BLOCK)
        inside = at < width
        count = tl.load(counts + row)
        mine = bias_of(b_dec, 0, 1, at, inside, width)
        other = mine
        for start in range(0, count, EACH):
            place, is_real, column = entries_of(columns, row, start, count, CAPACITY, EACH)
            directions = rows_at(W_dec, column, at, is_real, inside, width)
            value = tl.load(values + place, mask=is_real, other=0.0)
            mine += tl.sum(value[:, None] * directions, 0)
            value = tl.load(others + place, mask=is_real, other=0.0)
            other += tl.sum(value[:, None] * directions, 0)
        target = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
        mine, other = mine - target, other - target
        write_error(mine, error, lower, squares, row, at, inside, width, HAS_LOWER)
        tl.store(other_squares + row, tl.sum(other * other, 0))
        zero_rest(products, row, count, CAPACITY)
        zero_rest(other_products, row, count, CAPACITY)
        for start in range(0, count, EACH):
            place, is_real, column = entries_of(columns, row, start, count, CAPACITY, EACH)
            directions = rows_at(W_dec, column, at, is_real, inside, width)
            tl.store(products + place, tl.sum(mine[None, :] * directions, 1), mask=is_real)
            tl.store(other_products + place, tl.sum(other[None, :] * directions, 1), mask=is_real)
