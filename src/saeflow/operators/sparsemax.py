"""Sparsemax: the probabilities closest to the scores, most of them exactly zero."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saeflow.operators import gpu, native
from saeflow.operators.autograd import applied
from saeflow.operators.gpu import on_lists, selection
from saeflow.operators.gpu.lists import Lists, capacity_for
from saeflow.operators.pre_acts import ROUNDED, is_exact, lowered
from saeflow.operators.rows import (
    GROUP,
    AllEntries,
    Entries,
    SomeEntries,
    as_rows,
    blocks,
    group_maxima,
    next_below,
    refuse_row,
    refuse_rows,
)
from saeflow.operators.sparse import SparseLatents, room

SLOTS = 1024  # of a row's support, for which the kernel has room
PROBLEMS = ("", "hold NaN", "hold inf", "are all -inf")  # by the kernel's numbers


def sparsemax(scores: Tensor) -> Tensor:
    """Project each row of scores on the probability simplex.

    p_i = max(scores_i - tau, 0), with tau chosen so that the row sums to 1. No row is sorted:
    the tau of the group maxima is a proven floor of tau, and tau is computed exactly, in float64,
    from the few entries above it.

    Args:
        scores: (..., n) floating point, n >= 1, dimensionless logits; -inf excludes an entry.

    Returns:
        (..., n) probabilities, dtype and device of `scores`. Differentiable: on
        the support S, dp_i/dscores_j = [i = j] - 1/|S|; zero elsewhere.

    Raises:
        TypeError: `scores` is not floating point.
        ValueError: a row (named) holds NaN or inf, or only -inf.

    Source: Martins & Astudillo 2016 (arXiv:1602.02068), eq. 2 and prop. 1; the iteration is
    Michelot 1986 (doi:10.1007/BF00938486).
    """
    return applied(_Sparsemax, scores)


Solve = Callable[[Tensor, Tensor, Tensor], Tensor]


def simplex_candidates(
    block: Tensor, scale: Tensor, solve: Solve, start: int
) -> tuple[Entries, Tensor, Tensor]:
    """The entries that can have a probability, and the threshold of each row.

    Args:
        block: (rows, n) scores, float32 or float64.
        scale: (rows,) float64 > 0, multiplies the scores.
        solve: (scaled scores (rows, m) with row maximum 0, scale, lower bound of tau (rows,))
            -> tau (rows,), which never falls when entries are added.
        start: index of the block's first row, for errors.

    Returns:
        candidates, their scaled scores relative to the row maximum (rows, m) float64, and tau
        (rows,) in the same units.
    """
    n = block.shape[1]
    size = GROUP if n >= 4 * GROUP else 1
    maxima = group_maxima(block, size) if size > 1 else block
    top = maxima.amax(1)
    refuse_rows(top.isnan(), start, "scores hold NaN")
    refuse_rows(top == float("inf"), start, "scores hold inf")
    refuse_rows(top == -float("inf"), start, "scores are all -inf")
    tau = torch.full_like(scale, -1.0)
    candidates: Entries = AllEntries()
    if size > 1:
        tau = solve((maxima.double() - top[:, None]) * scale[:, None], scale, tau)
        floor = (top + (tau - 1e-12) / scale).to(block.dtype)  # tau is solved to 1e-13
        candidates = SomeEntries.above(block, next_below(floor))
    entries = candidates.gather(block, -torch.inf).double()
    entries = (entries - top[:, None]) * scale[:, None]
    return candidates, entries, solve(entries, scale, tau)


def sparsemax_of(latents: SparseLatents, sizes: Tensor | None = None) -> SparseLatents:
    """`sparsemax` of the entries of each row, times its size (B,), if those that are absent would get 0."""
    if (lists := latents.lists) is not None:
        return latents.with_whole(on_lists.sparsemax(lists.values, lists.counts, sizes).view(-1))
    found = latents.map_rows(sparsemax)
    return found if sizes is None else found.scaled(sizes)


def sparsemax_sparse(
    scores: Tensor,
    margin: Tensor | float = 0.0,
    most: int | None = None,
    allowed: Tensor | None = None,
) -> SparseLatents:
    """The scores (B, n) to which `sparsemax` gives a probability, or may; not differentiable.

    Args, Raises: as `sparsemax`, with one leading dimension.
        margin: how far scores may lie from exact ones, see `pre_acts.rounding`.
        most: see `sparse.room`; then some others come with them, and nothing is raised for what a row holds.
        allowed: (n,) bool, the columns that count; None: all.
    """
    if (capacity := room(scores, most)) is not None:
        slack = ROUNDED * margin
        return SparseLatents.of(selection.near_simplex(scores, 1.0, capacity, slack, allowed))
    scores = only(scores, allowed)
    chosen = _support(scores)
    if is_exact(margin):
        return chosen
    tau = chosen.with_values(chosen.values - sparsemax_of(chosen).values).least()
    return SparseLatents.from_rows_above(scores, lowered(tau, margin))


def only(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Scores (B, n), -inf in the columns that an (n,) bool, if there is one, does not allow."""
    return scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)


def _support(scores: Tensor) -> SparseLatents:
    return simplex_support(scores, torch.ones(len(scores), dtype=torch.float64), sparsemax)


def simplex_support(
    scores: Tensor, scale: Tensor, operator: Callable[[Tensor], Tensor]
) -> SparseLatents:
    """The scores (B, n) to which an operator, entmax of 1 + scale (B,), gives a probability."""
    rows = as_rows(scores, "scores")
    if native.serves(rows):
        counts = torch.empty(len(rows), dtype=torch.int64)
        slots = torch.empty(len(rows), min(SLOTS, rows.shape[1]), dtype=torch.int32)
        if _solve_natively("simplex.support_rows", rows, scale, counts, slots):
            chosen = SparseLatents.room_for(counts)
            native.call("simplex.pack", rows, slots, *chosen)
            return SparseLatents(*chosen, rows.shape[1])
    if gpu.serves_scores(scores):
        found = simplex_on_gpu(scores, scale.to(scores.device))
        if found is not None:
            candidates, probabilities = found
            support = candidates.keep(probabilities.values > 0)
            return SparseLatents.from_lists(support).taken_from(scores)
    return SparseLatents.from_mask(scores, operator(scores) > 0)


def native_simplex(rows: Tensor, scale: Tensor) -> Tensor:
    """entmax of 1 + scale (rows,) by the compiled kernels, which take scores (rows, n)."""
    p = torch.empty_like(rows)
    _solve_natively("simplex.dense_rows", rows, scale, p)
    return p


def simplex_on_gpu(scores: Tensor, scale: Tensor) -> tuple[Lists, Lists] | None:
    """The scores (rows, n) that may count in entmax of 1 + scale (rows,), and their probabilities.

    None where a row has too many of them, or no solution, which the plain form names.
    """
    is_one = bool((scale == scale[0]).all())
    known = float(scale[0]) if is_one else scale.float()
    found = selection.near_simplex(scores, known, capacity_for(min(SLOTS, scores.shape[1])), 0)
    if found.status.any() or not found.counts.all():
        return None
    alpha = known + 1 if is_one else scale + 1
    return found, found.with_values(on_lists.entmax(found.values, found.counts, alpha))


def _solve_natively(kernel: str, rows: Tensor, *arguments: Tensor) -> bool:
    """Solve with the kernel and return whether it had room for every row; refuse rows without a solution."""
    found = native.spread(kernel, len(rows), rows, *arguments)
    for row, problem in found:
        refuse_row(row, "scores " + PROBLEMS[problem])
    return all(row == -1 for row, _ in found)


def _on_gpu(rows: Tensor) -> tuple[Lists, Lists] | None:
    ones = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
    return simplex_on_gpu(rows, ones) if gpu.serves_scores(rows) else None


def _solve(entries: Tensor, _: Tensor, tau: Tensor) -> Tensor:
    """Newton from below on the convex, piecewise linear sum: exact once the support settles.

    An entry that rounds to tau itself must not enter and leave in turn, so tau never falls.
    """
    support = torch.full_like(tau, -1)
    while True:
        on = entries > tau[:, None]
        size = on.sum(1, dtype=tau.dtype)
        if torch.equal(size, support):
            return tau
        support = size
        tau = tau.maximum((entries.where(on, 0).sum(1) - 1) / size)


class _Sparsemax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        rows = as_rows(scores, "scores")
        if native.serves(rows):
            p = native_simplex(rows, torch.ones(len(rows), dtype=torch.float64))
        elif (found := _on_gpu(rows)) is not None:
            p = found[1].dense()
        else:
            p = torch.zeros_like(rows)
            for at in blocks(rows):
                ones = rows.new_ones(at.stop - at.start, dtype=torch.float64)
                candidates, entries, tau = simplex_candidates(rows[at], ones, _solve, at.start)
                candidates.scatter((entries - tau[:, None]).clamp_(min=0), p[at])
        ctx.save_for_backward(p)
        return p.view(scores.shape).to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        rows = grad.reshape(p.shape)
        grad_scores = torch.zeros_like(p)
        for at in blocks(p):
            support = SomeEntries.above(p[at], p.new_zeros(at.stop - at.start))
            g = support.gather(rows[at].to(p.dtype), 0)
            mean = g.sum(1) / support.counts
            support.scatter(g - mean[:, None], grad_scores[at])
        return grad_scores.view(grad.shape).to(grad.dtype)
