"""Kernels of the notes of a step (its faults, the latents that fired, the tokens since they did, the least latent), and of its penalty."""

import triton
import triton.language as tl


@triton.jit
def keep_first(
    values, now, kept, step, before, is_stopped, count,
    OF_FINITE: tl.constexpr, HAS_BEFORE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Keep the values and the number of the first step with a fault: one that is not finite, or else one that is not 0.

    is_stopped: whether there was one by now; with HAS_BEFORE also where `before` says so, which then keeps nothing.
    """
    at = tl.arange(0, WIDE)
    inside = at < count
    found = tl.load(values + at, mask=inside, other=0)
    is_fault = ~(tl.abs(found) < float("inf")) if OF_FINITE else found != 0
    has_fault = tl.max((is_fault & inside).to(tl.int32), 0) > 0
    was_stopped = tl.load(step) >= 0
    if HAS_BEFORE:
        was_stopped = was_stopped | (tl.load(before) != 0)
    is_first = has_fault & ~was_stopped
    tl.store(kept + at, found, mask=inside & is_first)
    tl.store(step, tl.load(now), mask=is_first)
    tl.store(is_stopped, (has_fault | was_stopped).to(tl.uint8))


@triton.jit
def count_flagged(
    status, number, out, n_rows, FLAG: tl.constexpr, HAS_NUMBER: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Write how many rows have a flag in their status, and beside it a number, 0 without HAS_NUMBER."""
    at = tl.arange(0, WIDE)
    total = tl.zeros((WIDE,), tl.int32)
    for start in range(0, n_rows, WIDE):
        flags = tl.load(status + start + at, mask=start + at < n_rows, other=0)
        total += ((flags & FLAG) != 0).to(tl.int32)
    tl.store(out, tl.sum(total, 0).to(tl.int64))
    beside = tl.zeros((), tl.int64)
    if HAS_NUMBER:
        beside += tl.load(number)
    tl.store(out + 1, beside)


@triton.jit
def fired_columns(values, order, offsets, fired, n, WIDE: tl.constexpr):
    """Say of each column whether one of its entries is not 0; a column is read up to the first."""
    column = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    inside = column < n
    at = tl.load(offsets + column, mask=inside, other=0)
    end = tl.load(offsets + column + 1, mask=inside, other=0)
    has = tl.zeros((WIDE,), tl.int32)
    left = tl.sum((at < end).to(tl.int32), 0)
    while left > 0:
        is_left = at < end
        entry = tl.load(order + at, mask=is_left, other=0)
        value = tl.load(values + entry, mask=is_left, other=0.0)
        is_hit = is_left & (value != 0)
        has = tl.where(is_hit, 1, has)
        at = tl.where(is_hit, end, at + 1)
        left = tl.sum((at < end).to(tl.int32), 0)
    tl.store(fired + column, has.to(tl.uint8), mask=inside)


@triton.jit
def active_pieces(values, number, n, WIDE: tl.constexpr):
    """Add how many numbers of each piece are not 0; integers may be added in any order."""
    at = tl.program_id(0).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    value = tl.load(values + at, mask=at < n, other=0.0)
    tl.atomic_add(number, tl.sum((value != 0).to(tl.int32), 0).to(tl.int64))


@triton.jit
def count_silent(silent, fired, is_long, rows, limit, n, WIDE: tl.constexpr):
    """Add rows to what a latent has been silent for, or begin anew where it fired; whether that reaches a limit."""
    at = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    inside = at < n
    has_fired = tl.load(fired + at, mask=inside, other=0) != 0
    count = tl.load(silent + at, mask=inside, other=0) + rows
    count = tl.where(has_fired, 0, count)
    tl.store(silent + at, count, mask=inside)
    tl.store(is_long + at, (count >= limit).to(tl.uint8), mask=inside)


@triton.jit
def least_of_pieces(values, least, n, WIDE: tl.constexpr):
    """Write the least of the positive numbers of each piece; inf where there is none."""
    piece = tl.program_id(0).to(tl.int64)
    at = piece * WIDE + tl.arange(0, WIDE)
    value = tl.load(values + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(least + piece, tl.min(tl.where(value > 0, value, float("inf")), 0))


@triton.jit
def follow_least(least, threshold, weight, decay, rest, IS_UNBIASED: tl.constexpr):
    """Move a threshold towards a finite number, by its share (rest) of all weight."""
    new, old, had = tl.load(least), tl.load(threshold), tl.load(weight)
    has = tl.where(had > 0, 1.0, rest)
    if IS_UNBIASED:
        has = decay * had + rest
    is_some = new < float("inf")
    tl.store(threshold, old + rest / has * (new - old), mask=is_some)
    tl.store(weight, has, mask=is_some)


@triton.jit
def penalty_term(total, weight, target, term, slope, rows, HAS_TARGET: tl.constexpr):
    """term = weight total / rows, or with HAS_TARGET weight (total / rows / target - 1)^2; slope: its derivative."""
    of_mean, mean = tl.load(weight), tl.load(total) / rows
    if HAS_TARGET:
        wanted = tl.load(target)
        off = mean / wanted - 1.0
        tl.store(term, of_mean * off * off)
        of_mean *= 2.0 * off / wanted
    else:
        tl.store(term, of_mean * mean)
    tl.store(slope, of_mean / rows)
