"""The orthogonality penalty of a run: chunks of latents that are drawn anew in every step (OrtSAE, arXiv:2509.22033)."""

import math

import torch
from torch import Tensor

from saeflow.config import SAEConfig
from saeflow.errors import UserError
from saeflow.operators import orthogonality
from saeflow.saes import SAE


class Orthogonality:
    """The penalty of one run, whose chunks follow from the run's seed and the number of the step.

    ceil(d_sae / orthogonality_chunk) chunks are as equal in size as can be. The order of latents lies in one tensor
    for the whole run, so that a step recorded on a GPU reads the new one.
    """

    def __init__(self, sae: SAE, seed: int) -> None:
        self.sae, self.seed = sae, seed
        chunks = math.ceil(sae.d_sae / sae.orthogonality_chunk)
        self.size = math.ceil(sae.d_sae / chunks)
        self.order = torch.arange(sae.d_sae, device=sae.W_dec.device)

    @classmethod
    def of(cls, sae: SAE, config: SAEConfig) -> "Orthogonality | None":
        """Return the penalty of a run, None where its weight is 0.

        Raises:
            UserError: the latents are divided among processes, or there is a single latent.
        """
        if sae.orthogonality_weight == 0:
            return None
        where = f"saes.{config.entry}.options.orthogonality_weight"
        if not sae.has_all_latents:
            raise UserError(
                f"{where}: expected 0 where runtime.ranks.split is latents, since chunks are drawn from all latents, found "
                f"{sae.orthogonality_weight}. Set runtime.ranks.split to batch."
            )
        if sae.d_sae < 2:
            raise UserError(f"{where}: expected 0 for a single latent (d_sae).")
        return cls(sae, config.seed)

    def begin(self, step: int) -> None:
        """Draw the chunks of a step; with a single chunk there is nothing to draw."""
        if self.size < self.sae.d_sae:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            self.order.copy_(torch.randperm(self.sae.d_sae, generator=generator))

    def loss(self) -> Tensor:
        """Return the weighted term of the loss, which no row of the batch decides."""
        penalty = orthogonality(self.sae.directions(), self.order, self.size)
        return self.sae.orthogonality_weight * self.sae.counted_once(penalty)
