"""The path of a step follows how many latents were active in the last one."""

import torch
from torch import Tensor

from saeflow.saes.base import SAE, Forward

SPARSE_BELOW = 0.15
"""Share of active latents under which the sparse path is faster (benchmarks/steps.py)."""


class FollowsDensity(SAE):
    """Where many latents are active at first, and few later: dense steps, then sparse ones.

    Attributes:
        density: share of the latents that were active in the last batch; saved, so that a run that is
            resumed takes the same path.
    """

    density: Tensor

    def __init__(self, d_in: int, d_sae: int) -> None:
        super().__init__(d_in, d_sae)
        self.register_buffer("density", torch.ones(()))

    @property
    def is_sparse(self) -> bool:
        return float(self.density) < SPARSE_BELOW

    @torch.no_grad()
    def end_step(self, fwd: Forward) -> None:
        active = self.ranks.over_both(fwd.l0().sum())
        latents = self.d_sae * self.ranks.of_latents
        self.density.copy_(active.float() / self.ranks.rows(fwd.x) / latents)
