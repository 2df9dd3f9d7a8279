"""Kernels of the soft top-k: b is solved for in float64 near it, the rest of the row acts as one sum."""

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from saeflow.operators.native.selection import fill_maxima, gather_from, group_count, kth_largest

jit = njit(nogil=True, error_model="numpy", cache=True)
fast = njit(nogil=True, error_model="numpy", cache=True, fastmath={"reassoc", "contract", "nsz"})
FAR = np.float32(30)  # temperatures from b at which the mask counts as 0 or 1
SMALLEST = np.float32(math.exp(-30) * 0.50001)
CHUNK = 256
FINE, NOT_FINITE, ABSENT = 0, 1, 2

LOG2E, HALF = np.float32(1.4426950408889634), np.float32(0.5)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
C2, C3, C4, C5, C6, C7 = (
    np.float32(c)
    for c in (5.0000001201e-1, 1.6666665459e-1, 4.1665795894e-2, 8.3334519073e-3, 1.3981999507e-3, 1.9875691500e-4)
)  # fmt: skip


@intrinsic
def power_of_two(context, exponent):
    """2 ** exponent, for int32 exponents in -126..127, by the bits of a float32."""

    def generate(context, builder, signature, arguments):
        word = ir.IntType(32)
        biased = builder.add(arguments[0], ir.Constant(word, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(word, 23)), ir.FloatType())

    return types.float32(types.int32), generate


@jit
def exp(x):
    """e ** x of float32 in -87..0 within 2e-7 of its value, in a form that vectorises (Cephes).

    Callers must not be `fast`: a function is compiled with the flags of the first that calls it.
    """
    power = np.int32(x * LOG2E - HALF)
    whole = np.float32(power)
    x = (x - whole * LN2_HIGH) - whole * LN2_LOW
    y = ((((C7 * x + C6) * x + C5) * x + C4) * x + C3) * x + C2
    return (y * x * x + x + np.float32(1)) * power_of_two(power)


@fast
def total_of(part):
    """Sum of a short part of a row."""
    total = np.float32(0)
    for i in range(len(part)):
        total += part[i]
    return total


@fast
def dot(left, right):
    """Inner product of short parts of rows."""
    total = np.float32(0)
    for i in range(len(left)):
        total += left[i] * right[i]
    return total


@jit
def sum_below(row, floor, temperature, out):
    """out = e ** ((row - floor) / temperature), 0 from the floor on and far below; its sum."""
    total = 0.0
    for low in range(0, len(row), CHUNK):
        part, to = row[low : low + CHUNK], out[low : low + CHUNK]
        for i in range(len(part)):
            t = (part[i] - floor) / temperature
            is_far = t < -FAR
            e = exp(-FAR if is_far else (t if t < np.float32(0) else np.float32(0)))
            to[i] = np.float32(0) if is_far or part[i] >= floor else e
        total += total_of(to)
    return total


@jit
def solve(x, count, k, log_rest):
    """t with sum F(x - t) + exp(log_rest - t) / 2 = k, starting at 0.

    Between two neighbouring entries the sum is, in exp(t), a quadratic with one positive root, taken
    without cancellation; the root of one interval never overshoots the solution.
    """
    t = 0.0
    for _ in range(count + 2):
        above, least, most = 0, np.inf, log_rest - t
        for i in range(count):
            u = x[i] - t
            if u > 0:
                above += 1
                least = min(least, u)
            else:
                most = max(most, u)
        sum_above, sum_below = 0.0, 0.0
        for i in range(count):
            u = x[i] - t
            if u > 0:
                sum_above += math.exp(least - u)
            else:
                sum_below += math.exp(u - most)
        log_above = math.log(sum_above) - least if above else -np.inf
        if most > -np.inf:
            if log_rest > -np.inf:
                sum_below += math.exp(log_rest - t - most)
            log_below = math.log(sum_below) + most
        else:
            log_below = -np.inf
        extra = above - k  # mask in excess if all entries were at 0 or 1
        root = math.sqrt(extra * extra + math.exp(log_above + log_below))
        if extra < 0:
            step = log_below - math.log(root - extra)
        elif extra > 0:
            step = math.log(root + extra) - log_above
        else:
            step = (log_below - log_above) / 2
        t += step
        if not abs(step) > 1e-14 * (1 + abs(t)):
            break
        still = 0
        for i in range(count):
            still += x[i] > t
        if still == above:
            break
    lowest, highest = np.inf, -np.inf
    for i in range(count):
        highest = max(highest, x[i])
        if x[i] > -np.inf:
            lowest = min(lowest, x[i])
    return min(max(t, lowest - 800.0), highest + 800.0)


@jit
def mask_rows(rows, ks, temperature, mask, guesses, offsets, start, stop):
    """The mask, and b of each row as an entry plus an offset.

    Returns (first bad row or -1, what is wrong with it).
    """
    n = rows.shape[1]
    maxima, scratch = np.empty(n + 1, np.float32), np.empty(n + 1, np.float32)
    values, x = np.empty(n + 1, np.float32), np.empty(n + 1, np.float64)
    hits, columns = np.empty(n + 1, np.int32), np.empty(n + 1, np.int32)
    for r in range(start, stop):
        row, k, out = rows[r], ks[r], mask[r]
        rank = np.int64(max(math.ceil(k), 1))
        groups = group_count(n, 2 * rank)
        if fill_maxima(row, maxima, groups) or maxima[:groups].max() == np.inf:
            return r, NOT_FINITE
        floor = np.float32(-np.inf)
        if 2 * rank <= groups:
            scratch[:groups] = maxima[:groups]
            floor = kth_largest(scratch, groups, 2 * rank)
        far = floor - FAR * temperature
        near = 0
        for g in range(groups):
            near += maxima[g] > far
        is_sparse = floor == -np.inf or 4 * near <= groups
        bound = far if is_sparse and floor > -np.inf else floor
        if bound == -np.inf:
            bound = np.float32(-3.4e38)  # -inf is no candidate
        count = gather_from(row, maxima, groups, bound, hits, values, columns)
        if count < rank:
            return r, ABSENT
        scratch[:count] = values[:count]
        guess = kth_largest(scratch, count, rank)
        for i in range(count):
            x[i] = (np.float64(values[i]) - guess) / temperature
        log_rest, rest = -np.inf, 0.0
        if is_sparse:
            out[:] = 0
        else:
            rest = sum_below(row, bound, temperature, out)
            if rest > 0:
                log_rest = math.log(rest) + (np.float64(bound) - guess) / temperature
        offset = np.float32(temperature * solve(x, count, k, log_rest))
        guesses[r], offsets[r] = guess, offset
        if rest > 0:
            half = ((np.float64(bound) - guess) - offset) / temperature
            half = np.float32(0.5 * math.exp(max(half, -200.0)))
            for i in range(n):
                p = out[i] * half
                out[i] = p if p > SMALLEST else np.float32(0)
        for i in range(count):
            t = ((values[i] - guess) - offset) / temperature
            tail = exp(-min(abs(t), FAR)) * HALF
            tail = tail if abs(t) < FAR else np.float32(0)
            out[columns[i]] = np.float32(1) - tail if t > 0 else tail
    return -1, FINE


@jit
def weigh(row, grad, guess, offset, temperature, peak, out):
    """out = e ** (-|row - b| / temperature + peak); its sum, and that of its product with grad."""
    total, weighted = 0.0, 0.0
    for low in range(0, len(row), CHUNK):
        part, to = row[low : low + CHUNK], out[low : low + CHUNK]
        for i in range(len(part)):
            t = peak - abs((part[i] - guess) - offset) / temperature
            is_far = t < -FAR
            e = exp(-FAR if is_far else (t if t < np.float32(0) else np.float32(0)))
            to[i] = np.float32(0) if is_far else e
        total += total_of(to)
        weighted += dot(to, grad[low : low + CHUNK])
    return total, weighted


@jit
def gradient_rows(rows, grad, guesses, offsets, temperature, grad_rows, grad_k, start, stop):
    """Gradients of values and k: f (g - mean) and mean, the mean weighted by f = F' / temperature."""
    n = rows.shape[1]
    for r in range(start, stop):
        row, out, guess, offset = rows[r], grad_rows[r], guesses[r], offsets[r]
        peak = np.float32(np.inf)
        for i in range(n):
            peak = min(peak, abs((row[i] - guess) - offset) / temperature)
        total, weighted = weigh(row, grad[r], guess, offset, temperature, peak, out)
        mean = np.float32(weighted / total)
        half = np.float32(0.5 * math.exp(-np.float64(peak)))
        for i in range(n):
            tail = out[i] * half
            tail = tail if tail > SMALLEST else np.float32(0)
            out[i] = tail * (grad[r, i] - mean) / temperature
        grad_k[r] = mean
    return 0
