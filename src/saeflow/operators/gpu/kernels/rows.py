"""Kernels on rows that fit a program's registers, and on entries by rows of any length.

Floats are ordered by their bits: as an integer, flipped where negative, the larger float is the larger key,
and the k-th largest is found by fixing one bit of its key after the other. Sums are in float64.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-2147483648)
MOST_STEPS = tl.constexpr(100)


@triton.jit
def _keys(values, inside):
    """Integers in the order of the values; those outside the row come last."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)  # -0 is 0
    return tl.where(inside, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), LOWEST)


@triton.jit
def _kth_largest(keys, k):
    """The largest key that at least k keys reach."""
    best = tl.full((), LOWEST, tl.int64)
    for place in range(32):
        candidate = best + (tl.full((), 1, tl.int64) << (31 - place))
        reached = tl.sum((keys >= candidate.to(tl.int32)).to(tl.int32), 0)
        best = tl.where(reached >= k, candidate, best)
    return best.to(tl.int32)


@triton.jit
def topk_rows(x, counts, offsets, columns, kept, bad, n, BLOCK: tl.constexpr):
    """The counts[b] largest entries of each row in ascending columns; bad[b]: it holds NaN."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n
    values = tl.load(x + row * n + at, mask=inside, other=float("-inf"))
    tl.store(bad + row, tl.max((values != values).to(tl.int32), 0))
    k = tl.load(counts + row)
    keys = _keys(values, inside)
    threshold = _kth_largest(keys, k)
    above = (keys > threshold) & inside
    ties = (keys == threshold) & inside
    left = k - tl.sum(above.to(tl.int64), 0)
    chosen = above | (ties & (tl.cumsum(ties.to(tl.int32), 0) <= left))
    place = tl.load(offsets + row) + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(columns + place, at.to(tl.int64), mask=chosen)
    tl.store(kept + place, values, mask=chosen)


@triton.jit
def _power(base, exponent, SQUARES: tl.constexpr, LINEAR: tl.constexpr):
    """base ** exponent of a base >= 0, 0 where it is 0."""
    if LINEAR:
        return base
    if SQUARES:
        return base * base
    positive = tl.where(base > 0, base, 1.0)
    return tl.where(base > 0, tl.exp(exponent * tl.log(positive)), 0.0)


@triton.jit(do_not_specialize=["n"])  # n = 1 would be no tensor
def simplex_rows(
    x, scales, p, problems, n, BLOCK: tl.constexpr, SQUARES: tl.constexpr, LINEAR: tl.constexpr
):
    """alpha-entmax of each row, alpha = 1 + scale; LINEAR: alpha 2 (sparsemax), SQUARES: 1.5.

    Newton's method for N(tau) = (sum (e - tau)_+^b)^(1/b) = 1, b = 1 / scale, within a bracket.
    problems[b]: 1 a NaN, 2 an inf, 3 only -inf.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n
    values = tl.load(x + row * n + at, mask=inside, other=float("-inf"))
    has_nan = tl.max((values != values).to(tl.int32), 0)
    values = tl.where(values != values, float("-inf"), values)
    top = tl.max(values, 0)
    scale = tl.load(scales + row)
    problem = tl.where(
        has_nan > 0, 1, tl.where(top == float("inf"), 2, tl.where(top == float("-inf"), 3, 0))
    )
    tl.store(problems + row, problem)
    top = tl.where(problem > 0, 0.0, top)
    e = tl.where(
        inside & (values > float("-inf")) & (problem == 0),
        (values.to(tl.float64) - top.to(tl.float64)) * scale,
        float("-inf"),
    )
    b = 1.0 / scale
    low = tl.full((), -1.0, tl.float64)
    high = -tl.exp(-scale * tl.log(n.to(tl.float64)))  # the largest entry has p >= 1 / n
    tau, done, step = low, problem > 0, 0
    while (step < MOST_STEPS) & (done == 0):
        excess = tl.where(e > tau, e - tau, 0.0)
        if LINEAR:
            slope = tl.where(excess > 0, 1.0, 0.0).to(tl.float64)
        elif SQUARES:
            slope = excess
        else:
            slope = _power(excess, b - 1.0, False, False)
        total = tl.sum(slope * excess, 0)
        slopes = tl.sum(slope, 0)
        low = tl.where(total >= 1, tau, low)
        high = tl.where(total < 1, tau, high)
        gap = tl.abs(total - 1)
        done = (gap <= 1e-13) | (high - low <= 5e-16 * tl.abs(low))
        root = tl.exp((1.0 - scale) * tl.log(tl.where(total > 0, total, 1.0)))
        new = tau + (total - root) / tl.where(slopes > 0, slopes, 1.0)
        new = tl.where((new > low) & (new <= high), new, (low + high) / 2)
        tau = tl.where(done, tau, new)
        step += 1
    out = _power(tl.where(e > tau, e - tau, 0.0), b, SQUARES, LINEAR)
    tl.store(p + row * n + at, out.to(tl.float32), mask=inside)


@triton.jit
def soft_topk_rows(
    x, ks, temperature, far, mask, guesses, shifts, problems, n, BLOCK: tl.constexpr
):
    """The soft top-k mask of each row; b is an entry of the row (guess) plus a shift.

    Between two entries the sum of the mask is a quadratic in exp(b), whose root is taken until the same
    entries stay above b. problems[b]: 1 a NaN or inf, 2 fewer finite entries than k.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n
    values = tl.load(x + row * n + at, mask=inside, other=float("-inf"))
    is_bad = tl.max(((values != values) | (values == float("inf"))).to(tl.int32), 0)
    values = tl.where(values < float("inf"), values, float("-inf"))
    k = tl.load(ks + row)
    rank = tl.maximum(tl.ceil(k), 1.0).to(tl.int32)
    keys = _keys(values, inside)
    threshold = _kth_largest(keys, rank)
    guess = tl.max(tl.where(keys <= threshold, values, float("-inf")), 0)
    problem = tl.where(is_bad > 0, 1, tl.where(guess == float("-inf"), 2, 0))
    tl.store(problems + row, problem)
    guess = tl.where(problem > 0, 0.0, guess)
    finite = inside & (values > float("-inf"))
    first = (values - guess).to(tl.float64) / temperature
    lowest = tl.min(tl.where(finite, first, float("inf")), 0) - 1000.0
    highest = tl.max(tl.where(finite, first, float("-inf")), 0) + 1000.0
    t = tl.zeros((), tl.float64)
    done, step = problem > 0, 0
    while (step < n + 2) & (done == 0):
        u = first - t
        above = finite & (u > 0)
        below = finite & (u <= 0)
        count = tl.sum(above.to(tl.float64), 0)
        nearest = tl.min(tl.where(above, u, float("inf")), 0)
        nearest = tl.where(count > 0, nearest, 0.0)
        high = tl.sum(tl.where(above, tl.exp(nearest - tl.where(above, u, 0.0)), 0.0), 0)
        log_above = tl.where(
            count > 0, tl.log(tl.where(high > 0, high, 1.0)) - nearest, float("-inf")
        )
        some = tl.sum(below.to(tl.int32), 0) > 0
        closest = tl.where(some, tl.max(tl.where(below, u, float("-inf")), 0), 0.0)
        rest = tl.sum(tl.where(below, tl.exp(tl.where(below, u, 0.0) - closest), 0.0), 0)
        log_below = tl.where(some, tl.log(tl.where(rest > 0, rest, 1.0)) + closest, float("-inf"))
        extra = count - k
        root = tl.sqrt(extra * extra + tl.exp(log_above + log_below))
        move = tl.where(
            extra < 0,
            log_below - tl.log(tl.where(extra < 0, root - extra, 1.0)),
            tl.where(
                extra > 0,
                tl.log(tl.where(extra > 0, root + extra, 1.0)) - log_above,
                (log_below - log_above) / 2,
            ),
        )
        new = tl.minimum(tl.maximum(t + move, lowest), highest)
        same = tl.sum((finite & (first - new > 0)).to(tl.float64), 0) == count
        done = same | (tl.abs(new - t) <= 1e-14 * (1 + tl.abs(new)))
        t = new
        step += 1
    shift = (t * temperature).to(tl.float32)
    distance = ((values - guess) - shift) / temperature
    minus = -tl.abs(distance)
    tail = tl.where(finite & (minus > -far), tl.exp(tl.maximum(minus, -far)) / 2, 0.0)
    out = tl.where(finite, tl.where(distance > 0, 1 - tail, tail), 0.0)
    tl.store(mask + row * n + at, out, mask=inside)
    tl.store(guesses + row, guess)
    tl.store(shifts + row, shift)


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
