"""Selections of a few entries of each row of scores, as lists of a fixed size.

Each is one wide pass over the scores and a small solve. The maxima of groups of columns are a part of the
row, so a threshold solved on them is a floor that every entry of the answer reaches; the entries that
reach it, a few more than wanted, are collected in the order of columns, and the exact choice is made
among them. A row with more of them than there is room for is solved by further readings of it, by a
kernel whose programs return at once for every other row.
"""

from typing import Any

import torch
from torch import Tensor

from saeflow.operators import gpu
from saeflow.operators.gpu.lists import Lists, Spill, share_out
from saeflow.operators.rows import group_maxima

GROUPS_PER_ENTRY = 2  # of a batch-wide choice, for each place in a list
MOST_GROUPS = 4096  # maxima that a program keeps in registers
AT_ONCE = 1024  # entries of a row that are looked at together
WIDE = 4096  # the same, of a row with more entries than there is room for
SPARE_TIMES, MOST_IN_ORDER = (
    4,
    1024,
)  # a row above a threshold is read again beyond so many times its room, or entries
EACH = 8  # rows that one program looks for those in
RANK, SIMPLEX, ABOVE, AT_LEAST = 0, 1, 2, 3  # kinds of a floor


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
    found, _ = _collect(scores, ks, room, kind=RANK, allowed=allowed, is_positive=is_positive)
    return _choose(found, ks, capacity, places_of(scores))


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
    total, n = gpu.on_device(total, torch.int64, scores), scores.shape[1]
    if not gpu.serves_scores(scores):
        kept = _excluded(scores).view(-1)
        order = kept.sort(descending=True, stable=True).indices
        is_chosen = torch.arange(len(order), device=order.device) < total
        mask = torch.zeros_like(is_chosen).scatter(0, order, is_chosen) & (kept > -torch.inf)
        return Lists.from_mask(scores, mask.view_as(scores), capacity, spare)
    kernels, rows = gpu.load("spill"), scores.detach().contiguous()
    maxima = group_maxima(rows, n // min(n, GROUPS_PER_ENTRY * capacity)).view(-1)
    counts = torch.zeros(2, places_of(rows) // 8, 256, dtype=torch.int64, device=rows.device)
    of_maxima = (maxima, len(maxima))
    count = gpu.load("ranks").count_keys
    floor, _ = _ranked(counts[0], total, count, -(-len(maxima) // WIDE), *of_maxima, WIDE=WIDE)
    some, found = _collect(rows, floor, _long_for(capacity, n), kind=AT_LEAST)
    long, wide = some.capacity, min(gpu.block_for(n), WIDE)
    each = max(1, WIDE // long)
    of_rows, sizes = (rows, some.values, found), {"LONG": long, "WIDE": wide}
    threshold, left = _ranked(
        counts[1], total, kernels.count_rows, -(-len(rows) // each), *of_rows, len(rows), n, EACH=each, **sizes
    )  # fmt: skip
    chosen, ties = torch.empty(2, len(rows), dtype=torch.int32, device=rows.device).unbind()
    kernels.compare_rows[(len(rows),)](*of_rows, threshold, chosen, ties, n, **sizes, num_warps=4)
    shares = share_out(chosen, some.status, capacity, spare, ties, left)
    return _divided(rows, threshold, some, found, shares, capacity, ties)


def _ranked(
    counts: Tensor, rank: Tensor, count: Any, programs: int, *arguments: Any, **constants: int
) -> tuple[Tensor, Tensor]:
    """Find the rank-th largest of floats whose upper bytes a kernel counts.

    A byte of the answer after the other is found by counting, in a tenth of the time of a sort.

    Args:
        counts: (bytes, 256) int64 zeros, for as many bytes as say all; written.
        rank: () int64.
        count, programs, arguments, constants: the kernel, and what it takes.

    Returns:
        (1,) float32, see `ranked_keys`; and (1,) int64, how many of those equal to it are among the first `rank`.
    """
    for level in range(len(counts)):
        count[(programs,)](counts, rank, *arguments, LEVEL=level, **constants, num_warps=8)
    value, left = torch.empty(1, device=rank.device), counts.new_empty(1)
    gpu.load("ranks").ranked_keys[(1,)](counts, rank, value, left, LEVELS=len(counts), num_warps=1)
    return value, left


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
    threshold, rows = threshold.float().contiguous(), scores.detach().contiguous()
    some, found = _collect(rows, threshold, _long_for(capacity, rows.shape[1]), kind=ABOVE)
    shares = share_out(found, some.status, capacity, spare)
    return _divided(rows, threshold, some, found, shares, capacity)


def near_rank(
    scores: Tensor,
    k: Tensor | float,
    capacity: int,
    temperature: Tensor | float,
    reach: float,
    slack: Tensor | float = 0.0,
    *,
    of_relu: bool = False,
) -> Lists:
    """Entries whose soft top-k mask may be above 0, and a few more.

    b is at least the (ceil(k) + 1)-th largest entry less log(k + 1) temperatures: were it lower, each of these would
    have a mask above 1 - 1 / (2 (k + 1)), and k + 1 of them more than k. Entries down to `reach` temperatures and
    `slack` below that are taken.

    Args:
        scores: as for `topk`.
        k: one for all rows, or (B,), real and at least 0, on the device.
        capacity: C, a power of two.
        temperature: (), of the soft top-k.
        reach: temperatures below b from which on the mask is 0.
        slack: (), how far two scores may be off in all.
        of_relu: choose from relu of the scores.

    Returns:
        Lists of at least these entries; how many more is not determined.
    """
    ks, slack = _per_row(k, scores, torch.float32), _scalar(slack, scores)
    temperature = _scalar(temperature, scores)
    if not gpu.serves_scores(scores):
        kept = _excluded(scores.relu() if of_relu else scores)
        ordered = kept.sort(dim=1, descending=True).values
        ranks = (ks.ceil().long() + 1).clamp(max=scores.shape[1])
        floor = ordered.gather(1, ranks[:, None] - 1)
        below = temperature * ((ks + 1).log() + reach)[:, None] + slack
        mask = (kept >= floor - below) & (kept > -torch.inf)
        return Lists.from_mask(scores, mask, capacity)
    heat = temperature, reach
    return _collect(scores, ks, capacity, kind=RANK, slack=slack, heat=heat, of_relu=of_relu)[0]


def near_simplex(
    scores: Tensor,
    scale: Tensor | float,
    capacity: int,
    slack: Tensor | float,
    allowed: Tensor | None = None,
) -> Lists:
    """Entries to which entmax of 1 + scale may give a probability, and a few more.

    Args:
        scores: as for `topk`, finite or -inf.
        scale: one for all rows, or (B,), above 0: alpha - 1, 1 for sparsemax.
        capacity: C, a power of two.
        slack: (), the error of the scores.
        allowed: (M,) bool, the columns that count; None: all.

    Returns:
        Lists of at least these entries; how many more is not determined.
    """
    scales = _per_row(scale, scores, torch.float32)
    slack = _scalar(slack, scores)
    if not gpu.serves_scores(scores):
        kept = _excluded(scores, allowed).double()
        top = kept.amax(1, keepdim=True)
        tau = _simplex_floor((kept - top) * scales[:, None].double(), scales.double())
        floor = top + tau[:, None] / scales[:, None] - slack
        mask = (kept >= floor) & (kept > -torch.inf)
        return Lists.from_mask(scores, mask, capacity)
    power = None if isinstance(scale, Tensor) else 1 / scale
    return _collect(
        scores, scales, capacity, kind=SIMPLEX, slack=slack, allowed=allowed, power=power
    )[0]


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
    heat: tuple[Tensor, float] | None = None,
    allowed: Tensor | None = None,
    is_positive: bool = False,
    of_relu: bool = False,
    power: float | None = None,
) -> tuple[Lists, Tensor]:
    """Collect the entries of each row that reach its floor, see the kernel, and say how many there are (B,) int32.

    A row with more of them than room is solved again for its exact floor, or without a slack for its exact choice; of
    one above a threshold the list has any.
    """
    rows, (n_rows, n) = scores.detach().contiguous(), scores.shape
    widest, out = gpu.block_for(n), _room(scores, room)
    found = torch.empty_like(out.status)
    temperature, reach = heat or (rows, 0.0)  # read only if given, as these are
    allowed_or_any = rows if allowed is None else allowed.view(torch.uint8)
    groups = min(widest, max(1024, min(MOST_GROUPS, 2 * room)))
    of_rows = kind in (RANK, SIMPLEX)
    stride = floors.stride(0) if of_rows else 0
    tensors = (rows, floors, rows if slack is None else slack, temperature, allowed_or_any)
    results = (out.columns, out.values, out.counts, found, out.status, stride, reach)
    constants = {
        "KIND": kind,
        "PLACES": places_of(scores),
        "HAS_ALLOWED": allowed is not None,
        "IS_POSITIVE": is_positive,
        "IS_NEAR": heat is not None,
        "OF_RELU": of_relu,
        "LINEAR": power == 1,
        "SQUARES": power == 2,
        "ROOM": room,
    }
    kernels = gpu.load("selection")
    kernels.collect_rows[(n_rows,)](
        *tensors, *results, n, **constants, GROUPS=groups, WIDE=min(widest, AT_ONCE),
        PER_COLUMN=kind == ABOVE and floors.ndim == 1, num_warps=8 if max(groups, room) > 1024 else 4,
    )  # fmt: skip
    if of_rows:
        kernels.collect_long_rows[(-(-n_rows // EACH),)](
            *tensors, *results, n_rows, n, **constants, EACH=EACH, WIDE=min(widest, WIDE),
            IS_EXACT=slack is None, num_warps=8,
        )  # fmt: skip
    return out, found


def _divided(
    rows: Tensor,
    threshold: Tensor,
    some: Lists,
    found: Tensor,
    shares: tuple[Tensor, Tensor, Spill],
    capacity: int,
    ties: Tensor | None = None,
) -> Lists:
    """Divide the entries above a threshold among the lists of each row.

    Args:
        rows: (B, M) scores.
        threshold: () or (1,), or (M,) float32.
        some: first lists of the entries above it and maybe others, of rows that have not more than room.
        found: (B,) int32, how many these are.
        shares: see `lists.spread`.
        capacity: C.
        ties: (B,) int32, how many of the entries equal to the threshold are taken as well.
    """
    (n_rows, n), (counts, status, spill) = rows.shape, shares
    columns, values = (
        some.columns.new_empty(len(counts), capacity),
        some.values.new_empty(len(counts), capacity),
    )
    gpu.load("spill").spill_rows[(len(counts),)](
        rows, threshold, found if ties is None else ties, found, counts, *spill[1:],
        some.columns, some.values, columns, values, n_rows, n,
        PER_COLUMN=threshold.ndim == 1 and ties is None, HAS_TIES=ties is not None, HAS_SPILL=len(counts) > n_rows,
        LONG=some.capacity, ROOM=capacity, WIDE=min(gpu.block_for(n), WIDE), num_warps=8,
    )  # fmt: skip
    return Lists(columns, values, counts, status, n, spill if len(counts) > n_rows else None)


def _choose(found: Lists, ranks: Tensor, capacity: int, places: int) -> Lists:
    """The ranks[b] largest entries of each list."""
    out = _room(found.values, capacity, found.d_sae)
    tensors = (found.columns, found.values, found.counts, found.status, ranks)
    chosen = (out.columns, out.values, out.counts, out.status)
    gpu.load("selection").choose_rows[(len(ranks),)](
        *tensors, *chosen, ranks.stride(0),
        PLACES=places, ROOM=found.capacity, CAPACITY=capacity, num_warps=max(1, min(8, found.capacity // 256)),
    )  # fmt: skip
    return out


def _room(rows: Tensor, capacity: int, d_sae: int | None = None) -> Lists:
    """Make lists whose entries are not yet written."""
    n_rows = len(rows)
    columns = torch.empty(n_rows, capacity, dtype=torch.int32, device=rows.device)
    values = torch.empty(n_rows, capacity, device=rows.device)
    counts, status = torch.empty(2, n_rows, dtype=torch.int32, device=rows.device)
    return Lists(columns, values, counts, status, d_sae or rows.shape[1])


def _long_for(capacity: int, n: int) -> int:
    """Return the room of first lists of rows that may have many entries: most of these are then not read again."""
    return min(gpu.block_for(n), max(capacity, min(SPARE_TIMES * capacity, MOST_IN_ORDER)))


def places_of(scores: Tensor) -> int:
    """Upper bits of a float32 that tell the scores apart."""
    return 16 if scores.dtype == torch.bfloat16 else 32


def _per_row(value: Tensor | float, scores: Tensor, dtype: torch.dtype) -> Tensor:
    """(B,) a number for each row, which may be one for all; of a number, of the type said."""
    kept = value.dtype if isinstance(value, Tensor) else dtype
    return gpu.on_device(value, kept, scores).expand(len(scores))


def _scalar(value: Tensor | float, scores: Tensor) -> Tensor:
    return gpu.on_device(value, torch.float32, scores)


def _excluded(scores: Tensor, allowed: Tensor | None = None, is_positive: bool = False) -> Tensor:
    """(B, M) float32 scores, -inf where an entry may not be chosen."""
    kept = scores.detach().float()
    out = kept.isnan() | (kept <= 0 if is_positive else torch.zeros_like(kept, dtype=torch.bool))
    if allowed is not None:
        out = out | ~allowed
    return kept.masked_fill(out, -torch.inf)
