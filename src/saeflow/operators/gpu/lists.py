"""Sparse latents of a fixed size: what a GPU works on, since nothing of it is sized by the host.

Every function of this package runs on plain torch too, which is the reference of its Triton kernel, and
reads no value on the host in either form, so that a whole step can be captured as a CUDA graph.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

OVERFLOW, NAN = 1, 2
"""Bits of a row's status: its answer has more entries than the list, the row holds NaN."""

MOST_ON_A_LIST = 2048
"""Entries of a row up to which a list is faster than passes over the row."""


class Transposed(NamedTuple):
    """Entries ordered by column, then row."""

    order: (
        Tensor  # (B * C,) int64: flat place b * C + e of each entry, those that are not real last
    )
    offsets: Tensor  # (d_sae + 1,) int32: where the entries of each column begin


@dataclass(frozen=True, eq=False)
class Lists:
    """The active entries of a (B, d_sae) matrix, up to C of each row.

    Attributes:
        columns: (B, C) int32 in 0..d_sae-1, ascending within a row; 0 from counts[b] on.
        values: (B, C) float32; 0 from counts[b] on.
        counts: (B,) int32 in 0..C: entries of each row that are real.
        status: (B,) int32, bits of OVERFLOW and NAN. A row that overflows keeps the first C entries
            of its answer, by column; NaN counts as -inf, which is never an entry.
        d_sae: number of columns.
    """

    columns: Tensor
    values: Tensor
    counts: Tensor
    status: Tensor
    d_sae: int

    @staticmethod
    def from_mask(scores: Tensor, mask: Tensor, capacity: int) -> "Lists":
        """Entries of scores (B, d_sae) where a mask is true, the first `capacity` of each row."""
        scores, d_sae = scores.detach(), scores.shape[1]
        columns = torch.arange(d_sae, dtype=torch.int32, device=scores.device).expand_as(mask)
        columns, values = pack(columns, scores.float(), mask, capacity)
        found = mask.sum(1, dtype=torch.int32)
        status = OVERFLOW * (found > capacity) + NAN * scores.isnan().any(1)
        counts = found.clamp(max=capacity)
        return Lists(columns, values, counts, status.int(), d_sae)

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
        status = self.status | (OVERFLOW * (found > capacity)).int()
        return Lists(columns, values, found.clamp(max=capacity), status, self.d_sae)

    @cached_property
    def transposed(self) -> Transposed:
        """The structure by column, worked out once and shared by every `with_values`."""
        beyond = self.columns.masked_fill(~self.real, self.d_sae).view(-1)
        ordered, order = beyond.sort(stable=True)
        ends = torch.arange(self.d_sae + 1, dtype=torch.int32, device=ordered.device)
        return Transposed(order, torch.searchsorted(ordered, ends, out_int32=True))

    def dense(self) -> Tensor:
        """(B, d_sae) with zeros elsewhere, differentiable in the values."""
        out = self.values.new_zeros(len(self.columns), self.d_sae)
        return out.scatter_add(1, self.columns.long(), self.values)


def capacity_for(count: int) -> int:
    """The capacity of lists with room for `count` entries a row: a power of two."""
    return 1 << max(4, (count - 1).bit_length())


def pack(columns: Tensor, values: Tensor, mask: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """(B, n) int32 and float32 -> (B, capacity): the entries a mask chooses, in order, then zeros."""
    places = mask.cumsum(1) - 1
    places = torch.where(mask & (places < capacity), places, capacity)  # the last is thrown away
    found = []
    for entries in (columns, values):
        out = entries.new_zeros(len(mask), capacity + 1)
        found.append(out.scatter(1, places, entries)[:, :capacity].contiguous())
    return found[0], found[1]
