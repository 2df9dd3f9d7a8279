"""Kernels on lists and the matrices that their columns name rows of; sums are in float32."""

import triton
import triton.language as tl


@triton.jit
def row_of(own, owners, HAS_SPILL: tl.constexpr):
    """Return the row of the matrix that a list belongs to."""
    if HAS_SPILL:
        return tl.load(owners + own).to(tl.int64)
    return own


@triton.jit
def rescore_lists(
    x, W_enc, b_enc, b_dec, columns, counts, owners, out, width,
    CAPACITY: tl.constexpr, HAS_SPILL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[b, e] = (x[b] - b_dec) . W_enc[column] + b_enc[column]."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    of = row_of(row, owners, HAS_SPILL)
    centred = tl.load(x + of * width + at, mask=inside, other=0.0).to(tl.float32)
    centred -= tl.load(b_dec + at, mask=inside, other=0.0)
    count = tl.load(counts + row)
    slot = tl.arange(0, CAPACITY)
    tl.store(out + row * CAPACITY + slot, tl.zeros((CAPACITY,), tl.float32), mask=slot >= count)
    for e in range(count):
        column = tl.load(columns + row * CAPACITY + e).to(tl.int64)
        direction = tl.load(W_enc + column * width + at, mask=inside, other=0.0).to(tl.float32)
        score = tl.sum(centred * direction, 0) + tl.load(b_enc + column)
        tl.store(out + row * CAPACITY + e, score)


@triton.jit
def products_of_lists(
    left, right, columns, counts, owners, out, width,
    CAPACITY: tl.constexpr, HAS_SPILL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[b, e] = left[b] . right[column]."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    of = row_of(row, owners, HAS_SPILL)
    mine = tl.load(left + of * width + at, mask=inside, other=0.0).to(tl.float32)
    count = tl.load(counts + row)
    slot = tl.arange(0, CAPACITY)
    tl.store(out + row * CAPACITY + slot, tl.zeros((CAPACITY,), tl.float32), mask=slot >= count)
    for e in range(count):
        column = tl.load(columns + row * CAPACITY + e).to(tl.int64)
        direction = tl.load(right + column * width + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * CAPACITY + e, tl.sum(mine * direction, 0))


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
def sum_of_row(
    W_dec, columns, values, counts, first, parts, row, start, at, inside, width,
    CAPACITY: tl.constexpr, HAS_SPILL: tl.constexpr,
):  # fmt: skip
    """start plus the sum of values times rows of W_dec, in the order of entries."""
    for part in range(lists_of(row, parts, HAS_SPILL)):
        own = list_of(row, part, first, HAS_SPILL)
        for e in range(tl.load(counts + own)):
            column = tl.load(columns + own * CAPACITY + e).to(tl.int64)
            direction = tl.load(W_dec + column * width + at, mask=inside, other=0.0)
            start += tl.load(values + own * CAPACITY + e) * direction.to(tl.float32)
    return start


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
):  # fmt: skip
    """out[b] = b_dec + sum of values times rows of W_dec."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    start = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        start += tl.load(b_dec + at, mask=inside, other=0.0)
    total = sum_of_row(
        W_dec, columns, values, counts, first, parts, row, start, at, inside, width, CAPACITY, HAS_SPILL
    )  # fmt: skip
    tl.store(out + row * width + at, total, mask=inside)


@triton.jit
def decode_error_of_lists(
    x, W_dec, b_dec, columns, values, counts, first, parts, error, squares, products, width,
    CAPACITY: tl.constexpr, HAS_SPILL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The error of a reconstruction, the sum of its squares, and its product with each entry's row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    start = tl.load(b_dec + at, mask=inside, other=0.0).to(tl.float32)
    total = sum_of_row(
        W_dec, columns, values, counts, first, parts, row, start, at, inside, width, CAPACITY, HAS_SPILL
    )  # fmt: skip
    total -= tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(error + row * width + at, total, mask=inside)
    tl.store(squares + row, tl.sum(total * total, 0))
    for part in range(lists_of(row, parts, HAS_SPILL)):
        own = list_of(row, part, first, HAS_SPILL)
        count = tl.load(counts + own)
        zero_rest(products, own, count, CAPACITY)
        for e in range(count):
            column = tl.load(columns + own * CAPACITY + e).to(tl.int64)
            direction = tl.load(W_dec + column * width + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(products + own * CAPACITY + e, tl.sum(total * direction, 0))


@triton.jit
def group_of(column, boundaries, GROUPS: tl.constexpr):
    """Return the group that a latent is in."""
    group = tl.full((), 0, tl.int32)
    for place in tl.static_range(GROUPS - 1):
        group += (column >= tl.load(boundaries + place)).to(tl.int32)
    return group


@triton.jit
def nested_errors_of_lists(
    x, W_dec, b_dec, boundaries, columns, values, counts, first, parts, sums, squares, products, width,
    CAPACITY: tl.constexpr, HAS_SPILL: tl.constexpr, GROUPS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Do `decode_error_of_lists` for each prefix of groups; sums[b, g] adds up the errors of those that have group g."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    group = tl.arange(0, PADDED)
    start = tl.load(b_dec + at, mask=inside, other=0.0).to(tl.float32)
    start -= tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    errors = tl.zeros((PADDED, BLOCK), tl.float32) + start[None, :]
    for part in range(lists_of(row, parts, HAS_SPILL)):
        own = list_of(row, part, first, HAS_SPILL)
        for e in range(tl.load(counts + own)):
            column = tl.load(columns + own * CAPACITY + e).to(tl.int64)
            of = group_of(column, boundaries, GROUPS)
            direction = tl.load(W_dec + column * width + at, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(values + own * CAPACITY + e)
            errors += tl.where(group >= of, value, 0.0)[:, None] * direction[None, :]
    errors = tl.where((group < GROUPS)[:, None], errors, 0.0)
    tl.store(squares + row, tl.sum(tl.sum(errors * errors, 1), 0))
    for place in tl.static_range(GROUPS):
        suffix = tl.sum(tl.where((group >= place)[:, None], errors, 0.0), 0)
        tl.store(sums + (row * GROUPS + place) * width + at, suffix, mask=inside)
    for part in range(lists_of(row, parts, HAS_SPILL)):
        own = list_of(row, part, first, HAS_SPILL)
        count = tl.load(counts + own)
        zero_rest(products, own, count, CAPACITY)
        for e in range(count):
            column = tl.load(columns + own * CAPACITY + e).to(tl.int64)
            of = group_of(column, boundaries, GROUPS)
            total = tl.sum(tl.where((group >= of)[:, None], errors, 0.0), 0)
            direction = tl.load(W_dec + column * width + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(products + own * CAPACITY + e, tl.sum(total * direction, 0))


@triton.jit
def gradients_of_weights(
    centred, grad, boundaries, owners, order, offsets, values, value_grads, of_enc, of_b_enc, of_dec, width,
    CAPACITY: tl.constexpr, HAS_SPILL: tl.constexpr, GROUPS: tl.constexpr, IS_ADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Both gradients of a latent's weights in one walk over its entries, in the order of rows."""
    latent = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    where = latent * width + at
    begin, end = tl.load(offsets + latent), tl.load(offsets + latent + 1)
    if (begin < end) | (IS_ADDED == 0):  # else there is nothing to add
        group = group_of(latent, boundaries, GROUPS)
        enc, dec = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        bias = tl.zeros((), tl.float32)
        for place in range(begin, end):
            entry = tl.load(order + place).to(tl.int64)
            row = row_of(entry // CAPACITY, owners, HAS_SPILL)
            value, value_grad = tl.load(values + entry), tl.load(value_grads + entry)
            of_row = grad + (row * GROUPS + group) * width + at
            dec += value * tl.load(of_row, mask=inside, other=0.0).to(tl.float32)
            inputs = tl.load(centred + row * width + at, mask=inside, other=0.0)
            enc += value_grad * inputs.to(tl.float32)
            bias += value_grad
        if IS_ADDED:
            enc += tl.load(of_enc + where, mask=inside, other=0.0)
            dec += tl.load(of_dec + where, mask=inside, other=0.0)
            bias += tl.load(of_b_enc + latent)
        tl.store(of_enc + where, enc, mask=inside)
        tl.store(of_dec + where, dec, mask=inside)
        tl.store(of_b_enc + latent, bias)


@triton.jit
def sums_by_columns(
    matrix, boundaries, owners, order, offsets, weights, sums, totals, width,
    CAPACITY: tl.constexpr, HAS_SPILL: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum weight * matrix[row], and the weights, over each column's entries in the order of rows."""
    column = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    group = group_of(column, boundaries, GROUPS)
    total = tl.zeros((BLOCK,), tl.float32)
    of_weights = tl.zeros((), tl.float32)
    begin, end = tl.load(offsets + column), tl.load(offsets + column + 1)
    for place in range(begin, end):
        entry = tl.load(order + place).to(tl.int64)
        row = row_of(entry // CAPACITY, owners, HAS_SPILL)
        weight = tl.load(weights + entry)
        of_row = matrix + (row * GROUPS + group) * width + at
        total += weight * tl.load(of_row, mask=inside, other=0.0).to(tl.float32)
        of_weights += weight
    tl.store(sums + column * width + at, total, mask=inside)
    tl.store(totals + column, of_weights)
