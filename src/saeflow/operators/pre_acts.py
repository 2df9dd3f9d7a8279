"""The encoder's product on the dense path, without the product that its input's bias would cost."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from saeflow.operators.autograd import applied
from saeflow.operators.gpu import dense, margins
from saeflow.operators.gpu.shadows import multiplies_in_bf16, shadow
from saeflow.operators.sparse import acts_as_gpu

ROUNDED = 4
"""Times `rounding`, what `lowered` takes from a threshold of six root mean squares: few latents reach that."""


def pre_acts(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """a = (x - b_dec) W_enc + b_enc.

    Args:
        x: (B, d_in).
        W_enc: (d_in, d_sae); its gradient is laid out by columns, as `W_enc.t()` contiguous is.
        b_enc: (d_sae).
        b_dec: (d_in).

    Returns:
        (B, d_sae), of lower precision under autocast. Differentiable; db_dec = -W_enc db_enc, where
        autograd alone would multiply (B, d_sae) by W_enc^T and sum the rows.
    """
    return applied(_PreActs, x, W_enc, b_enc, b_dec, _lower(W_enc))


def _lower(weights: Tensor) -> Tensor | None:
    """Return the copy of weights that a product in bfloat16 takes on a GPU, where copies are kept."""
    is_float32 = weights.dtype == torch.float32
    is_kept = multiplies_in_bf16(weights) and is_float32 and acts_as_gpu(weights)
    return shadow(weights) if is_kept else None


def perceptron(
    x: Tensor,
    hidden: nn.Linear,
    output: nn.Linear,
    centre: Tensor,
    within: tuple[float, float, float],
) -> Tensor:
    """Return largest sigmoid(output(relu(hidden(x - centre)))) (B,), whose hidden layer may be of lower precision; the rest is not.

    Args:
        x: (B, d_in).
        hidden: (d_in) to (n).
        output: (n) to (1).
        centre: (d_in).
        within: `largest`, and the least and the most that the result may be.

    Returns:
        (B,) in the dtype of the weights, with gradient.
    """
    matrix, weights = hidden.weight.t(), output.weight
    if acts_as_gpu(x) and weights.dtype == torch.float32 and not x.requires_grad:
        of_hidden = matrix, hidden.bias, centre
        return dense.perceptron(x, *of_hidden, weights, output.bias, within, _lower(matrix))
    features = pre_acts(x, matrix, hidden.bias, centre).relu()
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 is 2 apart near 256
        share = output(features.to(weights.dtype))[:, 0].sigmoid()
    largest, least, most = within
    result: Tensor = (largest * share).clamp(least, most)
    return result


def rounding(inputs: Tensor, centre: Tensor, W_enc: Tensor) -> Tensor:
    """() how far scores of a bfloat16 product may lie from those of float32 ones.

    Rounding two factors changes a product of (B, d_in) inputs and unit rows by 0.0023 of the inputs' root
    mean square (standard deviation); this is seven of those. The result's own rounding is `lowered`'s.

    Args:
        inputs: (B, d_in), of which W_enc (d_in, d_sae) is multiplied with inputs - centre.
        centre: (d_in,).
    """
    lower = _lower(W_enc)
    times = 2**-6 / (inputs.numel() * W_enc.shape[1]) ** 0.5
    with torch.autocast(
        inputs.device.type, enabled=False
    ):  # which would make a float32 copy of the bfloat16 one
        return margins.of_norms(inputs, centre, W_enc if lower is None else lower, times)


def is_exact(margin: Tensor | float) -> bool:
    """Return whether scores are exact products of weights and inputs: their margin is the number 0, not a measured one."""
    return isinstance(margin, float) and margin == 0


def lowered(
    threshold: Tensor, margin: Tensor | float, below: float = 0.0, *, of_log: bool = False
) -> Tensor:
    """The score that a latent at a threshold, or so far below it, may have in bfloat16, given `rounding`; in float32, given 0.0.

    Args:
        threshold: of any shape.
        margin: of the scores.
        below: a distance.
        of_log: thresholds are given as their logs.
    """
    if is_exact(margin):
        return margins.shifted(threshold, below, of_log=of_log)
    return margins.lowered(threshold, margin, 2**-7, below, of_log=of_log)


class _PreActs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, lower: Tensor | None
    ) -> Tensor:
        if lower is None:
            centred = x - b_dec
            a = torch.addmm(b_enc, centred, W_enc)
        else:
            centred = dense.centred(x, b_dec, lower.dtype)
            a = torch.addmm(b_enc.to(lower.dtype), centred, lower)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(centred.to(a.dtype), W_enc)
        ctx.lower = lower  # written after the backward pass
        return a

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        centred, W_enc = ctx.saved_tensors
        grad_b_enc = grad.sum(0, dtype=W_enc.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            weights = W_enc.to(grad.dtype) if ctx.lower is None else ctx.lower
            grad_x = (grad @ weights.t()).to(W_enc.dtype)
        grad_W = (grad.t() @ centred).to(W_enc.dtype).t() if ctx.needs_input_grad[1] else None
        return grad_x, grad_W, grad_b_enc, -(W_enc @ grad_b_enc), None
