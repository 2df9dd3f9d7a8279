"""Selections of a few entries of each row of scores, as lists of a fixed size.

Each is one wide pass over the scores and a small solve. The maxima of groups of columns are a part of the
row, so a threshold solved on them is a floor that every entry of the answer reaches; the entries that
reach it, a few more than wanted, are collected in the order of columns, and the exact choice is made
among them. A row with more of them than there is room for is solved by further readings of it, by a
kernel whose programs return at once for every other row.
"""

import torch
from torch import Tensor

from saeflow.operators import gpu
from saeflow.operators.gpu.lists import NAN, OVERFLOW, Lists, capacity_for, spread
from saeflow.operators.rows import group_maxima, next_below

GROUPS_PER_ENTRY = 2  # of a batch-wide choice, for each place in a list
MOST_GROUPS = 4096  # maxima that a program keeps in registers
AT_ONCE = 1024  # entries of a row that are looked at together
WIDE = 4096  # the same, of a row with more entries than there is room for
SPARE_TIMES, MOST_IN_ORDER = (
    4,
    1024,
)  # a row above a threshold is read again beyond so many times its room, or entries
MOST_IN_A_PROGRAM = 8192  # entries of a row that is held whole
EACH = 8  # rows that one program looks for those in
RANK, SIMPLEX, ABOVE = 0, 1, 2  # kinds of a floor


def topk(
    scores: Tensor,
    k: Tensor | int,
    capacity: int,
    *,
    allowed: Tensor | None = None,
    is_positive: bool = False,
) -> Lists:
    """The k largest entries of each row, of equal ones those with the lower column.

    Args:
        scores: (B, M) float32, bfloat16 or float16; -inf excludes an entry.
        k: one for all rows, or (B,); integers of at least 0, on the device.
        capacity: C, a power of two of at least the largest k.
        allowed: (M,) bool, the columns that may be chosen, such as those of dead latents; None: all.
        is_positive: choose positive entries only.

    Returns:
        Lists of min(k, number that may be chosen) entries; OVERFLOW where k is above the capacity.
    """
    ks = _per_row(k, scores, torch.int32)
    if not gpu.serves_scores(scores):
        kept = _excluded(scores, allowed, is_positive)
        order = kept.sort(dim=1, descending=True, stable=True).indices
        ranks = torch.empty_like(order)
        places = torch.arange(scores.shape[1], device=scores.device)
        ranks.scatter_(1, order, places.expand_as(order))
        mask = (ranks < ks[:, None]) & (kept > -torch.inf)
        return Lists.from_mask(scores, mask, capacity)
    room = max(128, 2 * capacity)
    found = _collect(
        scores, ks, room, kind=RANK, allowed=allowed, is_positive=is_positive, is_exact=True
    )
    return _choose(found, ks, capacity, _places(scores))


def keep_largest(values: Tensor, k: int) -> Tensor:
    """Zero all but the k largest positive entries of each row; of equal ones the first are kept.

    Args:
        values: (B, n) float32, none below 0.
        k: at least 1.

    Returns:
        (B, n), without gradient.
    """
    values, n = values.detach().contiguous(), values.shape[1]
    if n > MOST_IN_A_PROGRAM or not gpu.serves_scores(values):
        return topk(values, k, capacity_for(k), is_positive=True).dense()
    out = torch.empty_like(values)
    wide = 1 << max(4, (n - 1).bit_length())
    gpu.load("ranks").keep_rows[(len(values),)](
        values, out, k, n, WIDE=wide, num_warps=max(1, min(16, wide // 512))
    )
    return out


def batch_topk(scores: Tensor, total: Tensor | int, capacity: int, spare: int) -> Lists:
    """Take the `total` largest entries of the whole batch, of equal ones those with the lower flat index.

    The total-th largest of the maxima of groups of columns, of all rows together, is a floor of the answer. The
    entries that reach it, a few more than wanted, are collected in lists, and the exact choice is made among them.

    Args:
        scores: as for `topk`.
        total: () integer, on the device.
        capacity: C, a power of two; about twice the mean number of entries of a row.
        spare: lists for rows with more than C.

    Returns:
        Lists of `total` entries together. OVERFLOW where there may be more entries than lists.
    """
    total = gpu.on_device(total, torch.int64, scores)
    groups = min(scores.shape[1], GROUPS_PER_ENTRY * capacity)
    maxima = group_maxima(scores.detach(), scores.shape[1] // groups).float()
    maxima = maxima.where(maxima == maxima, -torch.inf).view(-1)
    floor = _ranked(maxima, total, _places(scores))
    floor = torch.where(total > len(maxima), -torch.inf, floor)
    rows = above(scores, next_below(floor), capacity, spare)
    values = rows.values.masked_fill(~rows.real, -torch.inf)
    threshold = torch.where(total > 0, _ranked(values.view(-1), total, _places(scores)), torch.inf)
    is_above = values > threshold
    ties = (values == threshold) & rows.real
    rank = ties.cumsum(1) + _before(ties.sum(1), rows)[:, None]
    return rows.keep(is_above | (ties & (rank <= total - is_above.sum())))


def _ranked(entries: Tensor, rank: Tensor, places: int) -> Tensor:
    """Return the rank-th largest () of entries (n,) float32, whose first `places` bits say all; the last where there are fewer.

    A byte of the answer after the other is found by counting, in a tenth of the time of a sort.
    """
    if not (gpu.runs_triton(entries) and len(entries)):
        at = (rank - 1).clamp(0, len(entries) - 1)
        return entries.sort(descending=True).values.index_select(0, at.view(1))[0]
    levels, kernels = places // 8, gpu.load("ranks")
    counts = torch.zeros(levels, 256, dtype=torch.int32, device=entries.device)
    ranks, value = rank.int().view(1), torch.empty(1, device=entries.device)
    for level in range(levels):
        kernels.count_keys[(-(-len(entries) // WIDE),)](
            entries, counts, ranks, len(entries), LEVEL=level, WIDE=WIDE, num_warps=8
        )
    kernels.ranked_keys[(1,)](counts, ranks, value, LEVELS=levels, num_warps=1)
    return value[0]


def _before(counts: Tensor, lists: Lists) -> Tensor:
    """Return the sums of counts (R,) over the lists before each, in the order of rows and columns."""
    if lists.spill is None:
        return counts.cumsum(0) - counts
    order = lists.spill.owners.sort(stable=True).indices
    in_order = counts[order]
    return torch.zeros_like(counts).scatter(0, order, in_order.cumsum(0) - in_order)


def above(scores: Tensor, threshold: Tensor, capacity: int, spare: int = 0) -> Lists:
    """Take the entries above a threshold.

    Args:
        scores: as for `topk`.
        threshold: () or (M,) float32.
        capacity: C, a power of two.
        spare: lists for rows with more than C.
    """
    if not gpu.serves_scores(scores):
        mask = (_excluded(scores) > threshold) & (scores > -torch.inf)
        return Lists.from_mask(scores, mask, capacity, spare)
    threshold = threshold.float().contiguous()
    return _collect(scores, threshold, capacity, kind=ABOVE, spare=spare)


def near_rank(
    scores: Tensor,
    k: Tensor | float,
    capacity: int,
    slack: Tensor | float,
    *,
    of_relu: bool = False,
) -> Lists:
    """Entries whose soft top-k mask may be above 0, and a few more.

    b is at least the 2 ceil(k)-th largest entry; every entry that reaches it, or comes within `slack`
    of it, is taken.

    Args:
        scores: as for `topk`.
        k: one for all rows, or (B,), real and at least 0, on the device.
        capacity: C, a power of two.
        slack: (), the distance below b from which on the mask is 0, plus the error of the scores.
        of_relu: choose from relu of the scores.

    Returns:
        Lists of at least these entries; how many more is not determined.
    """
    ranks = 2 * gpu.on_device(k, torch.float32, scores).ceil().clamp(min=1)
    ranks = _per_row(ranks.clamp(max=scores.shape[1]), scores, torch.int32)
    slack = _scalar(slack, scores)
    if not gpu.serves_scores(scores):
        kept = _excluded(scores.relu() if of_relu else scores)
        ordered = kept.sort(dim=1, descending=True).values
        floor = ordered.gather(1, ranks[:, None].long() - 1) - slack
        mask = (kept >= floor) & (kept > -torch.inf)
        return Lists.from_mask(scores, mask, capacity)
    return _collect(scores, ranks, capacity, kind=RANK, slack=slack, of_relu=of_relu)


def near_simplex(
    scores: Tensor, scale: Tensor | float, capacity: int, slack: Tensor | float
) -> Lists:
    """Entries to which entmax of 1 + scale may give a probability, and a few more.

    Args:
        scores: as for `topk`, finite or -inf.
        scale: one for all rows, or (B,), above 0: alpha - 1, 1 for sparsemax.
        capacity: C, a power of two.
        slack: (), the error of the scores.

    Returns:
        Lists of at least these entries; how many more is not determined.
    """
    scales = _per_row(scale, scores, torch.float32)
    slack = _scalar(slack, scores)
    if not gpu.serves_scores(scores):
        kept = _excluded(scores).double()
        top = kept.amax(1, keepdim=True)
        tau = _simplex_floor((kept - top) * scales[:, None].double(), scales.double())
        floor = top + tau[:, None] / scales[:, None] - slack
        mask = (kept >= floor) & (kept > -torch.inf)
        return Lists.from_mask(scores, mask, capacity)
    power = None if isinstance(scale, Tensor) else 1 / scale
    return _collect(scores, scales, capacity, kind=SIMPLEX, slack=slack, power=power)


def _simplex_floor(entries: Tensor, scale: Tensor) -> Tensor:
    """(B,) a lower bound of tau, by bisection, of scaled entries (B, n) with row maximum 0."""
    low = torch.full_like(scale, -1.0)
    high = torch.zeros_like(scale)
    for _ in range(30):
        middle = (low + high) / 2
        total = (entries - middle[:, None]).clamp(min=0).pow(1 / scale[:, None]).sum(1)
        low, high = torch.where(total >= 1, middle, low), torch.where(total < 1, middle, high)
    return low


def _collect(
    scores: Tensor,
    floors: Tensor,
    room: int,
    *,
    kind: int,
    slack: Tensor | None = None,
    allowed: Tensor | None = None,
    is_positive: bool = False,
    is_exact: bool = False,
    of_relu: bool = False,
    power: float | None = None,
    spare: int = 0,
) -> Lists:
    """The entries of each row that reach its floor, see the kernel; where too many, its exact floor."""
    rows, (n_rows, n) = scores.detach().contiguous(), scores.shape
    widest = 1 << max(4, (n - 1).bit_length())
    wanted = room
    if kind == ABOVE:  # rows may have many: most of these are then not read again
        room = min(widest, max(room, min(SPARE_TIMES * room, MOST_IN_ORDER)))
    out = _room(scores, room)
    found = torch.empty_like(out.status)
    slack = torch.zeros((), device=scores.device) if slack is None else slack
    allowed_or_any = rows if allowed is None else allowed.view(torch.uint8)  # read only if given
    groups = min(widest, max(1024, min(MOST_GROUPS, 2 * room)))
    tensors = (rows, floors, slack, allowed_or_any, out.columns, out.values, out.counts)
    constants = {
        "KIND": kind,
        "PLACES": _places(scores),
        "HAS_ALLOWED": allowed is not None,
        "IS_POSITIVE": is_positive,
        "OF_RELU": of_relu,
        "LINEAR": power == 1,
        "SQUARES": power == 2,
        "ROOM": room,
    }
    kernels = gpu.load("selection")
    per_column = floors.ndim == 1
    kernels.collect_rows[(n_rows,)](
        *tensors, found, out.status, n, **constants, GROUPS=groups, WIDE=min(widest, AT_ONCE),
        PER_COLUMN=per_column, num_warps=8 if max(groups, room) > 1024 else 4,
    )  # fmt: skip
    wide = {"WIDE": min(widest, WIDE), "num_warps": 8}
    if kind != ABOVE:
        kernels.collect_long_rows[(-(-n_rows // EACH),)](
            *tensors, found, out.status, n_rows, n, **(constants | wide), EACH=EACH, IS_EXACT=is_exact
        )  # fmt: skip
        return out
    whole = _room(scores, wanted, spare=spare)
    counts, is_cut, spill = found.clamp(max=wanted), found > wanted, None
    if spare:
        counts, is_cut, spill = spread(found, wanted, spare)
    of_rows = (found, found) if spill is None else spill[1:]
    kernels.spill_rows[(n_rows,)](
        rows, floors, found, *of_rows, out.columns, out.values, whole.columns, whole.values, n,
        PER_COLUMN=per_column, HAS_SPILL=spill is not None, LONG=room, ROOM=wanted, **wide,
    )  # fmt: skip
    status = (out.status & NAN) | OVERFLOW * is_cut.int()
    return Lists(whole.columns, whole.values, counts, status, n, spill)


def _choose(found: Lists, ranks: Tensor, capacity: int, places: int) -> Lists:
    """The ranks[b] largest entries of each list."""
    out = _room(found.values, capacity, found.d_sae)
    tensors = (found.columns, found.values, found.counts, found.status, ranks)
    chosen = (out.columns, out.values, out.counts, out.status)
    gpu.load("selection").choose_rows[(len(ranks),)](
        *tensors, *chosen,
        PLACES=places, ROOM=found.capacity, CAPACITY=capacity, num_warps=max(1, min(8, found.capacity // 256)),
    )  # fmt: skip
    return out


def _room(rows: Tensor, capacity: int, d_sae: int | None = None, spare: int = 0) -> Lists:
    """Make lists whose entries are not yet written, and spare ones without any."""
    n_rows = len(rows)
    columns = torch.empty(n_rows + spare, capacity, dtype=torch.int32, device=rows.device)
    values = torch.empty(n_rows + spare, capacity, device=rows.device)
    for entries in (columns, values):
        entries[n_rows:].zero_()
    counts, status = torch.empty(2, n_rows, dtype=torch.int32, device=rows.device)
    return Lists(columns, values, counts, status, d_sae or rows.shape[1])


def _places(scores: Tensor) -> int:
    """Upper bits of a float32 that tell the scores apart."""
    return 16 if scores.dtype == torch.bfloat16 else 32


def _per_row(value: Tensor | float, scores: Tensor, dtype: torch.dtype) -> Tensor:
    return gpu.on_device(value, dtype, scores).expand(len(scores)).contiguous()


def _scalar(value: Tensor | float, scores: Tensor) -> Tensor:
    return gpu.on_device(value, torch.float32, scores)


def _excluded(scores: Tensor, allowed: Tensor | None = None, is_positive: bool = False) -> Tensor:
    """(B, M) float32 scores, -inf where an entry may not be chosen."""
    kept = scores.detach().float()
    out = kept.isnan() | (kept <= 0 if is_positive else torch.zeros_like(kept, dtype=torch.bool))
    if allowed is not None:
        out = out | ~allowed
    return kept.masked_fill(out, -torch.inf)
