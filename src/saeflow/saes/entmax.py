"""Entmax SAE: the sparsemax SAE with a sharpness between softmax and sparsemax, fixed or learned."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saeflow.config.options import option
from saeflow.operators import SparseLatents, entmax, entmax_of, entmax_sparse
from saeflow.saes.forward import Forward
from saeflow.saes.sparsemax import Sparsemax, SparsemaxOptions

_LEAST = 1e-3
"""A learned alpha stays so far above 1, where no finite number of entries has a probability of 0."""


@dataclass(frozen=True, kw_only=True)
class EntmaxOptions(SparsemaxOptions):
    """Options of `entmax`: those of `sparsemax` without the activation relu, and of the sharpness."""

    alpha: float = option(
        "Sharpness: 2 is sparsemax, and towards 1 it nears softmax.", above=1, high=2
    )
    is_alpha_learned: bool = option(
        "true: alpha is learned, from its option on, which must be below 2.", default=False
    )

    def problems(self, d_sae: int) -> Iterator[str]:
        yield from super().problems(d_sae)
        most = 1.999 if self.is_alpha_learned else 2
        if not 1.001 <= self.alpha <= most:
            yield (
                f"alpha: expected a number above 1 (at least 1.001) and up to {most}, found {self.alpha!r}."
            )
        if self.activation == "relu":
            yield "activation: expected weights or scores, found 'relu' (see sparsemax)."


class Entmax(Sparsemax):
    """z = ||c|| alpha-entmax(s), which is sparsemax at alpha = 2 and denser below.

    Source: Peters et al. 2019 (arXiv:1905.05702); learned alpha: Correia et al. 2019 (arXiv:1909.00015).
    """

    Options = EntmaxOptions

    def __init__(self, d_in: int, d_sae: int, options: EntmaxOptions) -> None:
        super().__init__(d_in, d_sae, options)
        alpha = options.alpha
        self.fixed_alpha = alpha
        raw = torch.tensor(alpha - 1.0).logit() if options.is_alpha_learned else None
        self.raw_alpha = None if raw is None else nn.Parameter(raw)

    @property
    def alpha(self) -> float | Tensor:
        """The sharpness now."""
        if self.raw_alpha is None:
            return self.fixed_alpha
        return 1 + self.raw_alpha.sigmoid().clamp(min=_LEAST)

    def probabilities(self, scores: Tensor) -> Tensor:
        return entmax(scores, self.alpha)

    def probabilities_of(self, scores: SparseLatents, sizes: Tensor | None = None) -> SparseLatents:
        found = entmax_of(scores, self.alpha)
        return found if sizes is None else found.scaled(sizes)

    def support(
        self, scores: Tensor, margin: Tensor | float, allowed: Tensor | None
    ) -> SparseLatents:
        return entmax_sparse(scores, self.alpha, margin, self.room, allowed)

    def facts(self, fwd: Forward) -> dict[str, float]:
        return super().facts(fwd) | {"alpha": float(torch.as_tensor(self.alpha).detach())}
