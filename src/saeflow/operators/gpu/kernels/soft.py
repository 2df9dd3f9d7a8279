"""Kernels of the soft top-k of whole rows, of any width, which are read in chunks: while it is hot, all
entries have a share. Exponentials are in float32, their sums in float64, but of a few."""

import triton
import triton.language as tl

from saeflow.operators.gpu.kernels.ranks import keys_of, kth_largest, value_of

MOST_STEPS = tl.constexpr(150)
AHEAD = tl.constexpr(
    4
)  # entries of a lane that are summed in float32 before they are added in float64
ENOUGH = tl.constexpr(1e-7)  # of k: what a sum in float32 of so few leaves undecided
NEVER = tl.constexpr(float("-inf"))


@triton.jit
def read(base, at, n, OF_RELU: tl.constexpr):
    """Entries of a row as float32, or relu of them; -inf outside it."""
    inside = at < n
    entries = tl.load(base + at, mask=inside, other=NEVER).to(tl.float32)
    if OF_RELU:
        entries = tl.where(inside & (entries <= 0), 0.0, entries)
    return entries


@triton.jit
def distance_of(values, guess, shift, temperature):
    """(values - b) / temperature; near b the first difference is exact, whatever b's size."""
    return ((values - guess) - shift) / temperature


@triton.jit
def tail_of(distance, far):
    """F(-|t|), exactly 0 from far away on."""
    minus = -tl.abs(distance)
    return tl.where(minus > -far, tl.exp(tl.maximum(minus, -far)) / 2, 0.0)


@triton.jit
def middle_of_gap(base, origin, b, temperature, n, OF_RELU: tl.constexpr, WIDE: tl.constexpr):
    """() what is missing from b, in temperatures, to (log D - log A) / 2, in sums relative to their largest."""
    wide = tl.arange(0, WIDE)
    guess, shift = origin.to(tl.float32), b.to(tl.float32)
    over = tl.full((WIDE,), float("inf"), tl.float32)
    under = tl.full((WIDE,), NEVER, tl.float32)
    for start in range(0, n, WIDE):
        entries = read(base, start + wide, n, OF_RELU)
        u = distance_of(entries, guess, shift, temperature)
        over = tl.minimum(over, tl.where(u > 0, u, float("inf")))
        under = tl.maximum(under, tl.where(u > 0, NEVER, u))
    nearest, closest = tl.min(over, 0), tl.max(under, 0)
    highs, rests = tl.zeros((WIDE,), tl.float64), tl.zeros((WIDE,), tl.float64)
    for start in range(0, n, WIDE):
        entries = read(base, start + wide, n, OF_RELU)
        u = distance_of(entries, guess, shift, temperature)
        highs += tl.exp(tl.where(u > 0, nearest - u, NEVER)).to(tl.float64)
        rests += tl.exp(tl.where(u > 0, NEVER, u - closest)).to(tl.float64)
    log_above = tl.log(tl.sum(highs, 0)) - nearest.to(tl.float64)
    log_below = tl.log(tl.sum(rests, 0)) + closest.to(tl.float64)
    return (log_below - log_above) / 2


@triton.jit
def soft_rows(
    scores, ks, temperatures, far, mask, guesses, shifts, problems, sums, n,
    OF_RELU: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The soft top-k mask of each row; b is a float (guess) plus a shift.

    OF_RELU: of relu of the scores, times that, and its sum (sums[b]); NaN where the row has a problem, or k is not in
    0..n.

    At any b between the same two entries the sum of the mask is a quadratic in exp(b), whose root is
    taken within a bracket. problems[b]: 1 a NaN or inf, 2 fewer finite entries than k.
    """
    row = tl.program_id(0).to(tl.int64)
    base = scores + row * n
    wide = tl.arange(0, WIDE)
    k = tl.load(ks + row)
    temperature = tl.load(temperatures)
    largest = tl.full((WIDE,), NEVER, tl.float32)
    least = tl.full((WIDE,), float("inf"), tl.float32)
    finite = tl.zeros((WIDE,), tl.int32)
    bad = tl.zeros((WIDE,), tl.int32)
    for start in range(0, n, WIDE):
        entries = read(base, start + wide, n, OF_RELU)
        is_finite = (entries == entries) & (tl.abs(entries) < float("inf"))
        largest = tl.maximum(largest, tl.where(is_finite, entries, NEVER))
        least = tl.minimum(least, tl.where(is_finite, entries, float("inf")))
        finite += is_finite.to(tl.int32)
        bad = bad | ((entries != entries) | (entries == float("inf"))).to(tl.int32)
    count = tl.sum(finite, 0)
    problem = tl.where(tl.max(bad, 0) > 0, 1, tl.where(count < tl.ceil(k), 2, 0))
    tl.store(problems + row, problem)
    t = temperature.to(tl.float64)
    lowest = tl.where(problem > 0, 0.0, tl.min(least, 0).to(tl.float64))
    highest = tl.where(problem > 0, 0.0, tl.max(largest, 0).to(tl.float64))
    # Places are relative to a float, the origin, so that they are exact near b, whatever its size. With
    # k = 0, or k of every entry, b is infinite, and any b this far gives the same mask.
    origin = tl.where(k >= count, lowest, highest)
    low, high = lowest - origin - 1000 * t, highest - origin + 1000 * t
    # The k-th largest of the lanes' maxima is near b: from there few roots are left to take.
    near = value_of(kth_largest(keys_of(largest, 16), tl.ceil(k).to(tl.int32), 16), 16).to(
        tl.float64
    )
    nearby = tl.minimum(tl.maximum(near, lowest), highest) - origin
    b = tl.where(k <= 0, high, tl.where(k >= count, low, nearby))
    done, step = (problem > 0) | (k <= 0) | (k >= count), 0
    last = tl.full((), float("inf"), tl.float64)
    is_gap = False
    while (step < MOST_STEPS) & (done == 0):
        guess = (origin + b).to(tl.float32)
        moved = origin - guess.to(tl.float64)
        origin, b, low, high = origin - moved, b + moved, low + moved, high + moved
        shift = b.to(tl.float32)
        over = tl.zeros((WIDE,), tl.int32)
        highs = tl.zeros((WIDE,), tl.float64)
        rests = tl.zeros((WIDE,), tl.float64)
        for start in range(0, n, AHEAD * WIDE):
            some_highs = tl.zeros((WIDE,), tl.float32)
            some_rests = tl.zeros((WIDE,), tl.float32)
            for chunk in tl.static_range(AHEAD):
                entries = read(base, start + chunk * WIDE + wide, n, OF_RELU)
                u = distance_of(entries, guess, shift, temperature)
                part = tl.exp(-tl.abs(u))
                over += (u > 0).to(tl.int32)
                some_highs += tl.where(u > 0, part, 0.0)
                some_rests += tl.where(u > 0, 0.0, part)
            highs += some_highs.to(tl.float64)
            rests += some_rests.to(tl.float64)
        above = tl.sum(over, 0).to(tl.float64)
        sum_above, sum_below = tl.sum(highs, 0), tl.sum(rests, 0)
        extra = above - k
        excess = extra - sum_above / 2 + sum_below / 2  # of the mask's sum
        low = tl.where(excess >= 0, b, low)
        high = tl.where(excess <= 0, b, high)
        root = tl.sqrt(extra * extra + sum_above * sum_below)
        up = (root + extra) / tl.where(sum_above > 0, sum_above, 1.0)
        down = sum_below / tl.where(root > extra, root - extra, 1.0)
        ratio = tl.where(extra > 0, up, down)
        # A root that lies beyond many entries is far from theirs: then the bracket is halved.
        is_slow = tl.abs(excess) > 0.5 * last
        last = tl.abs(excess)
        can = (tl.where(extra > 0, sum_above, sum_below) > 0) & (ratio > 0) & (is_slow == 0)
        new = b + t * tl.log(tl.where(can, ratio, 1.0))
        new = tl.where(can & (new > low) & (new < high), new, (low + high) / 2)
        is_gap = (extra == 0) & ((sum_above == 0) | (sum_below == 0))
        done = (tl.abs(excess) <= k * ENOUGH) | (tl.abs(new - b) <= 1e-9 * t)
        b = tl.where(done, b, new)
        step += 1
    if is_gap:  # b lies so far from every entry that their shares are below float range
        b += t * middle_of_gap(base, origin, b, temperature, n, OF_RELU, WIDE)
    guess = (origin + b).to(tl.float32)
    shift = (b + (origin - guess.to(tl.float64))).to(tl.float32)
    tl.store(guesses + row, guess)
    tl.store(shifts + row, shift)
    added = tl.zeros((WIDE,), tl.float32)
    for start in range(0, n, WIDE):
        inside = start + wide < n
        entries = read(base, start + wide, n, OF_RELU)
        u = distance_of(entries, guess, shift, temperature)
        tail = tail_of(u, far)
        share = tl.where(u > 0, 1 - tail, tail)
        if OF_RELU:
            share = tl.where((problem > 0) | (k < 0) | (k > n), float("nan"), share * entries)
            added += tl.where(inside, share, 0.0)
        tl.store(mask + row * n + start + wide, share, mask=inside)
    if OF_RELU:
        tl.store(sums + row, tl.sum(added, 0))


@triton.jit
def soft_gradient_rows(
    scores, grad, guesses, shifts, temperatures, far, grad_scores, grad_k, of_sum, n,
    OF_RELU: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradients of `soft_rows` in scores and k: f (g - mean) and mean = sum f g / sum f; of_sum: at all sums."""
    row = tl.program_id(0).to(tl.int64)
    base = scores + row * n
    wide = tl.arange(0, WIDE)
    temperature = tl.load(temperatures)
    guess, shift = tl.load(guesses + row), tl.load(shifts + row)
    weight = 0.0
    if OF_RELU:
        weight = tl.load(of_sum)
    near = tl.full((WIDE,), float("inf"), tl.float32)
    for start in range(0, n, WIDE):
        entries = read(base, start + wide, n, OF_RELU)
        near = tl.minimum(near, tl.abs(distance_of(entries, guess, shift, temperature)))
    nearest = tl.min(near, 0)  # f / sum f, also where every f is below float range
    nearest = tl.where(nearest < float("inf"), nearest, 0.0)
    totals = tl.zeros((WIDE,), tl.float64)
    weighted = tl.zeros((WIDE,), tl.float64)
    for start in range(0, n, WIDE):
        inside = start + wide < n
        entries = read(base, start + wide, n, OF_RELU)
        g = tl.load(grad + row * n + start + wide, mask=inside, other=0.0).to(tl.float32)
        if OF_RELU:
            g = tl.where(inside, (g + weight) * entries, 0.0)
        u = tl.abs(distance_of(entries, guess, shift, temperature))
        f = tl.exp(nearest - u)
        totals += f.to(tl.float64)
        weighted += (f * g).to(tl.float64)
    total = tl.sum(totals, 0)
    mean = (tl.sum(weighted, 0) / tl.where(total > 0, total, 1.0)).to(tl.float32)
    tl.store(grad_k + row, mean)
    for start in range(0, n, WIDE):
        inside = start + wide < n
        entries = read(base, start + wide, n, OF_RELU)
        g = tl.load(grad + row * n + start + wide, mask=inside, other=0.0).to(tl.float32)
        u = distance_of(entries, guess, shift, temperature)
        tail = tail_of(u, far)
        if OF_RELU:
            g += weight
            out = tail * (g * entries - mean) / temperature
            out = tl.where(entries > 0, out + g * tl.where(u > 0, 1 - tail, tail), 0.0)
        else:
            out = tail * (g - mean) / temperature
        tl.store(grad_scores + row * n + start + wide, out, mask=inside)
