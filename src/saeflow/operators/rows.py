"""Helpers of the row-wise operators: rows in compute precision, blocks, bounds, candidates.

A threshold operator (top-k, sparsemax, ...) finds one number per row that decides every entry.
None of them sorts the row. The maxima of groups of entries are a subset of the row, and the
threshold of a subset never lies above the threshold of the row, so it is a proven floor: entries
below it are decided, and the exact solution is computed on the few that remain.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 128  # largest group; 32 to 128 were measured on rows of 12288 entries
BLOCK = {"cpu": 1 << 21, "cuda": 1 << 26}  # entries at once: bounds temporaries, keeps them cached


def as_rows(values: Tensor, name: str) -> Tensor:
    """(..., n) floating point -> (rows, n) contiguous, detached, half precision as float32."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(values).__name__}")
    if not values.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {values.dtype}")
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"{name} must have shape (..., n) with n >= 1, got {tuple(values.shape)}")
    rows = values.detach().reshape(values.shape[:-1].numel(), values.shape[-1]).contiguous()
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows


def blocks(rows: Tensor) -> Iterator[slice]:
    """Slices that cover the rows, each at most BLOCK entries (and at least one row)."""
    step = max(1, BLOCK.get(rows.device.type, BLOCK["cuda"]) // rows.shape[1])
    for start in range(0, len(rows), step):
        yield slice(start, min(start + step, len(rows)))


def refuse_rows(bad: Tensor, start: int, problem: str, found: Tensor | None = None) -> None:
    """Raise if a row is bad, naming it by its index over the flattened leading shape."""
    if bad.any():
        first = int(bad.nonzero()[0])
        got = "" if found is None else f", got {found[first].item()}"
        raise ValueError(f"row {start + first}: {problem}{got}")


def refuse_row(bad: int, problem: str) -> None:
    """Raise if a kernel found a bad row: its index, not -1."""
    if bad >= 0:
        raise ValueError(f"row {bad}: {problem}")


def group_size(n: int, k: int) -> int:
    """Entries per group (1: no use) such that 4 k group maxima or more bound the k-th largest."""
    return min(GROUP, max(n // (4 * max(k, 1)), 1))


def group_maxima(rows: Tensor, size: int) -> Tensor:
    """(rows, n) -> (rows, n // size): the maximum of each group; NaN if a group holds one.

    A group is a set of columns a fixed distance apart, which is the fast direction to reduce.
    """
    n = rows.shape[1]
    groups = n // size
    maxima: Tensor = rows[:, : groups * size].unflatten(1, (size, groups)).amax(1)
    rest = n - groups * size
    for left in range(0, rest, groups):
        tail = rows[:, groups * size + left :][:, :groups]
        maxima[:, : tail.shape[1]] = torch.maximum(maxima[:, : tail.shape[1]], tail)
    return maxima


def positions(mask: Tensor) -> Tensor:
    """Ascending flat positions where the mask is true."""
    flat = mask.reshape(-1)
    if len(flat) % 8 or flat.storage_offset() % 8:
        return flat.nonzero()[:, 0]
    words = flat.view(torch.int64).nonzero()[:, 0]  # 8 entries at a time: most words are empty
    hits = flat.view(-1, 8)[words].nonzero()
    return words[hits[:, 0]] * 8 + hits[:, 1]


def pad(values: Tensor, counts: Tensor, fill: float, width: int = 1) -> tuple[Tensor, Tensor]:
    """Ragged rows -> rectangle: (rows, at least `width`) filled up on the right, and which are real."""
    width = max(int(counts.max()), width) if len(counts) else width
    real = torch.arange(width, device=counts.device) < counts[:, None]
    padded = values.new_full(real.shape, fill).masked_scatter(real, values)
    return padded, real


def next_below(bound: Tensor) -> Tensor:
    """The next smaller float, so that "above it" includes the bound."""
    return bound.nextafter(torch.full_like(bound, -torch.inf))


def kth_largest(entries: Tensor, k: Tensor) -> Tensor:
    """(rows, m), k (rows,) in 0..m -> (rows,) the k-th largest; the largest where k is 0."""
    least, most = (max(int(bound), 1) for bound in k.aminmax())
    top = entries.topk(most, sorted=least < most).values
    if least == most:
        return top.amin(1)
    return top.gather(1, (k - 1).clamp(min=0)[:, None])[:, 0]


def kth_largest_by_bisection(entries: Tensor, k: Tensor) -> Tensor:
    """The same for a k near the width of the row, without sorting: bisect on the bit patterns."""
    integer = torch.int64 if entries.dtype == torch.float64 else torch.int32
    bits = entries.view(integer)
    keys = torch.where(bits < 0, bits ^ torch.iinfo(integer).max, bits)  # ordered as the floats
    low, high = keys.aminmax(dim=1)
    wanted = k.clamp(min=1)
    while not torch.equal(low, high):
        middle = (low | high) - ((low ^ high) >> 1)  # their mean rounded up, without overflow
        enough = (keys >= middle[:, None]).sum(1, dtype=torch.int32) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
    return torch.where(low < 0, low ^ torch.iinfo(integer).max, low).view(entries.dtype)


class AllEntries:
    """Every entry of a block of rows; see `SomeEntries`."""

    def gather(self, block: Tensor, fill: float) -> Tensor:
        return block

    def scatter(self, chosen: Tensor, out: Tensor) -> None:
        out.copy_(chosen)


@dataclass(frozen=True, eq=False)
class SomeEntries:
    """Chosen entries of a block of rows, worked on as a rectangle as wide as the longest row."""

    flat: Tensor  # (count,) ascending flat positions in the block
    counts: Tensor  # (rows,)

    @staticmethod
    def above(block: Tensor, floor: Tensor) -> "SomeEntries":
        """The entries of each row above its floor (rows,)."""
        flat = positions(block > floor[:, None])
        rows = flat.div(block.shape[1], rounding_mode="floor")
        return SomeEntries(flat, torch.bincount(rows, minlength=len(block)))

    def gather(self, block: Tensor, fill: float) -> Tensor:
        """(rows, n) -> (rows, m): the chosen entries in column order, filled up on the right."""
        return pad(block.reshape(-1)[self.flat], self.counts, fill)[0]

    def ungather(self, chosen: Tensor) -> Tensor:
        """(rows, m) -> (count,), without the filling."""
        return chosen[torch.arange(chosen.shape[1], device=chosen.device) < self.counts[:, None]]

    def scatter(self, chosen: Tensor, out: Tensor) -> None:
        """Write an (rows, m) rectangle to its places in `out`, a contiguous (rows, n) block."""
        out.view(-1)[self.flat] = self.ungather(chosen).to(out.dtype)


Entries = AllEntries | SomeEntries
