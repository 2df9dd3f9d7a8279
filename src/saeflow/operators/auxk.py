"""AuxK: dead latents learn to reconstruct what the live ones leave over."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saeflow.operators import gpu
from saeflow.operators.autograd import applied
from saeflow.operators.gpu import dead, dense, selection
from saeflow.operators.gpu.shadows import shadow
from saeflow.operators.gpu.weights import Left, OfRows, Walk
from saeflow.operators.sparse import SparseLatents, acts_as_gpu, room
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


def rebuild(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    centre: Tensor,
    W_dec: Tensor,
    active: Tensor,
    columns: Tensor,
    walk: Walk | None = None,
) -> Tensor:
    """Return the sum of some latents times their rows of W_dec, with the gradient of all weights that they come from.

    Products are in the precision of the latents: of copies of the rows, with no (B, d_sae) tensor.

    Args:
        x: (B, d_in).
        W_enc, b_enc, centre: (d_in, d_sae), (d_sae,) and (d_in,), by which pre-activations are (x - centre) W_enc + b_enc.
        W_dec: (d_sae, d_out).
        active: (B, n) the latents, constants, 0 where one is not active: pre-activations, of the columns.
        columns: (n,) int64, no column twice.
        walk: the step whose weights' gradients these are added to, if its decoder is W_dec.

    Returns:
        (B, d_out), dtype of the latents, differentiable in the weights, not in x.
    """
    is_lower = active.dtype == torch.bfloat16 and W_dec.dtype == torch.float32
    rows = (shadow(W_dec) if is_lower else W_dec.detach()).index_select(0, columns)
    weights: tuple[Tensor, ...] = (W_enc, b_enc, centre, W_dec)
    token, left = None, None
    if walk is not None and walk.left.W_dec is W_dec:
        (token, left), weights = walk, tuple(w.detach() for w in weights)
    return applied(_Rebuild, token, *weights, rows, x, active, columns, left)


def share_left(
    error: Tensor,
    e_hat: Tensor,
    number: Tensor,
    total: Callable[[Tensor], Tensor],
    rows: int,
) -> Tensor:
    """`residual_share` of minus an error (B, d_out), 0 where a number () is 0, for which the host does not wait.

    Args:
        rows: of the whole batch.
    """
    if gpu.serves(error) and gpu.serves_scores(e_hat):
        return dead.share(error, e_hat, number, total, rows)
    return residual_share(-error, e_hat, total).where(number > 0, 0)


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
    spread = total((residual - mean).square_().sum())
    is_defined = (spread > 0) & spread.isfinite()
    left = total(applied(_SquaredDistance, e_hat, residual, is_defined))
    return (left / spread.where(is_defined, 1)).where(is_defined, 0)


class _SquaredDistance(torch.autograd.Function):
    """|residual - e_hat|^2 summed over all entries, in two passes fewer than autograd takes."""

    @staticmethod
    def forward(ctx: Any, e_hat: Tensor, residual: Tensor, is_defined: Tensor) -> Tensor:
        off = e_hat - residual
        ctx.save_for_backward(off, is_defined)
        return off.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        off, is_defined = ctx.saved_tensors
        if not acts_as_gpu(off) and bool(is_defined):
            return off * (2 * grad), None, None
        return torch.where(is_defined, off * (2 * grad), 0), None, None


class _Rebuild(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor | None,
        W_enc: Tensor,
        b_enc: Tensor,
        centre: Tensor,
        W_dec: Tensor,
        rows: Tensor,
        x: Tensor,
        active: Tensor,
        columns: Tensor,
        left: Left | None,
    ) -> Tensor:
        ctx.save_for_backward(W_enc, centre, x, active, rows, columns)
        ctx.left, ctx.shape = left, W_dec.shape
        ctx.number = 0 if left is None else left.number()
        return active @ rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        W_enc, centre, x, active, rows, columns = ctx.saved_tensors
        of_active, of_b_enc = dead.where_active(grad @ rows.t(), active)
        of_W_enc = of_active.t() @ dense.centred(x, centre, active.dtype)
        is_trained = ctx.needs_input_grad[4] if ctx.left is None else ctx.left.W_dec.requires_grad
        of_W_dec = active.t() @ grad if is_trained else None
        if ctx.left is not None:
            ctx.left.of_rows[ctx.number] = OfRows(columns, of_W_enc, of_b_enc, of_W_dec)
            return (None,) * 10
        W, b = W_enc.new_zeros(W_enc.shape[::-1]), W_enc.new_zeros(W_enc.shape[1])
        dead.add_rows(W, columns, of_W_enc)
        dead.add_rows(b, columns, of_b_enc)
        if of_W_dec is not None:
            part, of_W_dec = of_W_dec, W_enc.new_zeros(ctx.shape)
            dead.add_rows(of_W_dec, columns, part)
        return None, W.t(), b, -(W_enc @ b), of_W_dec, None, None, None, None, None


def _check_dead(pre_acts: Tensor, dead: Tensor) -> None:
    if dead.dtype != torch.bool or dead.shape != pre_acts.shape[1:]:
        raise ValueError(
            f"dead must be bool {tuple(pre_acts.shape[1:])}, got {dead.dtype} {tuple(dead.shape)}"
        )
