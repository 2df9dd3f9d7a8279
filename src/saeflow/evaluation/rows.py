"""Selection of the rows of a store that are evaluated, and their mean."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from saeflow.errors import UserError
from saeflow.sources.copies import Copies


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


def selected_rows(
    store: Any, selection: RowSelection, batch_size: int, device: str
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Walk a store in order.

    Yields:
        Row numbers in the store (n,), and their activations (n, d_in) float32 on `device`; n is at
        most `batch_size`, and never 0.
    """
    copies = Copies(device)
    for start, batch in store.in_order(batch_size):
        rows = np.arange(start, start + len(batch))
        positions = (
            store.column("position", start, start + len(batch))
            if selection.positions != "all"
            else None
        )
        kept = selection.keep(batch.float(), positions)  # on the CPU: a GPU need not be waited for
        if not bool(kept.all()):
            batch, rows = batch[kept], rows[kept.numpy()]
        if len(rows):
            yield rows, copies.to_device(batch).to(torch.float32)


def row_statistics(
    store: Any, selection: RowSelection, batch_size: int, device: str
) -> RowStatistics:
    """Count the evaluated rows and take their mean, in one pass of bounded memory.

    The sum is taken of differences to the first row, in float64: rows that are all equal have
    exactly their own value as mean.

    Raises:
        UserError: no row is left.
    """
    rows, first, total = 0, None, None
    for _, x in selected_rows(store, selection, batch_size, device):
        x = x.double()
        if first is None or total is None:
            first, total = x[0].clone(), torch.zeros_like(x[0])
        total += (x - first).sum(0)
        rows += len(x)
    if first is None or total is None:
        raise UserError(
            f"{store.path}: none of its {store.rows} rows is left to evaluate. Set "
            "evaluation.skip_first to false, or raise evaluation.max_norm_multiple."
        )
    return RowStatistics(rows, store.rows - rows, first + total / rows)
