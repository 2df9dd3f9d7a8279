"""Kernels that read rows of scores in chunks and collect the few entries that a selection needs.

An entry outside the row, excluded, or NaN counts as -inf and is never collected.
"""

import triton
import triton.language as tl

from saeflow.operators.gpu.kernels.ranks import keys_of, kth_largest, lowest_key, next_bit, value_of

RANK = tl.constexpr(0)
SIMPLEX = tl.constexpr(1)
ABOVE = tl.constexpr(2)
AT_LEAST = tl.constexpr(3)
OVERFLOW = tl.constexpr(1)
NAN = tl.constexpr(2)
NEVER = tl.constexpr(float("-inf"))
AHEAD = tl.constexpr(4)  # chunks whose loads do not wait for each other
BISECTIONS = tl.constexpr(22)
MARGIN = tl.constexpr(1e-5)  # of a simplex threshold, above the error of a float32 sum of at most 1


@triton.jit
def power(base, exponent, LINEAR: tl.constexpr, SQUARES: tl.constexpr):
    """base ** exponent of a base >= 0, 0 where it is 0."""
    if LINEAR:
        return base
    if SQUARES:
        return base * base
    return tl.where(base > 0, tl.exp(exponent * tl.log(tl.where(base > 0, base, 1.0))), 0.0)


@triton.jit
def read(
    base, allowed, at, n, HAS_ALLOWED: tl.constexpr, IS_POSITIVE: tl.constexpr, OF_RELU: tl.constexpr
):  # fmt: skip
    """Entries of a row, or of its relu, as float32, -inf where they cannot be chosen, and which are NaN."""
    inside = at < n
    raw = tl.load(base + at, mask=inside, other=NEVER).to(tl.float32)
    is_nan = raw != raw
    can = inside & (raw == raw)
    if HAS_ALLOWED:
        can = can & (tl.load(allowed + at, mask=inside, other=0) != 0)
    if IS_POSITIVE:
        can = can & (raw > 0)
    if OF_RELU:
        raw = tl.where(raw > 0, raw, 0.0)
    return tl.where(can, raw, NEVER), is_nan


@triton.jit
def rank_of(floors, row, stride, n, IS_NEAR: tl.constexpr):
    """Return the rank of a row's floor, and how many temperatures lower it is: the number given, and 0; if IS_NEAR, see `near_rank`."""
    k = tl.load(floors + row * stride)
    if IS_NEAR:
        k = k.to(tl.float32)
        return tl.minimum(tl.ceil(k) + 1, n).to(tl.int32), tl.log(k + 1)
    return k.to(tl.int32), 0.0


@triton.jit
def kth_of_row(
    base, allowed, n, k, PLACES: tl.constexpr,
    HAS_ALLOWED: tl.constexpr, IS_POSITIVE: tl.constexpr, OF_RELU: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return the key of a row's k-th largest entry, by reading the row once for each bit."""
    wide = tl.arange(0, WIDE)
    best = lowest_key(PLACES)
    for bit in range(PLACES):
        candidate = next_bit(best, bit, PLACES)
        reached = 0
        for start in range(0, n, WIDE):
            entries, _ = read(base, allowed, start + wide, n, HAS_ALLOWED, IS_POSITIVE, OF_RELU)
            reaches = keys_of(entries, PLACES) >= candidate.to(tl.int32)
            reached += tl.sum((reaches & (entries > NEVER)).to(tl.int32), 0)
        best = tl.where(reached >= k, candidate, best)
    return best.to(tl.int32)


@triton.jit
def simplex_total(values, top, scale, tau, LINEAR: tl.constexpr, SQUARES: tl.constexpr):
    """() the part of these entries in the sum of entmax at a threshold."""
    excess = tl.maximum((values - top) * scale - tau, 0.0)
    return tl.sum(power(excess, 1.0 / scale, LINEAR, SQUARES), 0)


@triton.jit
def collect_rows(
    scores, floors, slack, temperatures, allowed, columns, values, counts, found, status, stride, far, n,
    KIND: tl.constexpr, PLACES: tl.constexpr, PER_COLUMN: tl.constexpr, IS_NEAR: tl.constexpr,
    HAS_ALLOWED: tl.constexpr, IS_POSITIVE: tl.constexpr, OF_RELU: tl.constexpr,
    LINEAR: tl.constexpr, SQUARES: tl.constexpr,
    GROUPS: tl.constexpr, WIDE: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """The entries of each row that reach its floor, ascending; found[b]: how many, where above ROOM any ROOM of them.

    floors: RANK, a rank per row; SIMPLEX, a scale per row; ABOVE, a threshold, or one per column; AT_LEAST, the
    least entry. Those of rows lie `stride` apart. slack: read if IS_NEAR or SIMPLEX. IS_NEAR: floors are each row's
    k, and what lies `far` temperatures below the least that b may be is taken.
    """
    row = tl.program_id(0).to(tl.int64)
    base = scores + row * n
    near, temperature = 0.0, 0.0
    if IS_NEAR or KIND == SIMPLEX:
        near = tl.load(slack)
    if IS_NEAR:
        temperature = tl.load(temperatures)
        near += far * temperature
    scale, top, floor = 1.0, 0.0, 0.0
    is_wanted = True
    if KIND < ABOVE:
        group = tl.arange(0, GROUPS)
        maxima = tl.full((GROUPS,), NEVER, tl.float32)
        for start in range(0, n, AHEAD * GROUPS):
            for part in tl.static_range(AHEAD):
                at = start + part * GROUPS + group
                if HAS_ALLOWED or IS_POSITIVE:
                    entries, _ = read(base, allowed, at, n, HAS_ALLOWED, IS_POSITIVE, OF_RELU)
                else:
                    entries = tl.load(base + at, mask=at < n, other=NEVER).to(tl.float32)
                maxima = tl.where(entries > maxima, entries, maxima)  # which NaN is not
        if OF_RELU:
            maxima = tl.where(maxima > NEVER, tl.maximum(maxima, 0.0), NEVER)
        if KIND == RANK:
            k, lower = rank_of(floors, row, stride, n, IS_NEAR)
            floor = value_of(kth_largest(keys_of(maxima, PLACES), k, PLACES), PLACES)
            floor -= near + lower * temperature
            is_wanted = k > 0
        else:
            scale = tl.load(floors + row * stride)
            top = tl.max(maxima, 0)
            top = tl.where(top > NEVER, top, 0.0)
            low = tl.full((), -1.0, tl.float32)
            high = tl.full((), 0.0, tl.float32)
            for _halving in range(BISECTIONS):
                middle = (low + high) / 2
                is_low = simplex_total(maxima, top, scale, middle, LINEAR, SQUARES) >= 1
                low = tl.where(is_low, middle, low)
                high = tl.where(is_low, high, middle)
            floor = low - MARGIN - near * scale
    elif not PER_COLUMN:
        floor = tl.load(floors)
    # Entries take slots in any order, without waiting for one another, and are put in order afterwards.
    wide = tl.arange(0, WIDE)
    one = tl.full((WIDE,), 1, tl.int32)
    bad = tl.zeros((WIDE,), tl.int32)
    free = columns + row * ROOM
    tl.store(found + row, 0)
    tl.debug_barrier()
    for start in range(0, n, WIDE):
        at = start + wide
        if HAS_ALLOWED or IS_POSITIVE:
            entries, is_nan = read(base, allowed, at, n, HAS_ALLOWED, IS_POSITIVE, False)
        else:
            entries = tl.load(base + at, mask=at < n, other=NEVER).to(tl.float32)
            is_nan = entries != entries
        bad = bad | is_nan.to(tl.int32)
        reached = entries
        if OF_RELU:
            reached = tl.where(entries > NEVER, tl.maximum(entries, 0.0), NEVER)
        if KIND == RANK:
            hit = (reached >= floor) & is_wanted
        elif KIND == SIMPLEX:
            hit = (reached - top) * scale >= floor
        elif PER_COLUMN:
            hit = reached > tl.load(floors + at, mask=at < n, other=float("inf"))
        elif KIND == AT_LEAST:
            hit = reached >= floor
        else:
            hit = reached > floor
        hit = hit & (reached > NEVER)
        slot = tl.atomic_add(found + row + 0 * at, one, mask=hit, sem="relaxed", scope="cta")
        tl.store(free + slot, at, mask=hit & (slot < ROOM))
    tl.debug_barrier()
    count = tl.load(found + row)
    slots = tl.arange(0, ROOM)
    is_real = slots < count
    column = tl.load(free + slots, mask=is_real, other=0x7FFFFFFF)
    tl.debug_barrier()
    column = tl.sort(tl.where(is_real, column, 0x7FFFFFFF))
    value = tl.load(base + column, mask=is_real, other=0.0).to(tl.float32)
    if OF_RELU:
        value = tl.maximum(value, 0.0)
    tl.store(free + slots, tl.where(is_real, column, 0))
    tl.store(values + row * ROOM + slots, value)
    tl.store(counts + row, tl.minimum(count, ROOM))
    flags = tl.where(count > ROOM, OVERFLOW, 0) | tl.where(tl.max(bad, 0) > 0, NAN, 0)
    tl.store(status + row, flags)


@triton.jit
def has_long(first, found, n_rows, ROOM: tl.constexpr, EACH: tl.constexpr):
    """Return whether one of EACH rows has more entries than there is room for."""
    rows = first + tl.arange(0, EACH)
    return tl.max(tl.load(found + rows, mask=rows < n_rows, other=0), 0) > ROOM


@triton.jit
def finish(columns, values, counts, status, row, count, has_nan, ROOM: tl.constexpr):
    """Zero what a list of `count` entries leaves free, and note how many there are."""
    slot = tl.arange(0, ROOM)
    tl.store(columns + row * ROOM + slot, tl.zeros((ROOM,), tl.int32), mask=slot >= count)
    tl.store(values + row * ROOM + slot, tl.zeros((ROOM,), tl.float32), mask=slot >= count)
    tl.store(counts + row, tl.minimum(count, ROOM))
    flags = tl.where(count > ROOM, OVERFLOW, 0) | tl.where(has_nan > 0, NAN, 0)
    tl.store(status + row, flags)


@triton.jit
def collect_long_rows(
    scores, floors, slack, temperatures, allowed, columns, values, counts, found, status, stride, far, n_rows, n,
    KIND: tl.constexpr, PLACES: tl.constexpr, IS_EXACT: tl.constexpr, IS_NEAR: tl.constexpr,
    HAS_ALLOWED: tl.constexpr, IS_POSITIVE: tl.constexpr, OF_RELU: tl.constexpr,
    LINEAR: tl.constexpr, SQUARES: tl.constexpr,
    EACH: tl.constexpr, WIDE: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """`collect_rows` of those rows that it found too many entries of, with the row's exact floor.

    IS_EXACT: of RANK, as many entries as the rank says, of those at the floor the first ones.
    """
    begin_row = tl.program_id(0).to(tl.int64) * EACH
    if has_long(begin_row, found, n_rows, ROOM, EACH):
        for row in range(begin_row, begin_row + EACH):
            if tl.load(found + row, mask=row < n_rows, other=0) > ROOM:
                base = scores + row * n
                near, temperature = 0.0, 0.0
                if IS_NEAR or KIND == SIMPLEX:
                    near = tl.load(slack)
                if IS_NEAR:
                    temperature = tl.load(temperatures)
                    near += far * temperature
                wide = tl.arange(0, WIDE)
                scale, top, floor = 1.0, 0.0, 0.0
                key, left = 0, 0
                if KIND == RANK:
                    k, lower = rank_of(floors, row, stride, n, IS_NEAR)
                    key = kth_of_row(
                        base, allowed, n, k, PLACES, HAS_ALLOWED, IS_POSITIVE, OF_RELU, WIDE
                    )
                    floor = value_of(key, PLACES) - (near + lower * temperature)
                    if IS_EXACT:
                        left = k
                        for start in range(0, n, WIDE):
                            entries, _ = read(
                                base, allowed, start + wide, n, HAS_ALLOWED, IS_POSITIVE, OF_RELU
                            )
                            is_above = (keys_of(entries, PLACES) > key) & (entries > NEVER)
                            left -= tl.sum(is_above.to(tl.int32), 0)
                else:
                    scale = tl.load(floors + row * stride)
                    maxima = tl.full((WIDE,), NEVER, tl.float32)
                    for start in range(0, n, WIDE):
                        entries, _ = read(
                            base, allowed, start + wide, n, HAS_ALLOWED, IS_POSITIVE, OF_RELU
                        )
                        maxima = tl.maximum(maxima, entries)
                    top = tl.max(maxima, 0)
                    low = tl.full((), -1.0, tl.float32)
                    high = tl.full((), 0.0, tl.float32)
                    for _halving in range(BISECTIONS):
                        middle = (low + high) / 2
                        total = 0.0
                        for start in range(0, n, WIDE):
                            entries, _ = read(
                                base, allowed, start + wide, n, HAS_ALLOWED, IS_POSITIVE, OF_RELU
                            )
                            total += simplex_total(entries, top, scale, middle, LINEAR, SQUARES)
                        low = tl.where(total >= 1, middle, low)
                        high = tl.where(total >= 1, high, middle)
                    floor = low - MARGIN - near * scale
                count, ties = 0, 0
                for start in range(0, n, WIDE):
                    at = start + wide
                    entries, _ = read(base, allowed, at, n, HAS_ALLOWED, IS_POSITIVE, OF_RELU)
                    if KIND == SIMPLEX:
                        hit = (entries - top) * scale >= floor
                    elif IS_EXACT:
                        keys = keys_of(entries, PLACES)
                        tie = (keys == key) & (entries > NEVER)
                        rank = ties + tl.cumsum(tie.to(tl.int32), 0)
                        hit = (keys > key) | (tie & (rank <= left))
                        ties += tl.sum(tie.to(tl.int32), 0)
                    else:
                        hit = entries >= floor
                    hit = hit & (entries > NEVER)
                    place = count + tl.cumsum(hit.to(tl.int32), 0) - 1
                    fits = hit & (place < ROOM)
                    tl.store(columns + row * ROOM + place, at, mask=fits)
                    tl.store(values + row * ROOM + place, entries, mask=fits)
                    count += tl.sum(hit.to(tl.int32), 0)
                has_nan = tl.load(status + row) & NAN
                finish(columns, values, counts, status, row, count, has_nan, ROOM)


@triton.jit
def choose_rows(
    columns, values, counts, status, ranks, chosen_columns, chosen_values, chosen_counts, chosen_status, stride,
    PLACES: tl.constexpr, ROOM: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """The ranks[b] largest entries of each list, of equal ones the first, in their order."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, ROOM)
    inside = slot < tl.load(counts + row)
    column = tl.load(columns + row * ROOM + slot, mask=inside, other=0)
    value = tl.load(values + row * ROOM + slot, mask=inside, other=0.0)
    k = tl.load(ranks + row * stride).to(tl.int32)
    keys = tl.where(inside, keys_of(value, PLACES), lowest_key(PLACES).to(tl.int32))
    threshold = kth_largest(keys, k, PLACES)
    above = (keys > threshold) & inside
    ties = (keys == threshold) & inside
    left = k - tl.sum(above.to(tl.int32), 0)
    chosen = above | (ties & (tl.cumsum(ties.to(tl.int32), 0) <= left))
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    fits = chosen & (place < CAPACITY)
    tl.store(chosen_columns + row * CAPACITY + place, column, mask=fits)
    tl.store(chosen_values + row * CAPACITY + place, value, mask=fits)
    count = tl.sum(chosen.to(tl.int32), 0)
    has_nan = tl.load(status + row) & NAN
    finish(
        chosen_columns, chosen_values, chosen_counts, chosen_status, row, count, has_nan, CAPACITY
    )
