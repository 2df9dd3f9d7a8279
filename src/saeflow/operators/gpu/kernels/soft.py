"""Kernels of the soft top-k of whole rows, of any width, which are read in chunks: while it is hot, all
entries have a share. Exponentials are in float32, as powers of 2, their sums in float64, but of some."""

import triton
import triton.language as tl

from saeflow.operators.gpu.kernels.ranks import keys_of, kth_largest, value_of

MOST_STEPS = tl.constexpr(150)
FIRST_STEPS = tl.constexpr(2)  # among the lanes' largest entries
AHEAD = tl.constexpr(4)  # chunks whose loads do not wait for each other
SPAN = tl.constexpr(
    32
)  # entries of a lane that are summed in float32 before they are added in float64
ENOUGH = tl.constexpr(1e-7)  # of k: what a sum in float32 of so few leaves undecided
NEVER = tl.constexpr(float("-inf"))
LOG2_E = tl.constexpr(1.4426950408889634)
MOST = tl.constexpr(2e38)  # near the largest float32: 1 / temperature is no more


@triton.jit
def read(base, at, n, OF_RELU: tl.constexpr):
    """Entries of a row as float32, or relu of them; -inf outside it."""
    inside = at < n
    entries = tl.load(base + at, mask=inside, other=NEVER).to(tl.float32)
    if OF_RELU:
        entries = tl.where(inside, tl.maximum(entries, 0.0), NEVER)
    return entries


@triton.jit
def distance_of(values, guess, rate, offset):
    """(values - b) times a rate; near b the first difference is exact, whatever b's size. `offset`: the shift times the rate."""
    return (values - guess) * rate - offset


@triton.jit
def tail_of(half, far):
    """F(-|t|), exactly 0 from far away on, of distances and a limit times log2(e) / 2: so its root is a normal float."""
    minus = -tl.abs(half)
    root = tl.exp2(minus)
    return tl.where(minus > -far, 0.5 * root * root, 0.0)


@triton.jit
def shares_of(entries, guess, rate, offset):
    """Return which entries are above b (1 or 0), and exp(-|t|) of these, and of the others, 0 elsewhere."""
    u = distance_of(entries, guess, rate, offset)
    part = tl.exp2(-tl.abs(u))
    return (u > 0).to(tl.int32), tl.where(u > 0, part, 0.0), tl.where(u > 0, 0.0, part)


@triton.jit
def sums_of(base, guess, rate, offset, n, OF_RELU: tl.constexpr, WIDE: tl.constexpr):
    """() float64 each: how many entries of a row are above b, and the sums of exp(-|t|) of these and of the others."""
    wide = tl.arange(0, WIDE)
    over = tl.zeros((WIDE,), tl.int32)
    highs, rests = tl.zeros((WIDE,), tl.float64), tl.zeros((WIDE,), tl.float64)
    for first in range(0, n, SPAN * WIDE):
        some_highs, some_rests = tl.zeros((WIDE,), tl.float32), tl.zeros((WIDE,), tl.float32)
        for start in range(first, tl.minimum(first + SPAN * WIDE, n), AHEAD * WIDE):
            for chunk in tl.static_range(AHEAD):
                entries = read(base, start + chunk * WIDE + wide, n, OF_RELU)
                is_above, high, rest = shares_of(entries, guess, rate, offset)
                over += is_above
                some_highs += high
                some_rests += rest
        highs += some_highs.to(tl.float64)
        rests += some_rests.to(tl.float64)
    return tl.sum(over, 0).to(tl.float64), tl.sum(highs, 0), tl.sum(rests, 0)


@triton.jit
def root_of(above, sum_above, sum_below, k):
    """exp of the way from b to the root of the quadratic, in temperatures, and whether there is one; the excess of the mask's sum at b."""
    extra = above - k
    root = tl.sqrt(extra * extra + sum_above * sum_below)
    is_up = extra > 0
    over, under = tl.where(is_up, root + extra, sum_below), tl.where(is_up, sum_above, root - extra)
    can = (over > 0) & (under > 0)
    ratio = tl.where(can, over, 1.0) / tl.where(can, under, 1.0)
    return ratio, can, extra - sum_above / 2 + sum_below / 2


@triton.jit
def middle_of_gap(base, origin, b, inverse, n, OF_RELU: tl.constexpr, WIDE: tl.constexpr):
    """() what is missing from b, in temperatures, to (log D - log A) / 2, in sums relative to their largest."""
    wide = tl.arange(0, WIDE)
    guess, offset = origin.to(tl.float32), b.to(tl.float32) * inverse
    over = tl.full((WIDE,), float("inf"), tl.float32)
    under = tl.full((WIDE,), NEVER, tl.float32)
    for start in range(0, n, WIDE):
        u = distance_of(read(base, start + wide, n, OF_RELU), guess, inverse, offset)
        over = tl.minimum(over, tl.where(u > 0, u, float("inf")))
        under = tl.maximum(under, tl.where(u > 0, NEVER, u))
    nearest, closest = tl.min(over, 0), tl.max(under, 0)
    highs, rests = tl.zeros((WIDE,), tl.float64), tl.zeros((WIDE,), tl.float64)
    for start in range(0, n, WIDE):
        u = distance_of(read(base, start + wide, n, OF_RELU), guess, inverse, offset)
        highs += tl.exp(tl.where(u > 0, nearest - u, NEVER)).to(tl.float64)
        rests += tl.exp(tl.where(u > 0, NEVER, u - closest)).to(tl.float64)
    log_above = tl.log(tl.sum(highs, 0)) - nearest.to(tl.float64)
    log_below = tl.log(tl.sum(rests, 0)) + closest.to(tl.float64)
    return (log_below - log_above) / 2


@triton.jit
def soft_rows(
    scores, ks, temperatures, far, mask, guesses, shifts, nears, problems, sums, n,
    OF_RELU: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The soft top-k mask of each row; b is a float (guess) plus a shift; nears[b]: the least |t| times log2(e).

    OF_RELU: of relu of the scores, times that, and its sum (sums[b]); NaN where the row has a problem, or k is not in
    0..n.

    At any b between the same two entries the sum of the mask is a quadratic in exp(b), whose root is
    taken within a bracket. problems[b]: 1 a NaN or inf, 2 fewer finite entries than k.
    """
    row = tl.program_id(0).to(tl.int64)
    base = scores + row * n
    wide = tl.arange(0, WIDE)
    k = tl.load(ks + row).to(tl.float64)
    temperature = tl.load(temperatures)
    inverse = tl.minimum(1.0 / temperature, MOST)
    rate = inverse * LOG2_E
    largest = tl.full((WIDE,), NEVER, tl.float32)
    least = tl.full((WIDE,), float("inf"), tl.float32)
    finite = tl.zeros((WIDE,), tl.int32)
    for start in range(0, n, WIDE):
        entries = read(base, start + wide, n, False)
        largest = tl.maximum(largest, entries, propagate_nan=tl.PropagateNan.ALL)
        if not OF_RELU:
            least = tl.minimum(least, tl.where(entries > NEVER, entries, float("inf")))
            finite += (entries > NEVER).to(tl.int32)
    is_bad = (largest != largest) | (largest == float("inf"))
    if OF_RELU:  # whose entries are all finite, and 0 at least
        largest = tl.where(wide < n, tl.maximum(largest, 0.0), NEVER)
        count, lowest = n, tl.full((), 0.0, tl.float32)
    else:
        count, lowest = tl.sum(finite, 0), tl.min(least, 0)
    problem = tl.where(tl.max(is_bad.to(tl.int32), 0) > 0, 1, tl.where(count < tl.ceil(k), 2, 0))
    tl.store(problems + row, problem)
    t = temperature.to(tl.float64)
    lowest = tl.where(problem > 0, 0.0, lowest.to(tl.float64))
    highest = tl.where(problem > 0, 0.0, tl.max(largest, 0).to(tl.float64))
    # Places are relative to a float, the origin, so that they are exact near b, whatever its size. With
    # k = 0, or k of every entry, b is infinite, and any b this far gives the same mask.
    origin = tl.where(k >= count, lowest, highest)
    low, high = lowest - origin - 1000 * t, highest - origin + 1000 * t
    # The k-th largest of the lanes' maxima is near b, and their own soft top-k nearer: from there few roots are left.
    rank = tl.ceil(k).to(tl.int32)
    near = value_of(kth_largest(keys_of(largest, 16), rank, 16), 16)
    near = tl.where(near > NEVER, near, lowest.to(tl.float32))
    for _step in range(FIRST_STEPS):
        is_above, highs, rests = shares_of(largest, near, rate, 0.0)
        above = tl.sum(is_above, 0).to(tl.float32)
        ratio, _can, _excess = root_of(above, tl.sum(highs, 0), tl.sum(rests, 0), k.to(tl.float32))
        near += temperature * tl.log(ratio)
    b = tl.minimum(tl.maximum(near.to(tl.float64), lowest), highest) - origin
    b = tl.where(k <= 0, high, tl.where(k >= count, low, b))
    done, step = (problem > 0) | (k <= 0) | (k >= count), 0
    last = tl.full((), float("inf"), tl.float64)
    is_gap = False
    while (step < MOST_STEPS) & (done == 0):
        guess = (origin + b).to(tl.float32)
        moved = origin - guess.to(tl.float64)
        origin, b, low, high = origin - moved, b + moved, low + moved, high + moved
        offset = b.to(tl.float32) * rate
        above, sum_above, sum_below = sums_of(base, guess, rate, offset, n, OF_RELU, WIDE)
        ratio, can, excess = root_of(above, sum_above, sum_below, k)
        low = tl.where(excess >= 0, b, low)
        high = tl.where(excess <= 0, b, high)
        # A root that lies beyond many entries is far from theirs: then the bracket is halved.
        can = can & (tl.abs(excess) <= 0.5 * last)
        last = tl.abs(excess)
        way = tl.log(ratio)
        new = b + t * way
        can = can & (new > low) & (new < high)
        new = tl.where(can, new, (low + high) / 2)
        is_gap = (above == k) & ((sum_above == 0) | (sum_below == 0))
        is_there = (tl.abs(excess) <= k * ENOUGH) | (tl.abs(new - b) <= 1e-9 * t)
        # Each entry between b and a root so near adds less than way^2 to the excess there, and they are fewer than the sums.
        is_next = can & (tl.abs(way) <= 0.5) & (way * way * (sum_above + sum_below) <= k * ENOUGH)
        done = is_there | is_next
        b = tl.where(is_there, b, new)
        step += 1
    if is_gap:  # b lies so far from every entry that their shares are below float range
        b += t * middle_of_gap(base, origin, b, inverse, n, OF_RELU, WIDE)
    guess = (origin + b).to(tl.float32)
    shift = (b + (origin - guess.to(tl.float64))).to(tl.float32)
    tl.store(guesses + row, guess)
    tl.store(shifts + row, shift)
    half, limit = rate / 2, far * (LOG2_E / 2)
    offset = shift * half
    wrong = tl.where((problem > 0) | (k < 0) | (k > n), float("nan"), 0.0)
    nearest = tl.full((WIDE,), float("inf"), tl.float32)
    added = tl.zeros((WIDE,), tl.float32)
    for start in range(0, n, WIDE):
        inside = start + wide < n
        entries = read(base, start + wide, n, OF_RELU)
        u = distance_of(entries, guess, half, offset)
        nearest = tl.minimum(nearest, tl.abs(u))
        tail = tail_of(u, limit)
        share = tl.where(u > 0, 1 - tail, tail)
        if OF_RELU:
            share = share * entries + wrong
            added += tl.where(inside, share, 0.0)
        tl.store(mask + row * n + start + wide, share, mask=inside)
    tl.store(nears + row, 2 * tl.min(nearest, 0))
    if OF_RELU:
        tl.store(sums + row, tl.sum(added, 0))


@triton.jit
def soft_gradient_rows(
    scores, grad, guesses, shifts, nears, temperatures, far, grad_scores, grad_k, of_sum, n,
    OF_RELU: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradients of `soft_rows` in scores and k: f (g - mean) and mean = sum f g / sum f; of_sum: at all sums."""
    row = tl.program_id(0).to(tl.int64)
    base = scores + row * n
    wide = tl.arange(0, WIDE)
    inverse = tl.minimum(1.0 / tl.load(temperatures), MOST)
    rate = inverse * LOG2_E
    guess, shift = tl.load(guesses + row), tl.load(shifts + row)
    weight = 0.0
    if OF_RELU:
        weight = tl.load(of_sum)
    nearest = tl.load(nears + row)  # f / sum f, also where every f is below float range
    nearest = tl.where(nearest < float("inf"), nearest, 0.0)
    offset = shift * rate
    totals = tl.zeros((WIDE,), tl.float64)
    weighted = tl.zeros((WIDE,), tl.float64)
    for first in range(0, n, SPAN * WIDE):
        some, some_weighted = tl.zeros((WIDE,), tl.float32), tl.zeros((WIDE,), tl.float32)
        for start in range(first, tl.minimum(first + SPAN * WIDE, n), WIDE):
            inside = start + wide < n
            entries = read(base, start + wide, n, OF_RELU)
            g = tl.load(grad + row * n + start + wide, mask=inside, other=0.0).to(tl.float32)
            if OF_RELU:
                g = tl.where(inside, (g + weight) * entries, 0.0)
            f = tl.exp2(nearest - tl.abs(distance_of(entries, guess, rate, offset)))
            some += f
            some_weighted += f * g
        totals += some.to(tl.float64)
        weighted += some_weighted.to(tl.float64)
    total = tl.sum(totals, 0)
    mean = (tl.sum(weighted, 0) / tl.where(total > 0, total, 1.0)).to(tl.float32)
    tl.store(grad_k + row, mean)
    half, limit = rate / 2, far * (LOG2_E / 2)
    offset = shift * half
    for start in range(0, n, WIDE):
        inside = start + wide < n
        entries = read(base, start + wide, n, OF_RELU)
        g = tl.load(grad + row * n + start + wide, mask=inside, other=0.0).to(tl.float32)
        u = distance_of(entries, guess, half, offset)
        tail = tail_of(u, limit)
        if OF_RELU:
            g += weight
            out = tail * inverse * (g * entries - mean)
            out = tl.where(entries > 0, out + g * tl.where(u > 0, 1 - tail, tail), 0.0)
        else:
            out = tail * inverse * (g - mean)
        tl.store(grad_scores + row * n + start + wide, out, mask=inside)
