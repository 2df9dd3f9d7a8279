"""Soft top-k: a differentiable mask in [0, 1] that sums to a real k in each row (LapSum)."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saeflow.operators import gpu, native
from saeflow.operators.autograd import applied
from saeflow.operators.gpu import on_lists, selection
from saeflow.operators.pre_acts import ROUNDED, is_exact, lowered
from saeflow.operators.rows import (
    AllEntries,
    Entries,
    SomeEntries,
    as_rows,
    blocks,
    group_maxima,
    group_size,
    kth_largest,
    kth_largest_by_bisection,
    next_below,
    refuse_row,
    refuse_rows,
)
from saeflow.operators.sparse import SparseLatents, acts_as_gpu, room
from saeflow.operators.topk import topk_sparse

FAR, FAR_DOUBLE, FAR_SINGLE = 30.0, 80.0, 103.0
"""Temperatures from the threshold at which the mask counts as 0 or 1: it is 5e-14 there, in float64
9e-36, far below what a sum over the row can resolve. Beyond the last, float32 itself holds 0."""

ABSENT = "k exceeds the number of finite values"
NOT_FINITE = "values hold NaN or inf"
PROBLEMS = ("", NOT_FINITE, ABSENT)  # by the kernel's numbers


def soft_topk(
    values: Tensor, k: float | Tensor, temperature: float | Tensor, *, reach: float | None = None
) -> Tensor:
    """Mask p_i = F((values_i - b) / temperature) with b chosen so that each row sums to k.

    F is the Laplace distribution function: F(t) = exp(t) / 2 for t <= 0, 1 - exp(-t) / 2 above.
    No row is sorted: b is at least the 2 ceil(k)-th largest entry, so the group maxima give a
    proven floor; entries far below it have p < 5e-14 (9e-36 in float64), returned as exactly 0, and b is solved in
    float64 on the others.

    Args:
        values: (..., n) floating point, n >= 1; -inf excludes an entry.
        k: sum of the mask, real, 0 <= k <= n, a number or a tensor that broadcasts to the
            leading shape.
        temperature: > 0, in units of `values`; the mask tends to the hard top-k as it falls to 0. () float64 on
            the device, it is not looked at before kernels read it.
        reach: temperatures from b at which the mask counts as 0 or 1, at least that of None, the
            precision's own (30; 80 in float64). A longer one takes the plain path.

    Returns:
        (..., n) mask, dtype and device of `values`. Differentiable in values and k: with
        f_i = F'((values_i - b) / temperature) / temperature and w_i = f_i / sum f,
        dp_i/dvalues_j = f_i ([i = j] - w_j) and dp_i/dk = w_i.

    Raises:
        TypeError: `values` is not floating point.
        ValueError: temperature <= 0, or, naming the row, NaN or inf in `values`, or k outside
            0..n or above the number of finite entries. On a GPU, where naming it would take a wait, the
            row's mask is NaN.

    Source: LapSum, Struski et al. 2025 (arXiv:2503.06242), section 3; SoftSAE (arXiv:2605.06610).
    """
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if not isinstance(k, Tensor):
        k = torch.tensor(k, dtype=torch.float64)
    k = k.to(values.device).expand(values.shape[:-1])
    far = FAR_DOUBLE if values.dtype == torch.float64 else FAR
    return applied(_SoftTopK, values, k, temperature, max(far, reach or far))


def soft_topk_sparse(
    values: Tensor,
    k: Tensor,
    temperature: float | Tensor,
    margin: Tensor | float = 0.0,
    most: int | None = None,
    *,
    reach: float | None = None,
    of_relu: bool = False,
) -> SparseLatents:
    """The entries of values (B, n) whose mask is above 0, or may be where values are rounded.

    Args:
        values, k, temperature, reach: as for `soft_topk`, with k (B,).
        margin: how far values may lie from exact ones, see `pre_acts.rounding`.
        most: see `sparse.room`; then some others come with them, and the values are constants.
        of_relu: choose from relu of the values.

    Returns:
        The entries, with the gradient of `values`.
    """
    if (capacity := room(values, most)) is not None:
        of_rows = values, k.detach(), capacity, temperature, reach or FAR, ROUNDED * margin
        return SparseLatents.of(selection.near_rank(*of_rows, of_relu=of_relu))
    if of_relu:
        values = values.relu()
    if is_exact(margin):
        mask = soft_topk(values, k, temperature, reach=reach)
        return SparseLatents.from_mask(values, mask > 0)
    k = k.detach()
    least = topk_sparse(values.detach(), (k.ceil().long() + 1).clamp(max=values.shape[1])).least()
    below = temperature * ((k + 1).log() + (reach or FAR))  # see `selection.near_rank`
    return SparseLatents.from_rows_above(values, lowered(least, margin) - below)


def soft_latents(
    selected: SparseLatents, k: Tensor, temperature: float | Tensor, *, reach: float | None = None
) -> SparseLatents:
    """v times `soft_topk` of v, the relu of the entries of each row, if those that are absent would get 0."""
    if (lists := selected.lists) is None:
        v = selected.relu()
        mask = v.map_rows(lambda rows: soft_topk(rows, k, temperature, reach=reach))
        return v.with_values(v.values * mask.values)
    of_rows = lists.values, lists.counts, k, temperature
    return selected.with_whole(on_lists.soft(*of_rows, reach or on_lists.FAR).view(-1))


def _threshold(
    block: Tensor, k: Tensor, temperature: float | Tensor, start: int, reach: float
) -> tuple[Entries, Tensor, Tensor]:
    """The entries whose mask may be above 0, and b as an entry of the row plus an offset."""
    rank = k.ceil().long().clamp(min=1)
    size = group_size(block.shape[1], 2 * int(rank.max()))
    maxima = group_maxima(block, size) if size > 1 else block
    refuse_rows(~(maxima < torch.inf).all(1), start, NOT_FINITE)
    log_rest = torch.full_like(k, -torch.inf)
    if size == 1:
        guess = kth_largest_by_bisection(block, rank)
        refuse_rows(guess == -torch.inf, start, ABSENT)
        return AllEntries(), guess, _offset(block, k, guess, log_rest, temperature)
    floor = kth_largest(maxima, 2 * rank)
    far = floor - reach * temperature
    is_sparse = bool((maxima > far[:, None]).sum() <= maxima.numel() // 4)
    bound = far if is_sparse else floor
    solved = SomeEntries.above(block, next_below(bound))
    refuse_rows(solved.counts < rank, start, ABSENT)
    entries = solved.gather(block, -torch.inf)
    guess = kth_largest(entries, rank)
    if is_sparse:
        return solved, guess, _offset(entries, k, guess, log_rest, temperature)
    # Too many entries to solve for each: those below the floor act as one exponential in b.
    below = (block - floor[:, None]).div_(temperature)
    mass = torch.where(below < 0, below, -reach).clamp_(min=-reach).exp_().sum(1)
    log_rest = mass.double().log() + (floor.double() - guess) / temperature
    return AllEntries(), guess, _offset(entries, k, guess, log_rest, temperature)


def _offset(
    entries: Tensor, k: Tensor, guess: Tensor, log_rest: Tensor, temperature: float | Tensor
) -> Tensor:
    """b - guess in the dtype of the entries; `log_rest` is relative to the guess, see `_solve`."""
    x = (entries.double() - guess[:, None]) / temperature
    return (temperature * _solve(x, k, log_rest)).to(entries.dtype)


def _solve(x: Tensor, k: Tensor, log_rest: Tensor) -> Tensor:
    """Solve sum F(x - t) + exp(log_rest - t) / 2 = k for t (rows,), starting at 0.

    Between two neighbouring entries the sum is, in exp(t), a quadratic with one positive root,
    taken without cancellation. The root of one interval never overshoots the solution, and is the
    solution once it leaves the same entries above it, so no more steps are needed than entries
    are crossed. A row that has converged keeps its t.
    """
    t = torch.zeros_like(k)
    done = torch.zeros_like(k, dtype=torch.bool)
    for _ in range(x.shape[1] + 2):  # two to four in practice
        if done.all():
            break
        u = x - t[:, None]
        is_above = u > 0
        above = is_above.sum(1)
        log_above = torch.where(is_above, -u, -torch.inf).logsumexp(1)
        log_below = torch.where(is_above, -torch.inf, u).logsumexp(1).logaddexp(log_rest - t)
        extra = above - k  # mask in excess if all entries were at 0 or 1
        root = (extra**2 + (log_above + log_below).exp()).sqrt()
        step = torch.where(
            extra < 0,
            log_below - (root - extra).log(),
            torch.where(extra > 0, (root + extra).log() - log_above, (log_below - log_above) / 2),
        )
        t = torch.where(done, t, t + step)
        done = done | (step.abs() <= 1e-14 * (1 + t.abs())) | ((x > t[:, None]).sum(1) == above)
    # k = 0 or every finite entry: b is infinite, and any b this far gives the same mask
    lowest, highest = x.where(x.isfinite(), torch.inf).amin(1), x.amax(1)
    return t.clamp(lowest - 10 * FAR_DOUBLE, highest + 10 * FAR_DOUBLE)


def _distance(
    entries: Tensor, guess: Tensor, offset: Tensor, temperature: float | Tensor
) -> Tensor:
    """(entries - b) / temperature; near b the first difference is exact, whatever b's size."""
    return (entries - guess[:, None]).sub_(offset[:, None]).div_(temperature)


def _tail(minus_distance: Tensor, reach: float) -> Tensor:
    """F(-|t|), exactly 0 from far away on."""
    half = minus_distance.clamp(min=-reach).exp_().div_(2)
    return torch.threshold_(half, math.exp(-reach) * 0.50001, 0.0)


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, k: Tensor, temperature: float | Tensor, reach: float
    ) -> Tensor:
        rows = as_rows(values, "values")
        k = k.detach().reshape(-1).double()
        is_wrong = ~((k >= 0) & (k <= rows.shape[1]))
        is_read = not (acts_as_gpu(rows) and gpu.serves_scores(rows))
        if is_read:
            refuse_rows(is_wrong, 0, f"k must be in 0..{rows.shape[1]}", k)
        guess, offset, nearest = rows.new_zeros(3, len(rows))
        ctx.near, ctx.temperature, ctx.reach = [], temperature, reach
        ctx.is_native = native.serves(rows) and reach == FAR
        if ctx.is_native:
            mask = torch.empty_like(rows)
            arrays = (rows, k, np.float32(float(temperature)), mask, guess, offset)
            for row, problem in native.spread("soft.mask_rows", len(rows), *arrays):
                refuse_row(row, PROBLEMS[problem])
            ctx.save_for_backward(values, guess, offset)
            return mask.view(values.shape).to(values.dtype)
        if gpu.serves_scores(rows):
            mask, problems = torch.empty_like(rows), torch.empty_like(k, dtype=torch.int32)
            of_row = (
                k.contiguous(),
                gpu.on_device(temperature, torch.float32, rows),
                reach,
                mask,
                guess,
                offset,
                nearest,
            )
            gpu.launch_rows("soft_rows", rows, *of_row, problems, guess, OF_RELU=False)
            for number, problem in enumerate(PROBLEMS[1:] if is_read else (), 1):
                refuse_rows(problems == number, 0, problem)
            if not is_read:
                mask.masked_fill_((is_wrong | (problems > 0))[:, None], torch.nan)
            ctx.save_for_backward(values, guess, offset, nearest)
            return mask.view(values.shape).to(values.dtype)
        mask = torch.zeros_like(rows)
        for at in blocks(rows):
            near, guess[at], offset[at] = _threshold(rows[at], k[at], temperature, at.start, reach)
            entries = near.gather(rows[at], -torch.inf)
            t = _distance(entries, guess[at], offset[at], temperature)
            tail = _tail(t.abs().neg_(), reach)
            near.scatter(torch.where(t > 0, 1 - tail, tail), mask[at])
            ctx.near.append((at, near))
        ctx.save_for_backward(values, guess, offset)
        return mask.view(values.shape).to(values.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        values, guess, offset, *nearest = ctx.saved_tensors
        rows = as_rows(values, "values")
        grad_rows = grad.reshape(rows.shape).to(rows.dtype)
        grad_values, grad_k = torch.zeros_like(rows), torch.zeros_like(guess)
        if ctx.is_native:
            arrays = (
                rows,
                grad_rows.contiguous(),
                guess,
                offset,
                np.float32(float(ctx.temperature)),
            )
            native.spread("soft.gradient_rows", len(rows), *arrays, grad_values, grad_k)
        elif gpu.serves_scores(rows):
            of_row = (
                grad_rows.contiguous(),
                guess,
                offset,
                *nearest,
                gpu.on_device(ctx.temperature, torch.float32, rows),
            )
            out = (ctx.reach, grad_values, grad_k)
            gpu.launch_rows("soft_gradient_rows", rows, *of_row, *out, grad_k, OF_RELU=False)
        for at, near in ctx.near:
            g = near.gather(grad_rows[at], 0)
            entries = near.gather(rows[at], -torch.inf)
            t = _distance(entries, guess[at], offset[at], ctx.temperature).abs_().neg_()
            mean = (t.softmax(1) * g).sum(1)  # f / sum f, also where every f is below float range
            tail = _tail(t, ctx.reach)
            near.scatter(tail * (g - mean[:, None]) / ctx.temperature, grad_values[at])
            grad_k[at] = mean
        return grad_values.view(grad.shape).to(grad.dtype), grad_k.view(grad.shape[:-1]), None, None
