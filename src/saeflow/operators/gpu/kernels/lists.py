"""Kernels that solve for the threshold of each list, in float64."""

import triton
import triton.language as tl

from saeflow.operators.gpu.kernels.ranks import keys_of, kth_largest, value_of

MOST_STEPS = tl.constexpr(100)


@triton.jit
def power_of(base, exponent):
    """base ** exponent of a base >= 0, 0 where it is 0."""
    positive = tl.where(base > 0, base, 1.0)
    return tl.where(base > 0, tl.exp(exponent * tl.log(positive)), 0.0)


@triton.jit
def simplex_lists(
    values, counts, scales, sizes, p,
    CAPACITY: tl.constexpr, LINEAR: tl.constexpr, SQUARES: tl.constexpr, HAS_SIZES: tl.constexpr,
):  # fmt: skip
    """entmax of alpha = 1 + scale of each list, times its size if HAS_SIZES; LINEAR: alpha 2 (sparsemax), SQUARES: 1.5.

    Newton's method for N(tau) = (sum (e - tau)_+^b)^(1/b) = 1, b = 1 / scale, within a bracket.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, CAPACITY)
    count = tl.load(counts + row)
    inside = at < count
    entries = tl.load(values + row * CAPACITY + at, mask=inside, other=float("-inf"))
    top = tl.max(entries, 0)
    top = tl.where(count > 0, top, 0.0)
    scale = tl.full((), 1.0, tl.float64)
    if not LINEAR:
        scale = tl.load(scales + row)
    e = tl.where(inside, (entries.to(tl.float64) - top.to(tl.float64)) * scale, float("-inf"))
    b = 1.0 / scale
    low = tl.full((), -1.0, tl.float64)
    # The largest entry has p >= 1 / count.
    high = -tl.exp(-scale * tl.log(tl.maximum(count, 1).to(tl.float64)))
    tau, done, step = low, count <= 0, 0
    while (step < MOST_STEPS) & (done == 0):
        excess = tl.where(e > tau, e - tau, 0.0)
        if LINEAR:
            slope = tl.where(excess > 0, 1.0, 0.0).to(tl.float64)
        elif SQUARES:
            slope = excess
        else:
            slope = power_of(excess, b - 1.0)
        total = tl.sum(slope * excess, 0)
        slopes = tl.sum(slope, 0)
        low = tl.where(total >= 1, tau, low)
        high = tl.where(total < 1, tau, high)
        done = (tl.abs(total - 1) <= 1e-13) | (high - low <= 5e-16 * tl.abs(low))
        root = tl.exp((1.0 - scale) * tl.log(tl.where(total > 0, total, 1.0)))
        new = tau + (total - root) / tl.where(slopes > 0, slopes, 1.0)
        new = tl.where((new > low) & (new <= high), new, (low + high) / 2)
        tau = tl.where(done, tau, new)
        step += 1
    excess = tl.where(e > tau, e - tau, 0.0)
    if LINEAR:
        out = excess
    elif SQUARES:
        out = excess * excess
    else:
        out = power_of(excess, b)
    result = out.to(tl.float32)
    if HAS_SIZES:
        result *= tl.load(sizes + row)
    tl.store(p + row * CAPACITY + at, result)


@triton.jit
def sparsemax_gradient_lists(
    results, sizes, grad, out, of_sizes, CAPACITY: tl.constexpr, HAS_SIZES: tl.constexpr
):  # fmt: skip
    """Gradients at the scores and sizes of sparsemax times each list's size, given what that is."""
    row = tl.program_id(0).to(tl.int64)
    at = row * CAPACITY + tl.arange(0, CAPACITY)
    result = tl.load(results + at)
    is_on = result > 0
    g = tl.where(is_on, tl.load(grad + at), 0.0)
    mean = tl.sum(g, 0) / tl.maximum(tl.sum(is_on.to(tl.float32), 0), 1.0)
    found = tl.where(is_on, g - mean, 0.0)
    if HAS_SIZES:
        size = tl.load(sizes + row)
        found *= size
        tl.store(of_sizes + row, tl.sum(g * result, 0) / tl.where(size > 0, size, 1.0))
    tl.store(out + at, found)


@triton.jit
def soft_entries(values, counts, row, CAPACITY: tl.constexpr):
    """Return where the entries of a list lie, which are real, and relu of them, 0 where not real."""
    at = row * CAPACITY + tl.arange(0, CAPACITY)
    inside = tl.arange(0, CAPACITY) < tl.load(counts + row)
    a = tl.load(values + at, mask=inside, other=0.0)
    return at, inside, tl.where(a <= 0, 0.0, a)  # NaN stays


@triton.jit
def soft_mask(distance, far):
    """F of distances in temperatures, and F(-|t|), exactly 0 from far away on."""
    minus = -tl.abs(distance)
    tail = tl.where(minus > -far, tl.exp(minus) / 2, 0.0)
    return tl.where(distance > 0, 1 - tail, tail), tail


@triton.jit
def soft_lists(
    values, counts, ks, temperatures, far, latents, thresholds, CAPACITY: tl.constexpr
):  # fmt: skip
    """v times the soft top-k mask of v, the relu of each list's values; thresholds[r]: b.

    Between two entries the sum of the mask is a quadratic in exp(b), whose root is taken until the same
    entries stay above b. Places are in float64, powers of e relative to the largest in float32.
    """
    row = tl.program_id(0).to(tl.int64)
    at, inside, v = soft_entries(values, counts, row, CAPACITY)
    count = tl.load(counts + row)
    k = tl.load(ks + row).to(tl.float64)
    temperature = tl.load(temperatures).to(tl.float64)
    inverse = 1.0 / temperature
    top = tl.max(v, 0).to(tl.float64)
    x = tl.where(inside, (v.to(tl.float64) - top) * inverse, float("-inf"))
    least = tl.min(tl.where(inside, x, float("inf")), 0)
    lowest = tl.where(count > 0, least, 0.0) - 1000.0
    # A start at the last of the ceil(k) largest: few roots are left to take.
    keys = keys_of(tl.where(inside, v, float("-inf")), 32)
    rank = tl.minimum(tl.ceil(k).to(tl.int32), count)
    last = value_of(kth_largest(keys, rank, 32), 32)
    t = tl.where(rank > 0, (last.to(tl.float64) - top) * inverse, 0.0)
    done, step = count <= 0, 0
    while (step < CAPACITY + 2) & (done == 0):
        u = x - t
        is_above = u > 0
        is_below = inside & (u <= 0)
        number = tl.sum(is_above.to(tl.int32), 0)
        nearest = tl.where(number > 0, tl.min(tl.where(is_above, u, float("inf")), 0), 0.0)
        closest = tl.where(number < count, tl.max(tl.where(is_below, u, float("-inf")), 0), 0.0)
        part = tl.exp(tl.where(is_above, nearest - u, u - closest).to(tl.float32))
        high = tl.sum(tl.where(is_above, part, 0.0), 0)
        rest = tl.sum(tl.where(is_below, part, 0.0), 0)
        log_above = tl.where(
            number > 0, tl.log(tl.where(number > 0, high, 1.0)) - nearest, float("-inf")
        )
        log_below = tl.where(
            number < count, tl.log(tl.where(number < count, rest, 1.0)) + closest, float("-inf")
        )
        extra = number - k
        root = tl.sqrt(extra * extra + tl.exp(log_above + log_below)) + tl.abs(extra)
        log_root = tl.log(tl.where(extra != 0, root, 1.0).to(tl.float32))
        middle = (log_below - log_above) / 2
        move = tl.where(
            extra < 0, log_below - log_root, tl.where(extra > 0, log_root - log_above, middle)
        )
        new = tl.minimum(tl.maximum(t + move, lowest), 1000.0)
        same = tl.sum((x - new > 0).to(tl.int32), 0) == number
        done = same | (tl.abs(new - t) <= 1e-14 * (1 + tl.abs(new)))
        t = new
        step += 1
    mask, _tail = soft_mask((x - t).to(tl.float32), far)
    tl.store(latents + at, v * mask)
    tl.store(thresholds + row, top + temperature * t)


@triton.jit
def soft_gradient_lists(
    values, counts, thresholds, temperatures, far, grad, out, of_k, CAPACITY: tl.constexpr
):  # fmt: skip
    """The gradients of `soft_lists` in values and k, in the latter mean = sum f g / sum f, with g those at the masks."""
    row = tl.program_id(0).to(tl.int64)
    at, inside, v = soft_entries(values, counts, row, CAPACITY)
    inverse = 1.0 / tl.load(temperatures).to(tl.float64)
    distance = ((v.to(tl.float64) - tl.load(thresholds + row)) * inverse).to(tl.float32)
    away = tl.where(inside, tl.abs(distance), float("inf"))
    nearest = tl.min(away, 0)  # f / sum f, also where every f is below float range
    f = tl.where(inside, tl.exp(tl.where(inside, nearest - away, 0.0)), 0.0)
    g = tl.load(grad + at, mask=inside, other=0.0)
    total = tl.sum(f, 0)
    mean = tl.sum(f * (g * v), 0) / tl.where(total > 0, total, 1.0)
    tl.store(of_k + row, mean)
    mask, tail = soft_mask(distance, far)
    slope = tail * inverse.to(tl.float32)
    tl.store(out + at, tl.where(inside & (v > 0), slope * (g * v - mean) + g * mask, 0.0))


@triton.jit
def entries_of_list(values, columns, counts, row, CAPACITY: tl.constexpr):
    """Return where the entries of a list lie, which are real, their values and columns."""
    at = row * CAPACITY + tl.arange(0, CAPACITY)
    inside = tl.arange(0, CAPACITY) < tl.load(counts + row)
    a = tl.load(values + at, mask=inside, other=0.0)
    return at, inside, a, tl.load(columns + at, mask=inside, other=0)


@triton.jit
def over_threshold(values, columns, counts, logs, row, CAPACITY: tl.constexpr):
    """Return where the entries of a list lie, their values, and which are above the threshold of their column, given as its log."""
    at, inside, a, column = entries_of_list(values, columns, counts, row, CAPACITY)
    return at, a, inside & (a > tl.exp(tl.load(logs + column, mask=inside, other=0.0)))


@triton.jit
def jump_lists(values, columns, counts, logs, latents, numbers, CAPACITY: tl.constexpr):
    """latents = values [value > threshold of its column]; numbers[r]: how many of a list."""
    row = tl.program_id(0).to(tl.int64)
    at, a, is_over = over_threshold(values, columns, counts, logs, row, CAPACITY)
    tl.store(latents + at, tl.where(is_over, a, 0.0))
    tl.store(numbers + row, tl.sum(is_over.to(tl.float32), 0))


@triton.jit
def jump_gradient_lists(values, columns, counts, logs, grad, out, CAPACITY: tl.constexpr):
    """out = grad [value > threshold of its column]."""
    row = tl.program_id(0).to(tl.int64)
    at, _a, is_over = over_threshold(values, columns, counts, logs, row, CAPACITY)
    tl.store(out + at, tl.load(grad + at, mask=is_over, other=0.0))


@triton.jit
def jump_gradient_columns(
    values, grad, order, offsets, logs, of_number, out, bandwidth, BLOCK: tl.constexpr
):
    """out: the gradient of the log of each threshold, from the entries within half a bandwidth of it."""
    column = tl.program_id(0)
    begin, end = tl.load(offsets + column), tl.load(offsets + column + 1)
    theta = tl.exp(tl.load(logs + column))
    jumps, steps = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        entry = tl.load(order + at, mask=at < end, other=0)
        a = tl.load(values + entry, mask=at < end, other=0.0)
        is_near = (at < end) & (tl.abs(a - theta) < bandwidth / 2)
        jumps += tl.load(grad + entry, mask=is_near, other=0.0)
        steps += is_near.to(tl.float32)
    total = theta * tl.sum(jumps, 0) + tl.load(of_number) * tl.sum(steps, 0)
    tl.store(out + column, -total / bandwidth * theta)


@triton.jit
def magnitudes_of_list(
    values, columns, counts, biases, rates, shifts, row, CAPACITY: tl.constexpr
):  # fmt: skip
    """Return where the entries of a list lie, their values, which are above 0, their rates and magnitudes."""
    at, inside, a, column = entries_of_list(values, columns, counts, row, CAPACITY)
    rate = tl.exp(tl.load(rates + column, mask=inside, other=0.0))
    u = a - tl.load(biases + column, mask=inside, other=0.0)
    magnitude = u * rate + tl.load(shifts + column, mask=inside, other=0.0)
    return at, a, inside & (a > 0), rate, magnitude


@triton.jit
def gated_lists(
    values, columns, counts, biases, rates, shifts, latents, gate, totals, CAPACITY: tl.constexpr
):  # fmt: skip
    """latents = relu((value - bias) exp(rate) + shift) [value > 0], by the numbers of each entry's column; gate = relu(value), with its sum."""
    row = tl.program_id(0).to(tl.int64)
    at, a, is_on, _rate, magnitude = magnitudes_of_list(
        values, columns, counts, biases, rates, shifts, row, CAPACITY
    )
    tl.store(latents + at, tl.where(is_on & (magnitude > 0), magnitude, 0.0))
    positive = tl.where(is_on, a, 0.0)
    tl.store(gate + at, positive)
    tl.store(totals + row, tl.sum(positive, 0))


@triton.jit
def gated_gradient_lists(
    values, columns, counts, biases, rates, shifts, grad, of_gate, of_total, out, CAPACITY: tl.constexpr
):  # fmt: skip
    """The gradient at the values of what `gated_lists` finds, given those at latents, gate and the sum of all of the gate."""
    row = tl.program_id(0).to(tl.int64)
    at, _a, is_on, rate, magnitude = magnitudes_of_list(
        values, columns, counts, biases, rates, shifts, row, CAPACITY
    )
    through = tl.load(grad + at, mask=is_on & (magnitude > 0), other=0.0) * rate
    through += tl.load(of_gate + at, mask=is_on, other=0.0) + tl.load(of_total)
    tl.store(out + at, tl.where(is_on, through, 0.0))


@triton.jit
def gated_gradient_columns(
    values, grad, order, offsets, biases, rates, shifts, of_bias, of_rate, of_shift,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of each column's bias, rate and shift."""
    column = tl.program_id(0)
    begin, end = tl.load(offsets + column), tl.load(offsets + column + 1)
    bias, shift = tl.load(biases + column), tl.load(shifts + column)
    rate = tl.exp(tl.load(rates + column))
    magnitudes, products = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        entry = tl.load(order + at, mask=at < end, other=0)
        a = tl.load(values + entry, mask=at < end, other=0.0)
        u = a - bias
        is_on = (at < end) & (a > 0) & (u * rate + shift > 0)
        g = tl.load(grad + entry, mask=is_on, other=0.0)
        magnitudes += g
        products += g * u
    magnitude = tl.sum(magnitudes, 0)
    tl.store(of_shift + column, magnitude)
    tl.store(of_bias + column, -rate * magnitude)
    tl.store(of_rate + column, rate * tl.sum(products, 0))
