"""Kernels that find the k-th largest of some floats by their bits.

Floats are ordered by their bits: as an integer, flipped where negative, the larger float is the larger
key. Of bfloat16 the upper 16 bits say all (PLACES). The k-th largest is found by fixing one bit of its
key after the other, or a byte where entries are counted by many programs.
"""

import triton
import triton.language as tl

NEVER = tl.constexpr(float("-inf"))


@triton.jit
def keys_of(values, PLACES: tl.constexpr):
    """Integers in the order of the values, -0 as 0."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> (32 - PLACES)


@triton.jit
def value_of(key, PLACES: tl.constexpr):
    """The float of a key; -inf where it is below every float."""
    bits = key << (32 - PLACES)
    bits = tl.where(key < 0, bits ^ (0x7FFFFFFF & (-1 << (32 - PLACES))), bits)
    value = bits.to(tl.float32, bitcast=True)
    return tl.where(value == value, value, NEVER)


@triton.jit
def next_bit(best, place, PLACES: tl.constexpr):
    """(int64) best with the bit set that is `place` below the highest."""
    return best + (tl.full((), 1, tl.int64) << (PLACES - 1 - place))


@triton.jit
def lowest_key(PLACES: tl.constexpr):
    return -(tl.full((), 1, tl.int64) << (PLACES - 1))


@triton.jit
def kth_largest(keys, k, PLACES: tl.constexpr):
    """The largest key that at least k keys reach."""
    best = lowest_key(PLACES)
    for place in range(PLACES):
        candidate = next_bit(best, place, PLACES)
        reached = tl.sum((keys >= candidate.to(tl.int32)).to(tl.int32), 0)
        best = tl.where(reached >= k, candidate, best)
    return best.to(tl.int32)


@triton.jit
def bytes_before(counts, rank, LEVEL: tl.constexpr):
    """Return the upper LEVEL bytes of the rank-th largest key, and its rank among the keys that have them."""
    prefix, left = tl.full((), 0, tl.int32), rank
    for level in tl.static_range(LEVEL):
        number = tl.load(counts + 256 * level + tl.arange(0, 256))
        reached = tl.cumsum(number, 0, reverse=True)
        found = tl.max(tl.where(reached >= left, tl.arange(0, 256), 0), 0)
        left -= tl.sum(tl.where(tl.arange(0, 256) > found, number, 0), 0)
        prefix = (prefix << 8) | found
    return prefix, left


@triton.jit
def count_bytes(values, is_in, prefix, LEVEL: tl.constexpr):
    """Return how many keys have each byte at a level (512,), of those whose upper bytes are the prefix."""
    key = keys_of(values, 32) ^ (-1 << 31)  # ascending without a sign
    if LEVEL > 0:
        is_in = is_in & (((key >> (32 - 8 * LEVEL)) & ((1 << (8 * LEVEL)) - 1)) == prefix)
    byte = (key >> (24 - 8 * LEVEL)) & 255
    return tl.histogram(tl.where(is_in, byte, 256), 512)  # the others lie beyond those that count


@triton.jit
def add_counts(counts, number, LEVEL: tl.constexpr):
    """Add what `count_bytes` found to counts (levels, 256)."""
    place = tl.arange(0, 512)
    is_some = (place < 256) & (number > 0)
    tl.atomic_add(counts + 256 * LEVEL + place, number.to(tl.int64), mask=is_some, sem="relaxed")


@triton.jit
def count_keys(counts, ranks, entries, n, LEVEL: tl.constexpr, WIDE: tl.constexpr):
    """Count the bytes at a level of those keys whose upper bytes are the answer's; NaN counts as -inf."""
    prefix, _ = bytes_before(counts, tl.load(ranks), LEVEL)
    at = tl.program_id(0).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    value = tl.load(entries + at, mask=at < n, other=0.0).to(tl.float32)
    value = tl.where(value == value, value, NEVER)
    add_counts(counts, count_bytes(value, at < n, prefix, LEVEL), LEVEL)


@triton.jit
def ranked_keys(counts, ranks, value, left, LEVELS: tl.constexpr):
    """Write the float of the rank-th largest key, and how many of those equal to it are among the first `rank`.

    It is -inf where there are fewer, and inf for rank 0.
    """
    rank = tl.load(ranks)
    prefix, rest = bytes_before(counts, rank, LEVELS)
    key = (prefix << (32 - 8 * LEVELS)) ^ (-1 << 31)
    tl.store(value, tl.where(rank > 0, value_of(key, 32), float("inf")))
    tl.store(left, rest)
