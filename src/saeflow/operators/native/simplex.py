"""Kernels of sparsemax and entmax: one threshold a row, solved in float64 on the entries that count."""

import numpy as np
from numba import njit

from saeflow.operators.native.selection import fill_maxima, gather_from

jit = njit(nogil=True, error_model="numpy", cache=True)
GROUPS = 256
FINE, HAS_NAN, HAS_INF, IS_EMPTY = 0, 1, 2, 3


@jit
def scaled(values, count, top, scale, out):
    """(values - top) * scale in float64, those above -1: no other can have a probability."""
    kept = 0
    for i in range(count):
        entry = (np.float64(values[i]) - top) * scale
        out[kept] = entry
        kept += entry > -1.0
    return kept


@jit
def sparsemax_tau(entries, count, tau):
    """tau with sum max(entries - tau, 0) = 1, from a lower bound on; drops entries at or below it."""
    before = -1
    while True:
        kept, total = 0, 0.0
        for i in range(count):
            entry = entries[i]
            entries[kept] = entry
            if entry > tau:
                total += entry
                kept += 1
        if kept == before or kept == 0:
            return tau
        before = count = kept
        tau = max(tau, (total - 1.0) / kept)


@jit
def entmax_tau(entries, count, scale, low):
    """tau with sum max(entries - tau, 0)^(1 / scale) = 1, in a bracket from a lower bound on."""
    power = 1.0 / scale
    high = -(np.float64(count) ** -scale)
    tau = low
    for _ in range(1100):  # bisection alone takes the bracket this far; Newton needs about ten
        total, slope = 0.0, 0.0
        for i in range(count):
            excess = entries[i] - tau
            if excess > 0.0:
                part = (
                    excess if power == 2.0 else (1.0 if power == 1.0 else excess ** (power - 1.0))
                )
                slope += part
                total += part * excess
        if total >= 1.0:
            low = tau
        else:
            high = tau
        if abs(total - 1.0) <= 1e-13 or high - low <= 5e-16 * abs(low):
            return tau
        step = tau + (total - total ** (1.0 - scale)) / slope if slope > 0.0 else low
        tau = step if low < step <= high else (low + high) / 2.0
    return tau


@jit
def solve(entries, count, scale, low):
    if scale == 1.0:
        return sparsemax_tau(entries, count, low)
    return entmax_tau(entries, count, scale, low)


@jit
def row_support(row, scale, maxima, hits, values, columns, entries, state):
    """The row's entries that can have a probability, first in `values`; returns their number.

    state: what is wrong with the row, its maximum, tau of the scaled entries relative to it.
    """
    groups = min(GROUPS, len(row))
    has_nan = fill_maxima(row, maxima, groups)
    top = np.float64(maxima[:groups].max())
    state[0] = (
        HAS_NAN if has_nan else HAS_INF if top == np.inf else IS_EMPTY if top == -np.inf else FINE
    )
    if state[0] != FINE:
        return 0
    count = scaled(maxima, groups, top, scale, entries)
    low = solve(entries, count, scale, -1.0)  # tau of a part of the row is at most that of all
    floor = np.float32(top + (low - 1e-12) / scale)
    count = gather_from(
        row, maxima, groups, np.nextafter(floor, np.float32(-np.inf)), hits, values, columns
    )
    kept = scaled(values, count, top, scale, entries)
    state[1], state[2] = top, solve(entries, kept, scale, low)
    return count


@jit
def probability(value, top, tau, scale):
    excess = (np.float64(value) - top) * scale - tau
    if excess <= 0.0:
        return np.float32(0)
    if scale == 1.0:
        return np.float32(excess)
    return np.float32(excess * excess if scale == 0.5 else excess ** (1.0 / scale))


@jit
def dense_rows(rows, scales, p, start, stop):
    """Probabilities of whole rows; returns (first bad row or -1, what is wrong with it)."""
    n = rows.shape[1]
    maxima, values = np.empty(GROUPS, np.float32), np.empty(n + 1, np.float32)
    hits, columns = np.empty(GROUPS + 1, np.int32), np.empty(n + 1, np.int32)
    entries, state = np.empty(n + 1, np.float64), np.empty(3, np.float64)
    for r in range(start, stop):
        scale = scales[r]
        count = row_support(rows[r], scale, maxima, hits, values, columns, entries, state)
        if state[0] != FINE:
            return r, int(state[0])
        p[r] = 0
        for i in range(count):
            p[r, columns[i]] = probability(values[i], state[1], state[2], scale)
    return -1, FINE


@jit
def support_rows(rows, scales, counts, slots, start, stop):
    """Columns with a probability above 0, from the start of each row's slots (rows, most).

    Returns as `dense_rows`; row -2 if a row had more than `most`.
    """
    n, most = rows.shape[1], slots.shape[1]
    maxima, values = np.empty(GROUPS, np.float32), np.empty(n + 1, np.float32)
    hits, columns = np.empty(GROUPS + 1, np.int32), np.empty(n + 1, np.int32)
    entries, state = np.empty(n + 1, np.float64), np.empty(3, np.float64)
    for r in range(start, stop):
        count = row_support(rows[r], scales[r], maxima, hits, values, columns, entries, state)
        if state[0] != FINE:
            return r, int(state[0])
        kept = 0
        for i in range(count):
            if probability(values[i], state[1], state[2], scales[r]) > 0:
                if kept == most:
                    return -2, FINE
                slots[r, kept] = columns[i]
                kept += 1
        counts[r] = kept
    return -1, FINE


@jit
def pack(rows, slots, offsets, columns, values):
    """The used slots of each row, one after the other, and the row's entries there."""
    for r in range(len(rows)):
        for at in range(offsets[r], offsets[r + 1]):
            columns[at] = slots[r, at - offsets[r]]
            values[at] = rows[r, columns[at]]
