"""What SAEs with a sparsity penalty share: the path of a step follows how many latents are active."""

import torch
from torch import Tensor

from saeflow.saes.base import SAE, Forward

SPARSE_BELOW = 0.08
"""Share of active latents under which the sparse path is faster (benchmarks/training.py)."""


class Penalised(SAE):
    """At first half of the latents are active, later few: dense steps, then sparse ones.

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
        self.density.copy_(fwd.l0().float().mean() / self.d_sae)
