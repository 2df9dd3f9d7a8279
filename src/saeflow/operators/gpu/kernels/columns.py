"""Kernels that sum over the entries of each column, in the order of rows and in float32: gradients of weights."""

import triton
import triton.language as tl

from saeflow.operators.gpu.kernels.sparse import group_of, rows_at


@triton.jit
def piece_of(place, columns, order, offsets, n_columns, PIECE: tl.constexpr):
    """Return the column that goes on at a multiple of PIECE, and where its piece begins and ends; nothing if none does."""
    column, begin, end = place * 0, 0, 0
    start = (place * PIECE).to(tl.int32)
    if start < tl.load(offsets + n_columns):
        column = tl.load(columns + tl.load(order + start)).to(tl.int64)
        if tl.load(offsets + column) < start:
            begin = start
            end = tl.minimum(start + PIECE, tl.load(offsets + column + 1))
    return column, begin, end


@triton.jit
def read_sums(left, totals, right, own, at, inside, width, HAS_LEFT: tl.constexpr):
    """Return what was summed in a row: of the left, if HAS_LEFT, of the weights, of the right."""
    where = own * width + at
    rights = tl.load(right + where, mask=inside, other=0.0)
    lefts = tl.zeros_like(rights)
    if HAS_LEFT:
        lefts = tl.load(left + where, mask=inside, other=0.0)
    return lefts, tl.load(totals + own), rights


@triton.jit
def write_sums(
    left, totals, right, own, at, inside, width, lefts, total, rights, HAS_LEFT: tl.constexpr
):  # fmt: skip
    """Write what `read_sums` reads."""
    where = own * width + at
    tl.store(right + where, rights, mask=inside)
    tl.store(totals + own, total)
    if HAS_LEFT:
        tl.store(left + where, lefts, mask=inside)


@triton.jit
def walk_columns(
    left, right, scales, boundaries, owners, columns, order, offsets, values, value_grads,
    of_left, of_totals, of_right, parts_left, parts_totals, parts_right, n_columns, width,
    CAPACITY: tl.constexpr, HAS_SPILL: tl.constexpr, GROUPS: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_SCALES: tl.constexpr, IS_ADDED: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """Sum, in the order of rows, over each column's entries: value scale[row] right[row, group], and with HAS_LEFT
    value_grad left[row].

    The totals are of value_grads with HAS_LEFT, else of values. A column's program sums its entries up to the next
    multiple of PIECE, in the order of all; from there on each piece has a program of its own, see `add_pieces`.
    """
    program = tl.program_id(0).to(tl.int64)
    column, begin, end = program, 0, 0
    is_first = program < n_columns
    place = program - n_columns
    if is_first:
        begin = tl.load(offsets + program)
        end = tl.minimum((begin // PIECE + 1) * PIECE, tl.load(offsets + program + 1))
    else:
        column, begin, end = piece_of(place, columns, order, offsets, n_columns, PIECE)
    is_written = begin < end
    if not IS_ADDED:
        is_written = is_written | is_first  # also where there is nothing to sum
    if is_written:
        at = tl.arange(0, BLOCK)
        inside = at < width
        group = group_of(column, boundaries, GROUPS)
        lefts, rights = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        totals = tl.zeros((EACH,), tl.float32)
        for start in range(begin, end, EACH):
            entry_at = start + tl.arange(0, EACH)
            is_real = entry_at < end
            entry = tl.load(order + entry_at, mask=is_real, other=0).to(tl.int64)
            row = entry // CAPACITY
            if HAS_SPILL:
                row = tl.load(owners + row, mask=is_real, other=0).to(tl.int64)
            value = tl.load(values + entry, mask=is_real, other=0.0)
            if HAS_LEFT:
                value_grad = tl.load(value_grads + entry, mask=is_real, other=0.0)
                totals += value_grad
                lefts += tl.sum(
                    value_grad[:, None] * rows_at(left, row, at, is_real, inside, width), 0
                )
            else:
                totals += value
            if HAS_SCALES:
                value *= tl.load(scales + row, mask=is_real, other=0.0)
            of_rows = rows_at(right, row * GROUPS + group, at, is_real, inside, width)
            rights += tl.sum(value[:, None] * of_rows, 0)
        total = tl.sum(totals, 0)
        if is_first:
            if IS_ADDED:
                old_lefts, old_total, old_rights = read_sums(
                    of_left, of_totals, of_right, program, at, inside, width, HAS_LEFT
                )
                lefts, total, rights = lefts + old_lefts, total + old_total, rights + old_rights
            write_sums(
                of_left, of_totals, of_right, program, at, inside, width, lefts, total, rights, HAS_LEFT
            )  # fmt: skip
        else:
            write_sums(
                parts_left, parts_totals, parts_right, place, at, inside, width, lefts, total, rights, HAS_LEFT
            )  # fmt: skip


@triton.jit
def add_pieces(
    columns, order, offsets, of_left, of_totals, of_right, parts_left, parts_totals, parts_right,
    n_columns, width, HAS_LEFT: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add a column's further pieces, in their order, to the sums over its first."""
    first = tl.program_id(0).to(tl.int64)
    column, begin, end = piece_of(first, columns, order, offsets, n_columns, PIECE)
    is_columns_first = first == tl.load(offsets + column) // PIECE + 1
    if (begin < end) & is_columns_first:
        at = tl.arange(0, BLOCK)
        inside = at < width
        lefts, total, rights = read_sums(
            of_left, of_totals, of_right, column, at, inside, width, HAS_LEFT
        )
        beyond = (tl.load(offsets + column + 1) + PIECE - 1) // PIECE
        for place in range(first, beyond):
            more_lefts, more_total, more_rights = read_sums(
                parts_left, parts_totals, parts_right, place, at, inside, width, HAS_LEFT
            )
            lefts, total, rights = lefts + more_lefts, total + more_total, rights + more_rights
        write_sums(
            of_left, of_totals, of_right, column, at, inside, width, lefts, total, rights, HAS_LEFT
        )


@triton.jit
def totals_by_columns(weights, order, offsets, totals, BLOCK: tl.constexpr):
    """Sum the weights of each column's entries."""
    column = tl.program_id(0)
    begin, end = tl.load(offsets + column), tl.load(offsets + column + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        entry = tl.load(order + at, mask=at < end, other=0)
        total += tl.load(weights + entry, mask=at < end, other=0.0)
    tl.store(totals + column, tl.sum(total, 0))


@triton.jit
def keys_of_lists(columns, counts, keys, n, d_sae, CAPACITY: tl.constexpr, WIDE: tl.constexpr):
    """Write what entries are sorted by: their columns, and d_sae where they are not real."""
    at = tl.program_id(0).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    inside = at < n
    is_real = at % CAPACITY < tl.load(counts + at // CAPACITY, mask=inside, other=0)
    column = tl.load(columns + at, mask=is_real, other=0)
    tl.store(keys + at, tl.where(is_real, column, d_sae).to(keys.dtype.element_ty), mask=inside)


@triton.jit
def offsets_of_columns(
    ordered, offsets, n, d_sae, HALVINGS: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Write how many of n ascending keys are below each of 0 to d_sae, by bisection."""
    column = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    low = tl.zeros((WIDE,), tl.int32)
    high = low + n
    for _halving in range(HALVINGS):
        middle = (low + high) // 2
        is_open = low < high
        is_below = tl.load(ordered + middle, mask=is_open, other=0).to(tl.int32) < column
        low = tl.where(is_open & is_below, middle + 1, low)
        high = tl.where(is_open & ~is_below, middle, high)
    tl.store(offsets + column, low, mask=column <= d_sae)
