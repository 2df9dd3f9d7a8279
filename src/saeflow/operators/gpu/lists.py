"""Sparse latents of a fixed size: what a GPU works on, since nothing of it is sized by the host.

Every function of this package runs on plain torch too, which is the reference of its Triton kernel, and
reads no value on the host in either form, so that a whole step can be captured as a CUDA graph.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from saeflow.operators import gpu

OVERFLOW, NAN = 1, 2
"""Bits of a row's status: its answer has more entries than the list, the row holds NaN."""

WIDE, FEW = 1024, 64  # entries, and columns, that one program looks at

MOST_ON_A_LIST = 2048
"""Entries of a row up to which a list is faster than passes over the row."""


class Transposed(NamedTuple):
    """Entries ordered by column, then row."""

    order: (
        Tensor  # (B * C,) int64: flat place b * C + e of each entry, those that are not real last
    )
    offsets: Tensor  # (d_sae + 1,) int32: where the entries of each column begin


class Spill(NamedTuple):
    """Spare rows of lists, in which a row with more entries than one list holds goes on."""

    owners: Tensor  # (R,) int32, the row of the matrix that each list belongs to; of the first B its own
    first: Tensor  # (B,) int32, the list in which each row goes on
    parts: Tensor  # (B,) int32, lists of each row, at least 1


@dataclass(frozen=True, eq=False)
class Lists:
    """The active entries of a (B, d_sae) matrix, C of each row, or more where there are spare lists.

    Attributes:
        columns: (R, C) int32 in 0..d_sae-1, ascending within a row; 0 from counts[r] on. R is B, or more with
            spare lists, which follow.
        values: (R, C) float32; 0 from counts[r] on.
        counts: (R,) int32 in 0..C: entries of each list that are real.
        status: (B,) int32, bits of OVERFLOW and NAN. A row that overflows keeps the first entries
            of its answer, by column; NaN counts as -inf, which is never an entry.
        d_sae: number of columns.
        spill: which lists belong to which rows, where there are spare ones.
    """

    columns: Tensor
    values: Tensor
    counts: Tensor
    status: Tensor
    d_sae: int
    spill: Spill | None = None

    @staticmethod
    def from_mask(scores: Tensor, mask: Tensor, capacity: int, spare: int = 0) -> "Lists":
        """Take the entries of scores (B, d_sae) where a mask is true, as many as there is room for."""
        scores, d_sae = scores.detach(), scores.shape[1]
        columns = torch.arange(d_sae, dtype=torch.int32, device=scores.device).expand_as(mask)
        found, is_nan = mask.sum(1, dtype=torch.int32), NAN * scores.isnan().any(1).int()
        if not spare:
            columns, values = pack(columns, scores.float(), mask, capacity)
            status = OVERFLOW * (found > capacity) + is_nan
            return Lists(columns, values, found.clamp(max=capacity), status.int(), d_sae)
        counts, status, spill = spread(found, is_nan, capacity, spare)
        places = mask.cumsum(1) - 1
        part = places.div(capacity, rounding_mode="floor")
        row = torch.arange(len(mask), device=mask.device)[:, None]
        lists = torch.where(part > 0, spill.first[:, None] + part - 1, row)
        flat = lists * capacity + places - part * capacity
        nowhere = len(counts) * capacity  # thrown away
        flat = torch.where(mask & (part < spill.parts[:, None]), flat, nowhere).view(-1)
        made = []
        for entries in (columns, scores.float()):
            out = entries.new_zeros(nowhere + 1).scatter(0, flat, entries.reshape(-1))
            made.append(out[:nowhere].view(-1, capacity))
        return Lists(made[0], made[1], counts, status, d_sae, spill)

    def of_lists(self, of_rows: Tensor) -> Tensor:
        """Give each list what its row has: (B, ...) to (R, ...)."""
        return of_rows if self.spill is None else of_rows[self.spill.owners]

    def of_rows(self, of_lists: Tensor) -> Tensor:
        """Add up what the lists of each row have: (R, ...) to (B, ...)."""
        if self.spill is None:
            return of_lists
        n_rows = len(self.status)
        return of_lists[:n_rows].index_add(0, self.spill.owners[n_rows:], of_lists[n_rows:])

    @property
    def capacity(self) -> int:
        """Most entries that a row can have."""
        return self.columns.shape[1]

    @cached_property
    def real(self) -> Tensor:
        """(B, C) bool: which entries are real."""
        places = torch.arange(self.capacity, device=self.counts.device)
        return places < self.counts[:, None]

    def with_values(self, values: Tensor) -> "Lists":
        """The same entries with other values (B, C), which are 0 where an entry is not real."""
        if values.shape != self.columns.shape:
            raise ValueError(
                f"expected {tuple(self.columns.shape)} values, got {tuple(values.shape)}"
            )
        other = replace(self, values=values)
        for name in ("real", "transposed"):
            if name in self.__dict__:
                other.__dict__[name] = self.__dict__[name]
        return other

    def keep(self, mask: Tensor, capacity: int | None = None) -> "Lists":
        """The real entries that a mask (B, C) chooses, moved up; the first `capacity` of a row."""
        capacity = self.capacity if capacity is None else capacity
        mask = mask & self.real
        columns, values = pack(self.columns, self.values.detach(), mask, capacity)
        found = mask.sum(1, dtype=torch.int32)
        is_cut = self.of_rows((found > capacity).int()) > 0
        status = self.status | (OVERFLOW * is_cut).int()
        counts = found.clamp(max=capacity)
        return Lists(columns, values, counts, status, self.d_sae, self.spill)

    @cached_property
    def transposed(self) -> Transposed:
        """The structure by column, worked out once and shared by every `with_values`."""
        narrow = torch.int16 if self.d_sae < 1 << 15 else torch.int32  # sorted by half as many bits
        if not (gpu.runs_triton(self.columns) and self.columns.numel()):
            keys = self.columns.masked_fill(~self.real, self.d_sae).view(-1).to(narrow)
            ordered, order = keys.sort(stable=True)
            ends = torch.arange(self.d_sae + 1, dtype=narrow, device=ordered.device)
            return Transposed(order, torch.searchsorted(ordered, ends, out_int32=True))
        kernels, n = gpu.load("columns"), self.columns.numel()
        keys = self.columns.new_empty(n, dtype=narrow)
        kernels.keys_of_lists[(-(-n // WIDE),)](
            self.columns, self.counts, keys, n, self.d_sae, CAPACITY=self.capacity, WIDE=WIDE
        )
        ordered, order = keys.sort(stable=True)
        offsets = self.columns.new_empty(self.d_sae + 1)
        kernels.offsets_of_columns[(-(-len(offsets) // FEW),)](
            ordered, offsets, n, self.d_sae, HALVINGS=n.bit_length(), WIDE=FEW, num_warps=1
        )
        return Transposed(order, offsets)

    def dense(self) -> Tensor:
        """(B, d_sae) with zeros elsewhere, differentiable in the values."""
        out = self.values.new_zeros(len(self.columns), self.d_sae)
        return self.of_rows(out.scatter_add(1, self.columns.long(), self.values))


def capacity_for(count: int) -> int:
    """The capacity of lists with room for `count` entries a row: a power of two."""
    return gpu.block_for(count)


def spare_for(n_rows: int) -> int:
    """Return how many spare lists selections have where single rows may have many entries."""
    return n_rows // 2 + 8


def spread(
    found: Tensor, status: Tensor, capacity: int, spare: int
) -> tuple[Tensor, Tensor, Spill]:
    """Divide spare lists among rows of found (B,) entries, in the order of rows.

    Args:
        found: int32.
        status: (B,) int32, of which the bit NAN counts.
        capacity: C.
        spare: number of spare lists.

    Returns:
        counts (B + spare,) int32 of all lists; status (B,) int32, with OVERFLOW for rows that have more entries than
        room; and the lists of each row.
    """
    if gpu.runs_triton(found) and len(found):
        return share_out(found, status, capacity, spare)
    n_rows, device = len(found), found.device
    more = (found - 1).clamp(min=0).div(capacity, rounding_mode="floor")  # lists beyond the first
    ends = more.cumsum(0)
    begins = ends - more
    place = torch.arange(spare, device=device)
    owner = torch.searchsorted(ends, place, right=True)
    is_used = owner < n_rows
    owner = owner.clamp(max=n_rows - 1)
    left = found[owner] - capacity * (place - begins[owner] + 1)
    counts = torch.where(is_used, left.clamp(0, capacity), 0)
    had = (spare - begins).clamp(min=0).minimum(more)
    rows = torch.arange(n_rows, device=device)
    owners = torch.cat((rows, torch.where(is_used, owner, 0))).int()
    spill = Spill(owners, (n_rows + begins).int(), (1 + had).int())
    status = (status & NAN) | OVERFLOW * (had < more).int()
    return torch.cat((found.clamp(max=capacity), counts)).int(), status, spill


def share_out(
    found: Tensor,
    status: Tensor,
    capacity: int,
    spare: int,
    ties: Tensor | None = None,
    left: Tensor | None = None,
) -> tuple[Tensor, Tensor, Spill]:
    """Do `spread` by a kernel, for rows that may have entries more.

    Args:
        found, status, capacity, spare: as for `spread`.
        ties: (B,) int32, of each row; it becomes how many of them are entries too.
        left: (1,) int64, how many ties of all are, those of the first rows.
    """
    n_rows = len(found)
    counts, owners = found.new_empty(2, n_rows + spare).unbind()
    new_status, first, parts = found.new_empty(3, n_rows).unbind()
    wide = min(4096, gpu.block_for(n_rows))
    none = found  # where the kernel reads nothing
    gpu.load("spill").spread_rows[(1,)](
        found, none if ties is None else ties, none if left is None else left, status,
        counts, new_status, owners, first, parts, n_rows, spare,
        HAS_TIES=ties is not None, ROOM=capacity, WIDE=wide, num_warps=gpu.warps_for(wide),
    )  # fmt: skip
    return counts, new_status, Spill(owners, first, parts)


def pack(columns: Tensor, values: Tensor, mask: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """(B, n) int32 and float32 -> (B, capacity): the entries a mask chooses, in order, then zeros."""
    places = mask.cumsum(1) - 1
    places = torch.where(mask & (places < capacity), places, capacity)  # the last is thrown away
    found = []
    for entries in (columns, values):
        out = entries.new_zeros(len(mask), capacity + 1)
        found.append(out.scatter(1, places, entries)[:, :capacity].contiguous())
    return found[0], found[1]
