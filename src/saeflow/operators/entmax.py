"""alpha-entmax: sparse probabilities between softmax (alpha -> 1) and sparsemax (alpha = 2)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saeflow.operators import gpu, native
from saeflow.operators.autograd import applied
from saeflow.operators.gpu import on_lists, selection
from saeflow.operators.pre_acts import ROUNDED, is_exact, lowered
from saeflow.operators.rows import SomeEntries, as_rows, blocks, refuse_rows
from saeflow.operators.sparse import SparseLatents, room
from saeflow.operators.sparsemax import (
    native_simplex,
    only,
    simplex_candidates,
    simplex_on_gpu,
    simplex_support,
)

ITERATIONS = 1100  # bisection alone takes a float64 bracket this far; Newton needs about ten


def entmax(scores: Tensor, alpha: float | Tensor) -> Tensor:
    """Probabilities p_i = max((alpha - 1) scores_i - tau, 0)^(1 / (alpha - 1)).

    tau is chosen so that each row sums to 1, by bracketed Newton steps in float64 on the
    entries above a proven floor; no row is sorted. alpha = 2 is sparsemax.

    Args:
        scores: (..., n) floating point, n >= 1, dimensionless logits; -inf excludes an entry.
        alpha: > 1, a number or a floating point tensor that broadcasts to the leading shape.

    Returns:
        (..., n) probabilities, dtype and device of `scores`. Differentiable in both. With
        q = p^(2 - alpha) on the support, 0 elsewhere, and r = q / sum q:
        dp_i/dscores_j = q_i ([i = j] - r_j), and with h = -p log p
        dp_i/dalpha = (p_i - r_i) / (alpha - 1)^2 + (h_i - r_i sum h) / (alpha - 1).

    Raises:
        TypeError: `scores` or a tensor `alpha` is not floating point.
        ValueError: alpha <= 1 or not finite, or a row (named) holds NaN or inf, or only -inf.

    Source: Peters et al. 2019 (arXiv:1905.05702); gradient in alpha: Correia et al. 2019
    (arXiv:1909.00015), prop. 1.
    """
    if isinstance(alpha, Tensor) and not alpha.is_floating_point():
        raise TypeError(f"alpha must be floating point, got {alpha.dtype}")
    alpha = torch.as_tensor(alpha, dtype=torch.float64, device=scores.device)
    return applied(_Entmax, scores, alpha.expand(scores.shape[:-1]))


def entmax_of(latents: SparseLatents, alpha: float | Tensor) -> SparseLatents:
    """`entmax` of the entries of each row, if those that are absent would get 0."""
    if (lists := latents.lists) is None:
        return latents.map_rows(lambda rows: entmax(rows, alpha))
    return latents.with_whole(on_lists.entmax(lists.values, lists.counts, alpha).view(-1))


def entmax_sparse(
    scores: Tensor,
    alpha: float | Tensor,
    margin: Tensor | float = 0.0,
    most: int | None = None,
    allowed: Tensor | None = None,
) -> SparseLatents:
    """The scores (B, n) to which `entmax` gives a probability, or may; not differentiable.

    Args, Raises: as `entmax`, with one leading dimension.
        margin: how far scores may lie from exact ones, see `pre_acts.rounding`.
        most: see `sparse.room`; then some others come with them, and nothing is raised for what a row holds.
        allowed: (n,) bool, the columns that count; None: all.
    """
    if (capacity := room(scores, most)) is not None:
        scale = alpha.detach() - 1 if isinstance(alpha, Tensor) else alpha - 1
        slack = ROUNDED * margin
        return SparseLatents.of(selection.near_simplex(scores, scale, capacity, slack, allowed))
    scores = only(scores, allowed)
    chosen = _support(scores, alpha)
    if is_exact(margin):
        return chosen
    p = entmax_of(chosen, alpha).values
    scale = torch.as_tensor(alpha).detach() - 1
    tau = chosen.with_values(chosen.values - p**scale / scale).least()
    return SparseLatents.from_rows_above(scores, lowered(tau, margin))


def _support(scores: Tensor, alpha: float | Tensor) -> SparseLatents:
    alpha = torch.as_tensor(alpha, dtype=torch.float64).detach().expand(len(scores))
    return simplex_support(scores, alpha - 1, lambda rows: entmax(rows, alpha))


def _solve(entries: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    """Solve N(tau) = 1 for the norm N = (sum (entries - tau)_+^b)^(1/b), b = 1 / scale.

    For b >= 1 the norm is convex and falls, so Newton steps from below never pass the root; for
    b < 1 they may, and a step that leaves the bracket is replaced by its middle.
    """
    power = 1 / scale[:, None]
    high = -(torch.full_like(low, entries.shape[1]) ** -scale)  # the largest entry has p >= 1 / n
    tau, done = low, torch.zeros_like(low, dtype=torch.bool)
    for _ in range(ITERATIONS):
        excess = (entries - tau[:, None]).clamp(min=0)
        slope = _power(excess, power - 1).where(excess > 0, 0)
        total = (slope * excess).sum(1)
        low, high = torch.where(total >= 1, tau, low), torch.where(total < 1, tau, high)
        done = done | ((total - 1).abs() <= 1e-13) | (high - low <= 5e-16 * low.abs())
        if done.all():
            break
        step = tau + (total - total ** (1 - scale)) / slope.sum(1)
        step = torch.where((step > low) & (step <= high), step, (low + high) / 2)
        tau = torch.where(done, tau, step)
    return tau


def _power(base: Tensor, exponent: Tensor) -> Tensor:
    """base ** exponent, without the slow general power where alpha is 1.5 throughout."""
    if (exponent == 1).all():
        return base
    return base.square() if (exponent == 2).all() else base**exponent


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, alpha: Tensor) -> Tensor:
        rows = as_rows(scores, "scores")
        alpha = alpha.reshape(-1)
        refuse_rows(~((alpha > 1) & alpha.isfinite()), 0, "alpha must be finite and > 1", alpha)
        if native.serves(rows):
            p = native_simplex(rows, alpha - 1)
        elif gpu.serves_scores(rows) and (found := simplex_on_gpu(rows, alpha - 1)) is not None:
            p = found[1].dense()
        else:
            p = torch.zeros_like(rows)
            for at in blocks(rows):
                scale = alpha[at] - 1
                candidates, entries, tau = simplex_candidates(rows[at], scale, _solve, at.start)
                excess = (entries - tau[:, None]).clamp_(min=0)
                candidates.scatter(_power(excess, 1 / scale[:, None]), p[at])
        ctx.save_for_backward(p, alpha)
        return p.view(scores.shape).to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        p_rows, alpha = ctx.saved_tensors
        rows = grad.reshape(p_rows.shape)
        grad_scores, grad_alpha = torch.zeros_like(p_rows), torch.zeros_like(alpha)
        for at in blocks(p_rows):
            support = SomeEntries.above(p_rows[at], p_rows.new_zeros(at.stop - at.start))
            p = support.gather(p_rows[at], 0).double()
            g = support.gather(rows[at].to(p_rows.dtype), 0).double()
            scale = alpha[at, None] - 1
            q = torch.where(p > 0, p ** (1 - scale), 0)
            r = q / q.sum(1, keepdim=True)
            support.scatter(q * (g - (r * g).sum(1, keepdim=True)), grad_scores[at])
            if ctx.needs_input_grad[1]:
                h = -torch.special.xlogy(p, p)
                by_alpha = (p - r) / scale**2 + (h - r * h.sum(1, keepdim=True)) / scale
                grad_alpha[at] = (g * by_alpha).sum(1)
        grad_scores = grad_scores.view(grad.shape).to(grad.dtype)
        return grad_scores, grad_alpha.view(grad.shape[:-1])
