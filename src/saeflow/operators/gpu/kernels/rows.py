"""Kernels on entries by rows of any length, which the sparse path of any size works with."""

import triton
import triton.language as tl


@triton.jit
def sum_rows(matrix, ids, offsets, weights, out, width, BLOCK: tl.constexpr):
    """out[b] = sum over entries e of bag b of weights[e] * matrix[ids[e]], in the order of entries."""
    bag = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    total = tl.zeros((BLOCK,), tl.float32)
    begin, end = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    for e in range(begin, end):
        row = tl.load(ids + e)
        total += tl.load(weights + e) * tl.load(matrix + row * width + at, mask=inside, other=0.0)
    tl.store(out + bag * width + at, total, mask=inside)


@triton.jit
def row_products(left, right, order, rows, offsets, products, width, BLOCK: tl.constexpr):
    """products[order[e]] = left[rows[e]] . right[column] for the entries e of each column."""
    column = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    direction = tl.load(right + column * width + at, mask=inside, other=0.0)
    begin, end = tl.load(offsets + column), tl.load(offsets + column + 1)
    for e in range(begin, end):
        row = tl.load(rows + e)
        other = tl.load(left + row * width + at, mask=inside, other=0.0)
        tl.store(products + tl.load(order + e), tl.sum(direction * other, 0))
