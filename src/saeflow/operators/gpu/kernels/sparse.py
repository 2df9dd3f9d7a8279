"""Kernels on lists and the matrices that their columns name rows of; sums are in float32.

Rows of a matrix are read EACH at a time, so that one read does not wait for the one before it.
"""

import triton
import triton.language as tl


@triton.jit
def row_of(own, owners, HAS_SPILL: tl.constexpr):
    """Return the row of the matrix that a list belongs to."""
    if HAS_SPILL:
        return tl.load(owners + own).to(tl.int64)
    return own


@triton.jit
def rows_at(matrix, rows, at, is_real, inside, width):
    """Return rows of a matrix (EACH, BLOCK) as float32, 0 where there is none."""
    where = rows[:, None] * width + at[None, :]
    mask = is_real[:, None] & inside[None, :]
    return tl.load(matrix + where, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def entries_of(columns, own, start, end, CAPACITY: tl.constexpr, EACH: tl.constexpr):
    """Return EACH of a list's entries: their places in memory, which are before the end, and their columns."""
    e = start + tl.arange(0, EACH)
    is_real = e < end
    place = own * CAPACITY + e
    return place, is_real, tl.load(columns + place, mask=is_real, other=0).to(tl.int64)


@triton.jit
def rescore_lists(
    x, W_enc, b_enc, b_dec, columns, counts, owners, out, kept, n_rows, width,
    CAPACITY: tl.constexpr, HAS_SPILL: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """out[b, e] = kept[b] . W_enc[column] + b_enc[column], where kept, x - b_dec, is written in its own precision."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    of = row_of(row, owners, HAS_SPILL)
    centred = tl.load(x + of * width + at, mask=inside, other=0.0).to(tl.float32)
    centred -= tl.load(b_dec + at, mask=inside, other=0.0)
    if row < n_rows:
        tl.store(kept + row * width + at, centred.to(kept.dtype.element_ty), mask=inside)
    count = tl.load(counts + row)
    zero_rest(out, row, count, CAPACITY)
    for start in range(0, count, EACH):
        place, is_real, column = entries_of(columns, row, start, count, CAPACITY, EACH)
        directions = rows_at(W_enc, column, at, is_real, inside, width)
        score = tl.sum(centred[None, :] * directions, 1)
        score += tl.load(b_enc + column, mask=is_real, other=0.0)
        tl.store(out + place, score, mask=is_real)


@triton.jit
def products_with(
    mine, right, columns, own, begin, end, out, at, inside, width, CAPACITY: tl.constexpr, EACH: tl.constexpr
):  # fmt: skip
    """out[own, e] = mine . right[column] of a list's entries from begin to end."""
    for start in range(begin, end, EACH):
        place, is_real, column = entries_of(columns, own, start, end, CAPACITY, EACH)
        directions = rows_at(right, column, at, is_real, inside, width)
        tl.store(out + place, tl.sum(mine[None, :] * directions, 1), mask=is_real)


@triton.jit
def products_of_lists(
    left, right, columns, counts, owners, out, width,
    CAPACITY: tl.constexpr, HAS_SPILL: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """out[b, e] = left[b] . right[column]."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    of = row_of(row, owners, HAS_SPILL)
    mine = tl.load(left + of * width + at, mask=inside, other=0.0).to(tl.float32)
    count = tl.load(counts + row)
    zero_rest(out, row, count, CAPACITY)
    products_with(mine, right, columns, row, 0, count, out, at, inside, width, CAPACITY, EACH)


@triton.jit
def list_of(row, part, first, HAS_SPILL: tl.constexpr):
    """Return the number of a row's list."""
    own = row
    if HAS_SPILL:
        own = tl.where(part > 0, tl.load(first + row).to(tl.int64) + part - 1, row)
    return own


@triton.jit
def lists_of(row, parts, HAS_SPILL: tl.constexpr):
    """Return how many lists a row has."""
    if HAS_SPILL:
        return tl.load(parts + row)
    return 1


@triton.jit
def sum_of_entries(
    total, W_dec, columns, values, own, begin, end, at, inside, width, CAPACITY: tl.constexpr, EACH: tl.constexpr
):  # fmt: skip
    """Add values times rows of W_dec, of a list's entries from begin to end."""
    for start in range(begin, end, EACH):
        place, is_real, column = entries_of(columns, own, start, end, CAPACITY, EACH)
        value = tl.load(values + place, mask=is_real, other=0.0)
        directions = rows_at(W_dec, column, at, is_real, inside, width)
        total += tl.sum(value[:, None] * directions, 0)
    return total


@triton.jit
def sum_of_row(
    total, W_dec, columns, values, counts, first, parts, row, at, inside, width,
    CAPACITY: tl.constexpr, HAS_SPILL: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Add values times rows of W_dec, of all of a row's entries."""
    for part in range(lists_of(row, parts, HAS_SPILL)):
        own = list_of(row, part, first, HAS_SPILL)
        end = tl.load(counts + own)
        total = sum_of_entries(
            total, W_dec, columns, values, own, 0, end, at, inside, width, CAPACITY, EACH
        )
    return total


@triton.jit
def zero_rest(products, own, count, CAPACITY: tl.constexpr):
    """Write 0 where a list's products have no entry."""
    slot = tl.arange(0, CAPACITY)
    nothing = tl.zeros((CAPACITY,), tl.float32)
    tl.store(products + own * CAPACITY + slot, nothing, mask=slot >= count)


@triton.jit
def decode_lists(
    W_dec, b_dec, columns, values, counts, first, parts, out, width,
    CAPACITY: tl.constexpr, HAS_SPILL: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """out[b] = b_dec + sum of values times rows of W_dec."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    start = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        start += tl.load(b_dec + at, mask=inside, other=0.0)
    total = sum_of_row(
        start, W_dec, columns, values, counts, first, parts, row, at, inside, width, CAPACITY, HAS_SPILL, EACH
    )  # fmt: skip
    tl.store(out + row * width + at, total, mask=inside)


@triton.jit
def bias_of(b_dec, row, rows_each, at, inside, width):
    """Return the bias of a row: blocks of rows have one each."""
    return tl.load(b_dec + row // rows_each * width + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def decode_error_of_lists(
    x, W_dec, b_dec, columns, values, counts, parts, error, lower, squares, products, rows_each, width,
    CAPACITY: tl.constexpr, HAS_SPILL: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr,
    HAS_LOWER: tl.constexpr,
):  # fmt: skip
    """The error of a reconstruction, the sum of its squares, and its product with each entry's row.

    lower: a copy of the error in a lower precision, if HAS_LOWER. A row with several lists is left to `error_of_parts`.
    """
    row = tl.program_id(0).to(tl.int64)
    if lists_of(row, parts, HAS_SPILL) == 1:
        at = tl.arange(0, BLOCK)
        inside = at < width
        count = tl.load(counts + row)
        total = bias_of(b_dec, row, rows_each, at, inside, width)
        total = sum_of_entries(
            total, W_dec, columns, values, row, 0, count, at, inside, width, CAPACITY, EACH
        )
        total -= tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
        write_error(total, error, lower, squares, row, at, inside, width, HAS_LOWER)
        zero_rest(products, row, count, CAPACITY)
        products_with(
            total, W_dec, columns, row, 0, count, products, at, inside, width, CAPACITY, EACH
        )


@triton.jit
def write_error(total, error, lower, squares, row, at, inside, width, HAS_LOWER: tl.constexpr):
    """Write the error of a row, in both precisions, and the sum of its squares."""
    tl.store(error + row * width + at, total, mask=inside)
    if HAS_LOWER:
        tl.store(lower + row * width + at, total.to(lower.dtype.element_ty), mask=inside)
    tl.store(squares + row, tl.sum(total * total, 0))


@triton.jit
def scale_lists(
    products, of_rows, owners, twice, out, stride, n_rows, CAPACITY: tl.constexpr, HAS_SPILL: tl.constexpr
):  # fmt: skip
    """out = products times twice the number of each list's row; twice: that of each row."""
    own = tl.program_id(0).to(tl.int64)
    factor = 2.0 * tl.load(of_rows + row_of(own, owners, HAS_SPILL) * stride)
    if own < n_rows:  # such a list is its row's first
        tl.store(twice + own, factor)
    at = own * CAPACITY + tl.arange(0, CAPACITY)
    tl.store(out + at, factor * tl.load(products + at))


@triton.jit
def sums_of_parts(
    W_dec, columns, values, counts, owners, parts, sums, width,
    CAPACITY: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Sum values times rows of W_dec over each list of the rows that have several."""
    own = tl.program_id(0).to(tl.int64)
    if tl.load(parts + tl.load(owners + own)) > 1:
        at = tl.arange(0, BLOCK)
        inside = at < width
        total, end = tl.zeros((BLOCK,), tl.float32), tl.load(counts + own)
        total = sum_of_entries(
            total, W_dec, columns, values, own, 0, end, at, inside, width, CAPACITY, EACH
        )
        tl.store(sums + own * width + at, total, mask=inside)


@triton.jit
def error_of_parts(
    x, b_dec, sums, first, parts, error, lower, squares, rows_each, width,
    HAS_LOWER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The error of a row that is rebuilt from the sums over each of its several lists, and the sum of its squares."""
    row = tl.program_id(0).to(tl.int64)
    lists = tl.load(parts + row)
    if lists > 1:
        at = tl.arange(0, BLOCK)
        inside = at < width
        total = bias_of(b_dec, row, rows_each, at, inside, width)
        for part in range(lists):
            own = list_of(row, part, first, True)
            total += tl.load(sums + own * width + at, mask=inside, other=0.0)
        total -= tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
        write_error(total, error, lower, squares, row, at, inside, width, HAS_LOWER)


@triton.jit
def products_of_parts(
    error, W_dec, columns, counts, owners, parts, products, n_rows, width,
    CAPACITY: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """The product of a row's error with the row of each entry, for rows with several lists; 0 in lists of none."""
    own = tl.program_id(0).to(tl.int64)
    row = tl.load(owners + own).to(tl.int64)
    if (own >= n_rows) | (tl.load(parts + row) > 1):
        at = tl.arange(0, BLOCK)
        inside = at < width
        count = tl.load(counts + own)
        mine = tl.load(error + row * width + at, mask=inside & (count > 0), other=0.0)
        zero_rest(products, own, count, CAPACITY)
        products_with(
            mine, W_dec, columns, own, 0, count, products, at, inside, width, CAPACITY, EACH
        )


@triton.jit
def group_of(column, boundaries, GROUPS: tl.constexpr):
    """Return the group that a latent is in."""
    group = tl.full((), 0, tl.int32)
    for place in tl.static_range(GROUPS - 1):
        group += (column >= tl.load(boundaries + place)).to(tl.int32)
    return group


@triton.jit
def ends_of_groups(columns, own, count, boundary, CAPACITY: tl.constexpr):
    """Return how many of a list's entries, which are in the order of columns, lie before a boundary."""
    slot = tl.arange(0, CAPACITY)
    column = tl.load(columns + own * CAPACITY + slot, mask=slot < count, other=0)
    return tl.sum(((column < boundary) & (slot < count)).to(tl.int32), 0)


@triton.jit
def part_of_group(
    columns,
    own,
    count,
    boundaries,
    group: tl.constexpr,
    CAPACITY: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Return between which of a list's entries those of a group lie."""
    begin, end = 0 * count, count
    if group > 0:
        boundary = tl.load(boundaries + group - 1)
        begin = ends_of_groups(columns, own, count, boundary, CAPACITY)
    if group < GROUPS - 1:
        boundary = tl.load(boundaries + group)
        end = ends_of_groups(columns, own, count, boundary, CAPACITY)
    return begin, end


@triton.jit
def take_off(
    total, mine, W_dec, columns, values, own, begin, end, out, at, inside, width, CAPACITY: tl.constexpr, EACH: tl.constexpr
):  # fmt: skip
    """Do `products_with`, and undo `sum_of_entries` in the same reading."""
    for start in range(begin, end, EACH):
        place, is_real, column = entries_of(columns, own, start, end, CAPACITY, EACH)
        value = tl.load(values + place, mask=is_real, other=0.0)
        directions = rows_at(W_dec, column, at, is_real, inside, width)
        tl.store(out + place, tl.sum(mine[None, :] * directions, 1), mask=is_real)
        total -= tl.sum(value[:, None] * directions, 0)
    return total


@triton.jit
def nested_errors_of_lists(
    x, W_dec, b_dec, boundaries, columns, values, counts, first, parts, error, sums, squares, products, of_all, width,
    CAPACITY: tl.constexpr, HAS_SPILL: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """Do `decode_error_of_lists` for each prefix of groups; sums[b, g] adds up the errors of those that have group g.

    Entries are in the order of groups, so that a prefix's error is that of the one before it and some entries more.
    On the way back a group's entries are taken off again, so that no prefix's error lies in memory.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    total = tl.load(b_dec + at, mask=inside, other=0.0).to(tl.float32)
    total -= tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    suffix = tl.zeros((BLOCK,), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    for group in tl.static_range(GROUPS):
        for part in range(lists_of(row, parts, HAS_SPILL)):
            own = list_of(row, part, first, HAS_SPILL)
            count = tl.load(counts + own)
            begin, end = part_of_group(columns, own, count, boundaries, group, CAPACITY, GROUPS)
            total = sum_of_entries(
                total, W_dec, columns, values, own, begin, end, at, inside, width, CAPACITY, EACH
            )
        square += total * total
    tl.store(error + row * width + at, total, mask=inside)
    tl.store(squares + row, tl.sum(square, 0))
    for part in range(lists_of(row, parts, HAS_SPILL)):
        own = list_of(row, part, first, HAS_SPILL)
        zero_rest(products, own, tl.load(counts + own), CAPACITY)
    for place in tl.static_range(GROUPS):
        suffix += total
        kept = sums + (row * GROUPS + GROUPS - 1 - place) * width + at
        tl.store(kept, suffix.to(sums.dtype.element_ty), mask=inside)
        for part in range(lists_of(row, parts, HAS_SPILL)):
            own = list_of(row, part, first, HAS_SPILL)
            count = tl.load(counts + own)
            begin, end = part_of_group(
                columns, own, count, boundaries, GROUPS - 1 - place, CAPACITY, GROUPS
            )
            total = take_off(
                total, suffix, W_dec, columns, values, own, begin, end, products, at, inside, width, CAPACITY, EACH
            )  # fmt: skip
    tl.store(of_all + row * width + at, suffix, mask=inside)
