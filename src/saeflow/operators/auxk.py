"""AuxK: dead latents learn to reconstruct what the live ones leave over."""

import torch
from torch import Tensor

from saeflow.operators.sparse import SparseLatents, decode_sparse
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
    columns = dead.nonzero()[:, 0]
    return auxk_loss_dead(residual, pre_acts[:, columns], W_dec[columns], k_aux)


def auxk_loss_dead(
    residual: Tensor, pre_acts: Tensor, W_dec: Tensor, k_aux: int | None = None
) -> Tensor:
    """`auxk_loss` of the dead latents alone: pre_acts (B, dead), W_dec (dead, d_in); dense products."""
    k_aux = residual.shape[-1] // 2 if k_aux is None else k_aux
    if len(W_dec) == 0:
        return pre_acts.sum() + W_dec.sum()  # sums of nothing, with gradient
    return _share(residual, keep_topk(pre_acts.relu(), k_aux) @ W_dec, some_dead=True)


def select_auxk(pre_acts: Tensor, dead: Tensor, k_aux: int) -> SparseLatents:
    """The k_aux largest dead pre-activations of each row, of those that a relu leaves positive.

    For the sparse path: choose here without gradient, give the choice to `gather_pre_acts` and
    its result to `auxk_loss_sparse`, so that no (B, d_sae) gradient is built.

    Args, Raises: as `auxk_loss`.

    Returns:
        At most min(k_aux, number dead) entries per row of (B, d_sae), all positive: the others
        add nothing to the reconstruction or to a gradient.
    """
    _check_dead(pre_acts, dead)
    columns = dead.nonzero()[:, 0]
    if len(columns) == 0:
        nothing = pre_acts.new_empty(0)
        return SparseLatents.from_positions(columns, nothing, *pre_acts.shape)
    top = topk_sparse(pre_acts[:, columns], k_aux)
    active = top.values > 0
    flat = top.rows[active] * len(dead) + columns[top.columns[active]]
    return SparseLatents.from_positions(flat, top.values[active], *pre_acts.shape)


def auxk_loss_sparse(
    residual: Tensor, latents: SparseLatents, W_dec: Tensor, dead: Tensor
) -> Tensor:
    """`auxk_loss` of dead latents already chosen, differentiable in their values and `W_dec`."""
    e_hat = decode_sparse(latents.with_values(latents.values.relu()), W_dec)
    return _share(residual, e_hat, bool(dead.any()))


def _share(residual: Tensor, e_hat: Tensor, some_dead: bool) -> Tensor:
    """() squared error of e_hat (B, d_in) over the spread of the residual, 0 where undefined."""
    residual = residual.detach()
    spread = (residual - residual.mean(0)).square().sum()
    is_defined = (spread > 0) & spread.isfinite() & some_dead
    residual = residual.where(is_defined, 0)
    ratio = (residual - e_hat).square().sum() / spread.where(is_defined, 1)
    return ratio.where(is_defined, 0)


def _check_dead(pre_acts: Tensor, dead: Tensor) -> None:
    if dead.dtype != torch.bool or dead.shape != pre_acts.shape[1:]:
        raise ValueError(
            f"dead must be bool {tuple(pre_acts.shape[1:])}, got {dead.dtype} {tuple(dead.shape)}"
        )
