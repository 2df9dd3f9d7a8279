"""Selection kernels: the k largest of a row, of a batch, and the entries above a threshold.

A row is read once from memory. The maxima of strided groups of its entries bound the k-th largest from
below; only groups that reach the bound are looked at again, while the row is still in the cache.
"""

import numpy as np
from numba import njit

jit = njit(nogil=True, error_model="numpy", cache=True)
MANY, BINS = 300, 2048  # entries worth a histogram, and its bins: 11 leading bits
SPREAD = 12  # groups per kept entry: more make the bound tighter, and take longer to search


@jit
def leading_bits(bits):
    """0..BINS - 1 of a float32's bits, in the order of the floats."""
    return ((bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))) >> np.int32(21)) + np.int32(1024)


@jit
def kth_largest(entries, count, k):
    """The k-th largest (k >= 1) of entries[:count], none of them NaN, which are overwritten.

    Many entries are first cut down to those of one bin of their leading bits.
    """
    if count > MANY:
        bits = entries.view(np.int32)
        bins = np.zeros(BINS, np.int32)
        for i in range(count):
            bins[leading_bits(bits[i])] += 1
        chosen, above = BINS - 1, 0
        while above + bins[chosen] < k:
            above += bins[chosen]
            chosen -= 1
        kept = 0
        for i in range(count):
            entry = entries[i]
            is_chosen = leading_bits(bits[i]) == chosen
            entries[kept] = entry
            kept += is_chosen
        count, k = kept, k - above
    low, high, at = 0, count - 1, k - 1
    while low < high:
        middle = (low + high) >> 1
        if entries[middle] > entries[low]:
            entries[middle], entries[low] = entries[low], entries[middle]
        if entries[high] > entries[low]:
            entries[high], entries[low] = entries[low], entries[high]
        if entries[high] > entries[middle]:
            entries[high], entries[middle] = entries[middle], entries[high]
        pivot = entries[middle]
        left, right = low, high
        while left <= right:
            while entries[left] > pivot:
                left += 1
            while entries[right] < pivot:
                right -= 1
            if left <= right:
                entries[left], entries[right] = entries[right], entries[left]
                left += 1
                right -= 1
        if at <= right:
            high = right
        elif at >= left:
            low = left
        else:
            break
    return entries[at]


@jit
def group_count(n, k):
    """Groups of a row of n for a bound on its k-th largest; n where groups are of no use."""
    groups = max(64, SPREAD * k)
    return groups if 3 * groups <= n else n


@jit
def fill_maxima(row, maxima, groups):
    """Maxima of the columns g, g + groups, g + 2 groups, ...; True if the row holds NaN."""
    maxima[:groups] = row[:groups]
    has_nan = 0
    for low in range(0, len(row), groups):
        layer = row[low : low + groups]
        for g in range(len(layer)):
            value = layer[g]
            maxima[g] = maxima[g] if maxima[g] >= value else value
            has_nan |= value != value
    return has_nan != 0


@jit
def gather_from(row, maxima, groups, floor, hits, values, columns):
    """The entries at or above the floor and their columns, ascending; returns their number."""
    found = 0
    for g in range(groups):
        hits[found] = g
        found += maxima[g] >= floor
    n, count = len(row), 0
    for low in range(0, n, groups):
        for h in range(found):
            column = low + hits[h]
            if column < n:
                values[count] = row[column]
                columns[count] = column
                count += row[column] >= floor
    return count


@jit
def bound(maxima, groups, k, guess, scratch):
    """The k-th largest maximum, searched first among those above a guess."""
    count = 0
    for g in range(groups):
        scratch[count] = maxima[g]
        count += maxima[g] >= guess
    if count < k:
        scratch[:groups] = maxima[:groups]
        count = groups
    return kth_largest(scratch, count, k)


@jit
def topk_rows(rows, k, ends, columns, kept, start, stop):
    """Columns and values of the k[r] largest entries of each row, ties to the lower, before ends[r].

    Returns the first row that holds NaN, or -1.
    """
    n = rows.shape[1]
    maxima, scratch = np.empty(n + 1, np.float32), np.empty(n + 1, np.float32)
    hits, found = np.empty(n + 1, np.int32), np.empty(n + 1, np.int32)
    values = np.empty(n + 1, np.float32)
    guess = np.float32(-np.inf)
    for r in range(start, stop):
        row, wanted = rows[r], k[r]
        groups = group_count(n, wanted)
        if fill_maxima(row, maxima, groups):
            return r
        if wanted == 0:
            continue
        floor = bound(maxima, groups, wanted, guess, scratch)
        guess = floor - np.float32(0.2) * (maxima[:groups].max() - floor)
        at = ends[r] - wanted
        if groups == n:  # the bound is the k-th largest itself
            ties = wanted
            for i in range(n):
                ties -= row[i] > floor
            for i in range(n):
                if at == ends[r]:
                    break
                columns[at], kept[at] = i, row[i]  # overwritten if not kept: no branch to miss
                is_tie = (row[i] == floor) & (ties > 0)
                ties -= is_tie
                at += (row[i] > floor) | is_tie
            continue
        count = gather_from(row, maxima, groups, floor, hits, values, found)
        scratch[:count] = values[:count]
        threshold = kth_largest(scratch, count, wanted)
        ties = wanted
        for i in range(count):
            ties -= values[i] > threshold
        for i in range(count):
            if values[i] > threshold or (values[i] == threshold and ties > 0):
                ties -= values[i] == threshold
                columns[at], kept[at] = found[i], values[i]
                at += 1
    return -1


@jit
def sample_maxima(rows, groups, every, maxima):
    """Group maxima of every so many rows, into (samples, groups)."""
    for sample in range(len(maxima)):
        fill_maxima(rows[sample * every], maxima[sample], groups)


@jit
def rows_from(rows, groups, floor, room, counts, begins, values, columns, start, stop):
    """Each row's entries at or above one floor; rows `start` to `stop` share `room` for each of them.

    Returns the first row that holds NaN; -1 if none; -2 if the room was too small.
    """
    n = rows.shape[1]
    maxima, hits = np.empty(groups, np.float32), np.empty(groups + 1, np.int32)
    of_row, found = np.empty(n + 1, np.float32), np.empty(n + 1, np.int32)
    at = start * room
    for r in range(start, stop):
        if fill_maxima(rows[r], maxima, groups):
            return r
        count = gather_from(rows[r], maxima, groups, floor, hits, of_row, found)
        if at + count > stop * room:
            return -2
        values[at : at + count], columns[at : at + count] = of_row[:count], found[:count]
        begins[r], counts[r] = at, count
        at += count
    return -1


@jit
def batch_largest(total, counts, begins, values, columns, ends, chosen, kept):
    """The `total` largest of all gathered entries, ties to the lower row and column.

    Columns and values of row r go to chosen and kept, up to ends[r + 1]. Returns False if too few were gathered.
    """
    gathered = counts.sum()
    if gathered < total:
        return False
    everything = np.empty(gathered, np.float32)
    at = 0
    for r in range(len(counts)):
        everything[at : at + counts[r]] = values[begins[r] : begins[r] + counts[r]]
        at += counts[r]
    threshold = kth_largest(everything, gathered, total)
    ties = total
    for r in range(len(counts)):
        for i in range(begins[r], begins[r] + counts[r]):
            ties -= values[i] > threshold
    at = 0
    for r in range(len(counts)):
        for i in range(begins[r], begins[r] + counts[r]):
            if values[i] > threshold or (values[i] == threshold and ties > 0):
                ties -= values[i] == threshold
                chosen[at], kept[at] = columns[i], values[i]
                at += 1
        ends[r + 1] = at
    return True


CHUNK = 64


@jit
def any_above(part, threshold):
    """Return whether any entry exceeds its threshold."""
    some = 0
    for i in range(len(part)):
        some |= part[i] > threshold[i]
    return some != 0


@jit
def count_above(rows, threshold, counts, start, stop):
    """Count the entries of each row above their column's threshold."""
    for r in range(start, stop):
        count = 0
        for low in range(0, rows.shape[1], CHUNK):
            part, limits = rows[r, low : low + CHUNK], threshold[low : low + CHUNK]
            if any_above(part, limits):
                for i in range(len(part)):
                    count += part[i] > limits[i]
        counts[r] = count


@jit
def columns_above(rows, threshold, offsets, columns, values, start, stop):
    """Columns and values of the entries that exceed their column's threshold, from offsets[r] on."""
    for r in range(start, stop):
        at, end = offsets[r], offsets[r + 1]
        for low in range(0, rows.shape[1], CHUNK):
            if at == end:
                break
            part, limits = rows[r, low : low + CHUNK], threshold[low : low + CHUNK]
            if any_above(part, limits):
                for i in range(len(part)):
                    if part[i] > limits[i]:
                        columns[at], values[at] = low + i, part[i]
                        at += 1
