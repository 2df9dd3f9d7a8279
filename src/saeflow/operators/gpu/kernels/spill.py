"""Kernels that choose among the entries of all rows together, and divide those of a row among its lists.

Entries were collected in lists with room for LONG; a row with more of them (found) is read again.
"""

import triton
import triton.language as tl

from saeflow.operators.gpu.kernels.ranks import add_counts, bytes_before, count_bytes
from saeflow.operators.gpu.kernels.selection import NAN, NEVER, OVERFLOW, has_long, read


@triton.jit
def count_rows(
    counts, ranks, scores, values, found, n_rows, n,
    LEVEL: tl.constexpr, LONG: tl.constexpr, EACH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Do what `count_keys` does for the entries of EACH rows; of one that is read again all count."""
    prefix, _rank = bytes_before(counts, tl.load(ranks), LEVEL)
    first = tl.program_id(0).to(tl.int64) * EACH
    place = tl.arange(0, EACH * LONG)
    of = first + place // LONG
    count = tl.load(found + of, mask=of < n_rows, other=0)
    is_in = (place % LONG < count) & (count <= LONG)
    value = tl.load(values + first * LONG + place, mask=is_in, other=0.0)
    number = count_bytes(value, is_in, prefix, LEVEL)
    if has_long(first, found, n_rows, LONG, EACH):
        for row in range(first, first + EACH):
            if tl.load(found + row, mask=row < n_rows, other=0) > LONG:
                base = scores + row * n
                for start in range(0, n, WIDE):
                    at = start + tl.arange(0, WIDE)
                    entries, _nan = read(base, base, at, n, False, False, False)
                    number += count_bytes(entries, entries > NEVER, prefix, LEVEL)
    add_counts(counts, number, LEVEL)


@triton.jit
def compare_rows(
    scores, values, found, threshold, above, ties, n, LONG: tl.constexpr, WIDE: tl.constexpr
):
    """Count the entries of each row that are above a threshold, and those that are equal to it."""
    row = tl.program_id(0).to(tl.int64)
    limit = tl.load(threshold)
    count = tl.load(found + row)
    slot = tl.arange(0, LONG)
    is_in = (slot < count) & (count <= LONG)
    value = tl.load(values + row * LONG + slot, mask=is_in, other=NEVER)
    more = tl.sum((value > limit).to(tl.int32), 0)
    same = tl.sum(((value == limit) & is_in).to(tl.int32), 0)
    if count > LONG:
        base = scores + row * n
        for start in range(0, n, WIDE):
            at = start + tl.arange(0, WIDE)
            entries, _nan = read(base, base, at, n, False, False, False)
            more += tl.sum((entries > limit).to(tl.int32), 0)
            same += tl.sum(((entries == limit) & (entries > NEVER)).to(tl.int32), 0)
    tl.store(above + row, more)
    tl.store(ties + row, same)


@triton.jit
def spread_rows(
    found, ties, left, old_status, counts, status, owners, first, parts, n_rows, spare,
    HAS_TIES: tl.constexpr, ROOM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Divide spare lists among rows of `found` entries, in the order of rows; one program for all rows.

    HAS_TIES: the first `left` of all ties are entries too; ties becomes how many of each row's are.
    """
    place = tl.arange(0, WIDE)
    begin = 0
    before = tl.zeros((), tl.int64)
    for start in range(0, n_rows, WIDE):
        row = start + place
        inside = row < n_rows
        count = tl.load(found + row, mask=inside, other=0)
        if HAS_TIES:
            tie = tl.load(ties + row, mask=inside, other=0).to(tl.int64)
            rest = tl.load(left) - (before + tl.cumsum(tie, 0) - tie)
            taken = tl.minimum(tl.maximum(rest, 0), tie).to(tl.int32)
            tl.store(ties + row, taken, mask=inside)
            count += taken
            before += tl.sum(tie, 0)
        more = tl.maximum(count - 1, 0) // ROOM  # lists beyond the first
        begins = begin + tl.cumsum(more, 0) - more
        had = tl.minimum(tl.maximum(spare - begins, 0), more)
        tl.store(counts + row, tl.minimum(count, ROOM), mask=inside)
        tl.store(owners + row, row, mask=inside)
        tl.store(first + row, n_rows + begins, mask=inside)
        tl.store(parts + row, 1 + had, mask=inside)
        has_nan = tl.load(old_status + row, mask=inside, other=0) & NAN
        tl.store(status + row, has_nan | tl.where(had < more, OVERFLOW, 0), mask=inside)
        for part in range(tl.max(had, 0)):
            own = n_rows + begins + part
            tl.store(owners + own, row, mask=part < had)
            rest_of_row = tl.minimum(count - ROOM * (part + 1), ROOM)
            tl.store(counts + own, rest_of_row, mask=part < had)
        begin += tl.sum(more, 0)
    for start in range(begin, spare, WIDE):  # lists that no row has
        is_unused = start + place < spare
        tl.store(owners + n_rows + start + place, place * 0, mask=is_unused)
        tl.store(counts + n_rows + start + place, place * 0, mask=is_unused)


@triton.jit
def chosen_of(entries, can, limits, ties, taken, HAS_TIES: tl.constexpr):
    """Return which entries are above their limits or, if HAS_TIES, at it and among the first `taken` of a row.

    ties: how many of the row's came before; returned with those that are here.
    """
    hit = can & (entries > limits)
    if HAS_TIES:
        tie = (can & (entries == limits)).to(tl.int32)
        hit = hit | ((tie > 0) & (ties + tl.cumsum(tie, 0) <= taken))
        ties += tl.sum(tie, 0)
    return hit, ties


@triton.jit
def spill_rows(
    scores, limits, taken, found, counts, first, parts, some_columns, some_values, columns, values, n_rows, n,
    PER_COLUMN: tl.constexpr, HAS_TIES: tl.constexpr, HAS_SPILL: tl.constexpr, WIDE: tl.constexpr,
    LONG: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Divide the entries of each row, or those that are chosen, among its own list and its spare ones, in their order.

    A program zeroes what its list leaves free, and those of rows write all of the row's lists. HAS_TIES: the entries
    above the limit are chosen, and the first taken[row] of those equal to it.
    """
    own = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, ROOM)
    is_free = slot >= tl.load(counts + own)
    tl.store(columns + own * ROOM + slot, tl.zeros((ROOM,), tl.int32), mask=is_free)
    tl.store(values + own * ROOM + slot, tl.zeros((ROOM,), tl.float32), mask=is_free)
    if own < n_rows:
        all_of_row = tl.load(found + own)
        begin, lists, limit, most = own, 1, 0.0, 0
        if HAS_SPILL:
            begin = tl.load(first + own).to(tl.int64) - 1
            lists = tl.load(parts + own)
        if not PER_COLUMN:
            limit = tl.load(limits)
        if HAS_TIES:
            most = tl.load(taken + own)
        if all_of_row <= LONG:
            place = tl.arange(0, LONG)
            hit = place < all_of_row
            at = tl.load(some_columns + own * LONG + place, mask=hit, other=0)
            entries = tl.load(some_values + own * LONG + place, mask=hit, other=0.0)
            if HAS_TIES:
                hit, _ties = chosen_of(entries, hit, limit, 0, most, True)
                place = tl.cumsum(hit.to(tl.int32), 0) - 1
            part = place // ROOM
            fits = hit & (part < lists)
            where = tl.where(part > 0, begin + part, own) * ROOM + place % ROOM
            tl.store(columns + where, at, mask=fits)
            tl.store(values + where, entries, mask=fits)
        else:
            base = scores + own * n
            count, ties = 0, 0
            for start in range(0, n, WIDE):
                at = start + tl.arange(0, WIDE)
                entries, _nan = read(base, base, at, n, False, False, False)
                of = limit
                if PER_COLUMN:
                    of = tl.load(limits + at, mask=at < n, other=float("inf"))
                hit, ties = chosen_of(entries, entries > NEVER, of, ties, most, HAS_TIES)
                place = count + tl.cumsum(hit.to(tl.int32), 0) - 1
                part = place // ROOM
                fits = hit & (part < lists)
                where = tl.where(part > 0, begin + part, own) * ROOM + place % ROOM
                tl.store(columns + where, at, mask=fits)
                tl.store(values + where, entries, mask=fits)
                count += tl.sum(hit.to(tl.int32), 0)
