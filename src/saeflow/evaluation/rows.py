"""Rows of a store that are evaluated: their selection, one pass over them, their mean."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from saeflow.errors import UserError
from saeflow.sources.copies import Copies

_PIECE = 65_536  # rows of a column at a time


@dataclass(frozen=True, kw_only=True)
class RowSelection:
    """The policy on outlying rows, the same for every SAE and baseline of a store.

    Attributes:
        positions: of each context: all, the first alone, or the rest.
        norm_limit: leave out rows whose Euclidean norm is above it; None keeps all.
    """

    positions: Literal["all", "first", "rest"]
    norm_limit: float | None

    def keep(self, x: Tensor, positions: np.ndarray | None) -> Tensor:
        """(rows,) bool: which rows of `x` (rows, d_in) are evaluated; norms in float64."""
        kept = torch.ones(len(x), dtype=torch.bool, device=x.device)
        if self.positions != "all":
            if positions is None:
                raise UserError(
                    "evaluation.skip_first: the store has no column `position`. "
                    "Set it to false, or extract the store again."
                )
            is_first = torch.as_tensor(np.asarray(positions) == 0, device=x.device)
            kept &= is_first if self.positions == "first" else ~is_first
        if self.norm_limit is not None:
            kept &= torch.linalg.vector_norm(x.double(), dim=1) <= self.norm_limit
        return kept


@dataclass(frozen=True)
class RowStatistics:
    """Count and mean of the evaluated rows of a store.

    Attributes:
        rows: how many are evaluated.
        excluded: how many are left out.
        mean: (d_in,) float64, of the evaluated rows.
    """

    rows: int
    excluded: int
    mean: Tensor

    @property
    def excluded_fraction(self) -> float:
        return self.excluded / (self.rows + self.excluded)


@dataclass(frozen=True)
class RowBatch:
    """Some evaluated rows, in the order of the store.

    Attributes:
        numbers: (n,) their places in the store, ascending; n is at most the batch size and never 0.
        x: (n, d_in) float32 activations on the device.
        column: a column of the store for these rows, by its name.
    """

    numbers: np.ndarray
    x: Tensor
    column: Callable[[str], np.ndarray]


@dataclass(frozen=True)
class EvaluatedRows:
    """The rows of one store that every SAE and baseline is measured on, some at a time.

    Each iteration reads the store once, in order.

    Attributes:
        store: the open store.
        selection: which of its rows count.
        batch_size: rows at a time; does not change a result beyond rounding.
        device: where activations go.
    """

    store: Any
    selection: RowSelection
    batch_size: int
    device: str

    def __iter__(self) -> Iterator[RowBatch]:
        copies = Copies(self.device)
        selection = self.selection
        for start, batch in self.store.in_order(self.batch_size):
            rows = np.arange(start, start + len(batch))
            positions = (
                self.store.column("position", start, start + len(batch))
                if selection.positions != "all"
                else None
            )
            kept = selection.keep(batch.float(), positions)  # on the CPU: no wait for a GPU
            if not bool(kept.all()):
                batch, rows = batch[kept], rows[kept.numpy()]
            if len(rows):
                yield RowBatch(
                    rows,
                    copies.to_device(batch).to(torch.float32),
                    partial(self._column, rows),
                )

    def _column(self, rows: np.ndarray, name: str) -> np.ndarray:
        first, last = int(rows[0]), int(rows[-1]) + 1
        values: np.ndarray = self.store.column(name, first, last)[rows - first]
        return values

    def at(self, positions: Literal["first", "rest"]) -> "EvaluatedRows":
        """The rows at some positions of their contexts only, with the same limit of norms."""
        return replace(self, selection=replace(self.selection, positions=positions))

    @cached_property
    def contexts(self) -> int:
        """Contexts (texts, images, samples) of the store: 1 + the largest number of one."""
        starts = range(0, self.store.rows, _PIECE)
        pieces = (self.store.column("context", start, start + _PIECE) for start in starts)
        return max(int(piece.max()) for piece in pieces) + 1

    @cached_property
    def statistics(self) -> RowStatistics:
        """Count and mean of these rows, from one pass of bounded memory.

        The sum is taken of differences to the first row, in float64: rows that are all equal have
        exactly their own value as mean.

        Raises:
            UserError: no row is left.
        """
        count, first, total = 0, None, None
        for batch in self:
            x = batch.x.double()
            if first is None or total is None:
                first, total = x[0].clone(), torch.zeros_like(x[0])
            total += (x - first).sum(0)
            count += len(x)
        if first is None or total is None:
            raise self.none_left()
        return RowStatistics(count, self.store.rows - count, first + total / count)

    def none_left(self) -> UserError:
        """The error for a selection that leaves no row."""
        return UserError(
            f"{self.store.path}: none of its {self.store.rows} rows is left to evaluate. Set "
            "evaluation.skip_first to false, or raise evaluation.max_norm_multiple."
        )
