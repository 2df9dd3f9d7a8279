"""Feature choice: each latent takes the rows of a batch on which it is largest, a number of them of its own."""

from typing import NamedTuple

import torch
from torch import Tensor

from saeflow.operators.sparse import acts_as_gpu


class Ordered(NamedTuple):
    """The largest entries of each column, and where the choice among them ends."""

    columns: Tensor  # (D, n) relu of the entries, largest first; D more than any count, or all rows
    least: Tensor  # (n,) the last one that is taken, inf where a column takes none
    following: Tensor  # (n,) the one after it, 0 where there is none

    @property
    def border(self) -> Tensor:
        """Return the number (n,) halfway between the last entry that is taken and the one after it, at least float32."""
        dtype = torch.promote_types(self.least.dtype, torch.float32)
        return (self.least.to(dtype) + self.following.to(dtype)) / 2


def allotment(weights: Tensor, total: Tensor | int, most: int) -> Tensor:
    """Divide a number of entries among columns, in proportion to weights as far as bounds allow.

    m_i is c w_i within low..most with the c at which they add up, low = 1 where there is one for every column, else 0.
    It is rounded down, and what is left goes to the largest remainders, of equal ones to the lower columns.

    Args:
        weights: (n,) above 0.
        total: () or a number, the entries; at most n * most are given.
        most: entries that a column may have, the rows of the batch.

    Returns:
        (n,) int64, on the device of the weights; the host waits for nothing.
    """
    weights = weights.double()
    total = torch.as_tensor(total, device=weights.device).double().clamp(max=len(weights) * most)
    low = (total >= len(weights)).double()
    # The sum of clamp(c w, low, most) is piecewise linear in c, and bends where a column reaches a bound.
    bends, order = torch.cat((low / weights, most / weights)).sort()
    slopes = torch.cat((weights, -weights))[order].cumsum(0)
    rises = slopes[:-1] * bends.diff()
    sums = torch.cat((low[None] * len(weights), low * len(weights) + rises.cumsum(0)))
    at = ((sums <= total).sum() - 1).clamp(min=0)
    slope = slopes[at]
    factor = bends[at] + ((total - sums[at]) / slope).where(slope > 1e-12 * weights.sum(), 0)
    exact = (factor * weights).clamp(min=low, max=torch.full_like(low, most))
    whole = (exact + 1e-9).floor()
    order = (whole - exact).argsort(stable=True)
    is_extra = torch.arange(len(weights), device=weights.device) < total - whole.sum()
    return whole.scatter_add(0, order, is_extra.double()).clamp(max=most).long()


def order_columns(values: Tensor, counts: Tensor) -> Ordered:
    """Order the entries of each column of (B, n) values, as far as a choice of counts (n,) needs.

    Args:
        values: floating point; entries that are not above 0 count as 0.
        counts: int64 in 0..B.

    Raises:
        ValueError: values hold NaN, where the host may look.
    """
    active = values.detach().relu()
    if acts_as_gpu(values):
        columns = active.sort(0, descending=True).values
    else:
        if active.isnan().any():
            raise ValueError("values hold NaN")
        columns = active.topk(min(len(active), int(counts.max()) + 1), dim=0).values
    last = (counts - 1).clamp(min=0)
    least = columns.gather(0, last[None])[0].where(counts > 0, torch.inf)
    after = counts.clamp(max=len(columns) - 1)
    following = columns.gather(0, after[None])[0].where(counts < len(active), 0)
    return Ordered(columns, least, following)


def choose_by_column(values: Tensor, counts: Tensor, least: Tensor) -> Tensor:
    """Mask (B, n) of the counts (n,) largest entries of each column, of those above 0.

    Of equal entries those of lower rows are chosen; where fewer are above 0, all of these are.

    Args:
        values: (B, n) floating point.
        least: (n,) the last entry that each column takes, see `Ordered`.
    """
    values = values.detach()
    above = (values > least) & (values > 0)
    ties = (values == least) & (values > 0)
    places = ties.cumsum(0, dtype=torch.int32)
    return above | (ties & (places <= counts - above.sum(0)))


def feature_choice(values: Tensor, counts: Tensor) -> Tensor:
    """Zero all entries but the counts_i largest ones above 0 of each column i.

    Args:
        values: (B, n) floating point.
        counts: (n,) int64 in 0..B.

    Returns:
        (B, n), dtype and device of `values`. Differentiable: the gradient passes unchanged through the kept entries and
        is zero elsewhere.

    Raises:
        ValueError: values hold NaN, where the host may look.

    Source: Ayonrinde 2024 (arXiv:2411.02124), the constraint that a feature matches with at most m tokens.
    """
    ordered = order_columns(values, counts)
    return values.where(choose_by_column(values, counts, ordered.least), 0)
