"""AuxK: dead latents learn to reconstruct what the live ones leave over."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saeflow.operators.autograd import applied
from saeflow.operators.gpu import selection
from saeflow.operators.sparse import SparseLatents, room
from saeflow.operators.topk import keep_topk, topk_sparse


def auxk_loss(
    residual: Tensor, pre_acts: Tensor, W_dec: Tensor, dead: Tensor, k_aux: int | None = None
) -> Tensor:
    """Normalised error of the residual rebuilt from the top dead latents.

    Args:
        residual: (B, d_in) x - x_hat; taken as a constant.
        pre_acts: (B, d_sae) encoder pre-activations.
        W_dec: (d_sae, d_in).
        dead: (d_sae,) bool.
        k_aux: dead latents per row, at most the number dead; None: d_in // 2 (the paper's).

    Returns:
        () mean ||e - e_hat||^2 / mean ||e - mean e||^2, where e_hat = relu(z) W_dec over the k_aux
        largest dead pre-activations of each row, without bias. Differentiable in `pre_acts` and
        `W_dec`. With no dead latent, or where the ratio is undefined (all residuals equal, or not
        a number), it is 0 with gradient 0.

    Raises:
        ValueError: shapes do not fit together, `dead` is not bool, k_aux < 0, or a row (named) of
            the dead pre-activations holds NaN.

    Source: Gao et al. 2024 (arXiv:2406.04093), appendix A.2.
    """
    _check_dead(pre_acts, dead)
    k_aux = residual.shape[-1] // 2 if k_aux is None else k_aux
    columns = dead.nonzero()[:, 0]
    acts, directions = pre_acts[:, columns], W_dec[columns]
    if len(columns) == 0:
        return acts.sum() + directions.sum()  # sums of nothing, with gradient
    return residual_share(residual, keep_topk(acts.relu(), k_aux) @ directions)


def select_auxk(
    pre_acts: Tensor, dead: Tensor, k_aux: int, most: int | None = None
) -> SparseLatents:
    """The k_aux largest dead pre-activations of each row, of those that a relu leaves positive.

    For the sparse path: choose here without gradient, give the choice to `gather_pre_acts` and
    what it decodes to to `residual_share`, so that no (B, d_sae) gradient is built.

    Args, Raises: as `auxk_loss`.
        most: see `sparse.room`.

    Returns:
        At most min(k_aux, number dead) entries per row of (B, d_sae), all positive: the others
        add nothing to the reconstruction or to a gradient.
    """
    _check_dead(pre_acts, dead)
    if (capacity := room(pre_acts, most)) is not None:
        chosen = selection.topk(pre_acts, k_aux, capacity, allowed=dead, is_positive=True)
        return SparseLatents.of(chosen)
    columns = dead.nonzero()[:, 0]
    if len(columns) == 0:
        nothing = pre_acts.new_empty(0)
        return SparseLatents.from_positions(columns, nothing, *pre_acts.shape)
    top = topk_sparse(pre_acts[:, columns], k_aux)
    active = top.values > 0
    flat = top.rows[active] * len(dead) + columns[top.columns[active]]
    return SparseLatents.from_positions(flat, top.values[active], *pre_acts.shape)


def first_of(dead: Tensor, count: int) -> Tensor:
    """Return the columns of the first `count` dead latents, ascending, then of live ones if there are fewer.

    Args:
        dead: (d_sae,) bool.
        count: at most d_sae.

    Returns:
        (count,) int64, no column twice; the host waits for nothing.
    """
    return (~dead).to(torch.uint8).sort(stable=True).indices[:count]


def keep_largest(active: Tensor, k: int) -> Tensor:
    """Zero all but the k largest positive entries of each row, as `keep_topk` does, for which the host does not wait.

    Args:
        active: (B, n), none below 0.
        k: one for all rows.

    Returns:
        (B, n), with the gradient of the entries that are kept.
    """
    return applied(_KeepLargest, active, k)


def residual_share(
    residual: Tensor, e_hat: Tensor, total: Callable[[Tensor], Tensor] = lambda part: part
) -> Tensor:
    """Squared error of e_hat (B, d_in) over the spread of the residual (B, d_in), 0 where undefined.

    Args:
        total: the sum over a whole batch from that over these rows, where they are not all of it.

    Returns:
        (), differentiable in e_hat; the residual is taken as a constant.
    """
    residual = residual.detach()
    mean = total(residual.sum(0)) / total(residual.new_full((), len(residual)))
    spread = total((residual - mean).square().sum())
    is_defined = (spread > 0) & spread.isfinite()
    residual = residual.where(is_defined, 0)
    ratio = total((residual - e_hat).square().sum()) / spread.where(is_defined, 1)
    return ratio.where(is_defined, 0)


class _KeepLargest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, active: Tensor, k: int) -> Tensor:
        kept = selection.keep_largest(active, k)
        ctx.save_for_backward(kept)
        return kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return grad.where(kept > 0, 0), None


def _check_dead(pre_acts: Tensor, dead: Tensor) -> None:
    if dead.dtype != torch.bool or dead.shape != pre_acts.shape[1:]:
        raise ValueError(
            f"dead must be bool {tuple(pre_acts.shape[1:])}, got {dead.dtype} {tuple(dead.shape)}"
        )
