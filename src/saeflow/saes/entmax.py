"""Entmax SAE: the sparsemax SAE with a sharpness between softmax and sparsemax, fixed or learned."""

from typing import Any

import torch
from torch import Tensor, nn

from saeflow.errors import UserError
from saeflow.operators import SparseLatents, entmax, entmax_of, entmax_sparse
from saeflow.saes.base import Forward
from saeflow.saes.sparsemax import Sparsemax

_LEAST = 1e-3
"""A learned alpha stays so far above 1, where no finite number of entries has a probability of 0."""


class Entmax(Sparsemax):
    """z = ||c|| alpha-entmax(s), which is sparsemax at alpha = 2 and denser below.

    Source: Peters et al. 2019 (arXiv:1905.05702); learned alpha: Correia et al. 2019 (arXiv:1909.00015).

    Args:
        alpha: in (1, 2].
        is_alpha_learned: alpha = 1 + sigmoid(a), from this alpha on, which must be below 2.
        architecture, query, score_scale, max_rate, rate_mask, loss, l1, l1_schedule, beta2, initialisation:
            as for Sparsemax.
        activation: weights or scores, as for Sparsemax.
    """

    def __init__(
        self, d_in: int, d_sae: int, *, alpha: float, is_alpha_learned: bool, **options: Any
    ) -> None:
        super().__init__(d_in, d_sae, **options)
        most = 1.999 if is_alpha_learned else 2
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not is_number or not 1.001 <= alpha <= most:
            raise UserError(
                f"alpha: expected a number above 1 (at least 1.001) and up to {most}, found {alpha!r}."
            )
        if self.activation == "relu":
            raise UserError("activation: expected weights or scores, found 'relu' (see sparsemax).")
        self.fixed_alpha = float(alpha)
        raw = torch.tensor(alpha - 1.0).logit() if is_alpha_learned else None
        self.raw_alpha = None if raw is None else nn.Parameter(raw)

    @property
    def alpha(self) -> float | Tensor:
        """The sharpness now."""
        if self.raw_alpha is None:
            return self.fixed_alpha
        return 1 + self.raw_alpha.sigmoid().clamp(min=_LEAST)

    def probabilities(self, scores: Tensor) -> Tensor:
        return entmax(scores, self.alpha)

    def probabilities_of(self, scores: SparseLatents) -> SparseLatents:
        return entmax_of(scores, self.alpha)

    def support(self, scores: Tensor, margin: Tensor | float) -> SparseLatents:
        return entmax_sparse(scores, self.alpha, margin, self.room)

    def facts(self, fwd: Forward) -> dict[str, float]:
        return super().facts(fwd) | {"alpha": float(torch.as_tensor(self.alpha).detach())}
