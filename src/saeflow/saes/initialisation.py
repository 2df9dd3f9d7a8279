"""Weights before the first step: the field's usual start, and those of released code."""

from typing import TYPE_CHECKING, Any, Literal

import torch

from saeflow.batch import Batch
from saeflow.operators import geometric_median

if TYPE_CHECKING:
    from saeflow.saes.contract import Contract

Initialisation = Literal["unit", "zero_bias", "short", "kaiming"]
INITIALISATION = (
    "First weights. unit: rows of W_dec of random directions and length 1, W_enc their transpose, b_enc 0, b_dec the "
    "geometric median of training rows; zero_bias: the same with b_dec 0 (Gated and JumpReLU of dictionary_learning); "
    "short: b_dec 0, rows of length 0.1, W_enc their transpose, b_enc uniform within 1 / sqrt(d_in) of 0 (Standard and "
    "P-anneal of dictionary_learning); kaiming: W_enc uniform within sqrt(6 / d_sae) of 0 and drawn on its own, rows of "
    "W_dec of length 1, b_enc 0, b_dec the geometric median (the ReLU SAE of the Sparsemax release)."
)
"""The meaning of an option `initialisation`."""
SHORT = 0.1  # length of a row, dictionary_learning's AutoEncoder


def initialise(
    sae: "Contract", how: str, batch: Batch | torch.Tensor, generator: torch.Generator
) -> None:
    """Set W_enc, b_enc, W_dec and b_dec; where targets have another width than inputs, W_enc has directions of its own.

    Args:
        how: see `INITIALISATION`.
        batch: training rows, as the SAE sees them.
    """
    with torch.no_grad():
        scale = SHORT if how == "short" else 1.0
        sae.W_dec.copy_(directions(sae.d_sae, sae.d_out, generator) * scale)
        if sae.d_out == sae.d_in:
            sae.W_enc.copy_(sae.W_dec.t())
        else:
            sae.W_enc.copy_((directions(sae.d_sae, sae.d_in, generator) * scale).t())
        sae.b_enc.zero_()
        if how == "short":
            uniform(sae.b_enc, sae.d_in**-0.5, generator)
        if how == "kaiming":
            uniform(sae.W_enc, kaiming(sae.d_sae), generator)
        if how in ("zero_bias", "short"):
            sae.b_dec.zero_()
        else:
            sae.b_dec.copy_(geometric_median(Batch.of(batch).target))


def directions(count: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Return random directions (count, width) of length 1."""
    drawn = torch.randn(count, width, generator=generator)
    result: torch.Tensor = drawn / drawn.norm(dim=1, keepdim=True)
    return result


def kaiming(fan_in: int) -> float:
    """Bound of `torch.nn.init.kaiming_uniform_` for relu: a standard deviation of sqrt(2 / fan_in)."""
    return float((6 / fan_in) ** 0.5)


def uniform(weights: torch.Tensor, bound: float, generator: torch.Generator) -> None:
    """Fill weights, whatever their memory layout, with numbers within `bound` of 0."""
    drawn: Any = torch.rand(weights.shape, generator=generator)
    weights.copy_((2 * drawn - 1) * bound)
