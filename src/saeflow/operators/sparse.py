"""Sparse latents: only the active entries are stored."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from saeflow.operators import gpu, native
from saeflow.operators.gpu import record
from saeflow.operators.gpu import selection as select
from saeflow.operators.gpu import weights as on_lists
from saeflow.operators.gpu.lists import Lists, capacity_for, spare_for
from saeflow.operators.gpu.sparse import column_totals
from saeflow.operators.gpu.weights import Walk
from saeflow.operators.rows import pad, positions

is_padded = False
"""True makes a CPU take the GPU's path, which is slower: for tests."""


class ByColumn(NamedTuple):
    """The same entries ordered by column, then row: the transpose's structure."""

    order: Tensor  # (count,) position of each entry in the order by row
    rows: Tensor  # (count,)
    offsets: Tensor  # (d_sae + 1,)


@dataclass(frozen=True, eq=False)
class SparseLatents:
    """The active entries of a (B, d_sae) matrix, by rows (CSR).

    One form serves top-k, batch top-k and a k per row: rows may differ in length. On a GPU rows have room
    for the same number of entries, so that the host sizes nothing: an entry beyond those that are real has
    column 0 and value 0, takes no gradient and counts nowhere.

    Attributes:
        offsets: (B + 1,) int64; row b holds entries offsets[b] up to offsets[b + 1]. Empty where rows have the same room.
        columns: (count,) int64 in 0..d_sae-1, ascending within a row, no column twice in a row.
        values: (count,) floating point; the only differentiable part.
        d_sae: number of columns.
        lists: the same entries as rectangles, where rows have the same room; columns and values are views
            of them, with int32 columns.
        walk: the step whose weights' gradients these entries are a part of, where rows have the same room.
    """

    offsets: Tensor
    columns: Tensor
    values: Tensor
    d_sae: int
    lists: Lists | None = None
    walk: Walk | None = None

    @staticmethod
    def of(lists: Lists) -> "SparseLatents":
        """Lists of a fixed size as sparse latents."""
        none = lists.columns.new_empty(0, dtype=torch.int64)
        return SparseLatents(
            none, lists.columns.view(-1), lists.values.view(-1), lists.d_sae, lists
        )

    @staticmethod
    def from_positions(flat: Tensor, values: Tensor, n_rows: int, d_sae: int) -> "SparseLatents":
        """Entries at ascending flat positions (count,) of an (n_rows, d_sae) matrix."""
        rows = flat.div(d_sae, rounding_mode="floor")
        return SparseLatents(_offsets(rows, n_rows), flat - rows * d_sae, values, d_sae)

    @staticmethod
    def room_for(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets of rows of counts (B,) entries, and memory for their columns and float32 values."""
        offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        count = int(offsets[-1])
        return offsets, torch.empty(count, dtype=torch.int64), torch.empty(count)

    @staticmethod
    def from_mask(values: Tensor, mask: Tensor, most: int | None = None) -> "SparseLatents":
        """Entries of values (B, d_sae) where the mask (B, d_sae) is true, differentiable.

        Args:
            most: see `room`; then the values are constants.
        """
        if values.ndim != 2 or mask.shape != values.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"expected values (B, d_sae) and a bool mask of that shape, got "
                f"{tuple(values.shape)} and {mask.dtype} {tuple(mask.shape)}"
            )
        if (capacity := room(values, most)) is not None:
            spare = spare_for(len(values))
            return SparseLatents.of(Lists.from_mask(values, mask, capacity, spare))
        flat = positions(mask)
        return SparseLatents.from_positions(flat, values.reshape(-1)[flat], *values.shape)

    @staticmethod
    def from_above(
        values: Tensor, threshold: Tensor | float, most: int | None = None
    ) -> "SparseLatents":
        """Entries of values (B, d_sae) above a threshold, one or (d_sae,), differentiable.

        Args:
            most: see `room`.
        """
        if (capacity := room(values, most)) is not None:
            limits = gpu.on_device(threshold, torch.float32, values).detach()
            spare = spare_for(len(values))
            return SparseLatents.of(select.above(values, limits, capacity, spare))
        limits = torch.as_tensor(threshold, dtype=values.dtype, device=values.device).detach()
        rows = values.detach()
        if not (native.serves(rows) and rows.is_contiguous()):
            return SparseLatents.from_mask(values, rows > limits)
        limits = limits.expand(values.shape[1]).contiguous()
        counts = torch.empty(len(rows), dtype=torch.int64)
        native.spread("selection.count_above", len(rows), rows, limits, counts)
        chosen = SparseLatents(*SparseLatents.room_for(counts), values.shape[1])
        arrays = (rows, limits, chosen.offsets, chosen.columns, chosen.values)
        native.spread("selection.columns_above", len(rows), *arrays)
        return chosen.taken_from(values)

    @staticmethod
    def from_dense(latents: Tensor) -> "SparseLatents":
        """The non-zero entries of latents (B, d_sae), differentiable."""
        return SparseLatents.from_mask(latents, latents.detach() != 0)

    @staticmethod
    def from_lists(lists: Lists) -> "SparseLatents":
        """The real entries of lists, none of which overflows."""
        rows = torch.arange(len(lists.status), device=lists.columns.device)
        flat = lists.of_lists(rows)[:, None] * lists.d_sae + lists.columns
        flat, values = flat[lists.real], lists.values[lists.real]
        if lists.spill is not None:
            flat, order = flat.sort()
            values = values[order]
        return SparseLatents.from_positions(flat, values, len(rows), lists.d_sae)

    def __len__(self) -> int:
        return len(self.offsets) - 1 if self.lists is None else len(self.lists.status)

    @cached_property
    def is_real(self) -> Tensor:
        """(count,) bool: entries that are, where rows have the same room."""
        assert self.lists is not None
        return self.lists.real.reshape(-1)

    @cached_property
    def rows(self) -> Tensor:
        """(count,) int64: the row of each entry."""
        if self.lists is None:
            return torch.repeat_interleave(self.offsets.diff(), output_size=len(self.columns))
        rows = torch.arange(len(self), device=self.columns.device)
        of_lists = self.lists.of_lists(rows)[:, None]
        return of_lists.expand(self.lists.columns.shape).reshape(-1)

    @cached_property
    def flat(self) -> Tensor:
        """(count,) int64: the place of each entry in the flattened matrix."""
        return self.rows * self.d_sae + self.columns

    @cached_property
    def by_column(self) -> ByColumn:
        """The transpose's structure, worked out once and shared by every `with_values`."""
        if native.serves(self.values):
            order, rows = torch.empty(2, len(self.columns), dtype=torch.int64)
            offsets = torch.empty(self.d_sae + 1, dtype=torch.int64)
            arrays = (self.offsets, self.columns, self.d_sae, order, rows, offsets)
            native.call("sparse.transpose", *arrays)
            return ByColumn(order, rows, offsets)
        columns, order = self.columns.sort(stable=True)
        return ByColumn(order, self.rows[order], _offsets(columns, self.d_sae))

    def with_values(self, values: Tensor) -> "SparseLatents":
        """The same entries with other values (count,)."""
        if values.shape != self.columns.shape:
            raise ValueError(f"expected {len(self.columns)} values, got {tuple(values.shape)}")
        if self.lists is not None:
            values = values.where(self.is_real, 0)
        return self.with_whole(values)

    def with_whole(self, values: Tensor) -> "SparseLatents":
        """The same entries with values (count,) that are 0 already where there is no entry, and take no gradient there."""
        lists = self.lists
        if lists is not None:
            lists = lists.with_values(values.view_as(lists.columns))
        return self._tell(replace(self, values=values, lists=lists))

    def _tell(self, other: "SparseLatents") -> "SparseLatents":
        """Give other values of the same entries what is known of their places."""
        for name in ("rows", "flat", "by_column", "is_real"):
            if name in self.__dict__:
                other.__dict__[name] = self.__dict__[name]
        return other

    def scaled(self, of_rows: Tensor) -> "SparseLatents":
        """The same entries with values times the number that each row has in a vector (B,)."""
        return self.with_whole(self.values * self.of_rows(of_rows))

    def detach(self) -> "SparseLatents":
        """The same entries without gradient."""
        lists = self.lists
        if lists is not None:
            lists = lists.with_values(lists.values.detach())
        other = replace(self, values=self.values.detach(), lists=lists, walk=None)
        return self._tell(other)

    def relu(self) -> "SparseLatents":
        """The same entries, 0 where they are negative."""
        return self.with_whole(self.values.relu())

    def of_columns(self, vector: Tensor) -> Tensor:
        """Return the number (count,) that a vector (d_sae,) has for each entry, with gradient."""
        if self.lists is None:
            return vector[self.columns]
        return on_lists.of_columns(vector, self.lists).view(-1)

    def of_rows(self, vector: Tensor) -> Tensor:
        """Return the number (count,) that a vector (B,) has for each entry, with gradient."""
        if self.lists is None:
            return vector[self.rows]
        of_lists = self.lists.of_lists(vector)[:, None]
        return of_lists.expand(self.lists.columns.shape).reshape(-1)

    def keep(self, chosen: Tensor) -> "SparseLatents":
        """The entries that a mask (count,) chooses."""
        offsets = _offsets(self.rows[chosen], len(self))
        return SparseLatents(offsets, self.columns[chosen], self.values[chosen], self.d_sae)

    @staticmethod
    def from_rows_above(values: Tensor, bounds: Tensor) -> "SparseLatents":
        """Entries of values (B, d_sae) that reach their row's bound (B,), differentiable."""
        return SparseLatents.from_mask(values, values.detach() >= bounds[:, None])

    def least(self) -> Tensor:
        """(B,) the smallest value of each row, inf where a row has none; without gradient."""
        return torch.segment_reduce(
            self.values.detach(), "min", offsets=self.offsets, initial=torch.inf
        )

    def taken_from(self, matrix: Tensor) -> "SparseLatents":
        """The same entries of the matrix (B, d_sae) they were chosen from, with its gradient."""
        if matrix.requires_grad and torch.is_grad_enabled():
            return self.with_values(matrix.reshape(-1)[self.flat])
        return self.with_values(self.values.to(matrix.dtype))

    def at(self, matrix: Tensor) -> "SparseLatents":
        """The same entries with the values that a matrix (B, d_sae) has there, without gradient."""
        return self.with_values(matrix.detach().reshape(-1)[self.flat].to(self.values.dtype))

    def map_rows(self, operator: Callable[[Tensor], Tensor]) -> "SparseLatents":
        """Apply a row operator that gives absent entries (-inf) the value 0, such as sparsemax.

        The operator sees a (B, longest row) rectangle. The result is that of the dense operator
        if the entries include every one to which the dense operator gives a value.
        """
        padded, real = pad(self.values, self.offsets.diff(), float("-inf"))
        return self.with_values(operator(padded)[real])

    def split_columns(self, boundaries: Tensor) -> "SparseLatents":
        """Cut each row at column boundaries (G - 1,), ascending: B rows become B * G, in order.

        Raises:
            ValueError: rows have the same room.
        """
        if self.lists is not None:
            raise ValueError("expected rows of any length, got rows of the same room")
        groups = len(boundaries) + 1
        pieces = self.rows * groups + torch.bucketize(self.columns, boundaries, right=True)
        offsets = _offsets(pieces, len(self) * groups)
        return SparseLatents(offsets, self.columns, self.values, self.d_sae)

    def fired(self) -> Tensor:
        """(d_sae,) bool: latents that are not zero somewhere in the batch."""
        if self.lists is not None:
            return record.fired(self.lists)
        fired = torch.zeros(self.d_sae, dtype=torch.bool, device=self.values.device)
        fired[self.columns[self.values.detach() != 0]] = True
        return fired

    def count(self) -> Tensor:
        """(d_sae,) int64: in how many rows each latent is not zero."""
        is_active = self.values.detach() != 0
        if self.lists is None:
            return torch.bincount(self.columns[is_active], minlength=self.d_sae)
        return self._totals(is_active)

    def listed(self) -> Tensor:
        """Return how many rows have an entry for each latent (d_sae,) int64, of whatever value."""
        if self.lists is None:
            counts = torch.zeros(self.d_sae, dtype=torch.int64, device=self.values.device)
            return counts.index_add_(0, self.columns, torch.ones_like(self.columns))
        return self._totals(self.is_real)

    def _totals(self, is_counted: Tensor) -> Tensor:
        """Return how many entries of each column (d_sae,) int64 a mask (count,) chooses, where rows have the same room."""
        assert self.lists is not None
        ones = is_counted.float().view_as(self.lists.columns)
        return column_totals(self.lists, ones).long()

    def total(self, numbers: Tensor) -> Tensor:
        """Return the sum of a number (count,) for each entry."""
        return (numbers if self.lists is None else numbers.where(self.is_real, 0)).sum()

    def row_sums(self, numbers: Tensor) -> Tensor:
        """Return the sum (B,) over each row of a number (count,) for each entry, with gradient."""
        if self.lists is None:
            return numbers.new_zeros(len(self)).index_add(0, self.rows, numbers)
        real = numbers.where(self.is_real, 0).view_as(self.lists.columns)
        return self.lists.of_rows(real.sum(1))

    def dense(self) -> Tensor:
        """(B, d_sae) with zeros elsewhere, differentiable in the values."""
        if self.lists is not None:
            return self.lists.dense()
        out = self.values.new_zeros(len(self) * self.d_sae)
        return out.scatter(0, self.flat, self.values).view(len(self), self.d_sae)

    def l0(self) -> Tensor:
        """(B,) int64: number of non-zero values in each row."""
        if self.lists is not None:
            return self.lists.of_rows((self.lists.values.detach() != 0).sum(1))
        return torch.bincount(self.rows[self.values.detach() != 0], minlength=len(self))


def acts_as_gpu(tensor: Tensor) -> bool:
    """Return whether the host must not wait for results on a tensor's device."""
    return is_padded or tensor.device.type == "cuda"


def room(rows: Tensor, most: int | None) -> int | None:
    """Entries that each row of a selection has room for, where rows have the same; None: what each needs.

    Args:
        rows: (B, n) that it is made from; on a GPU the host sizes nothing.
        most: entries that a row is expected to have at most; None: not known.
    """
    if most is None or not acts_as_gpu(rows):
        return None
    return capacity_for(min(most, rows.shape[1]))


def _offsets(sorted_ids: Tensor, count: int) -> Tensor:
    """(n,) ids in 0..count-1 -> (count + 1,) where each id's run starts."""
    offsets = sorted_ids.new_zeros(count + 1)
    torch.cumsum(torch.bincount(sorted_ids, minlength=count), 0, out=offsets[1:])
    return offsets
