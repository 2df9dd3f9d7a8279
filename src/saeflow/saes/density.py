"""The path of a step follows how many latents were active before it."""

from typing import Any

import torch
from torch import Tensor

from saeflow.operators import acts_as_gpu
from saeflow.saes.base import SAE
from saeflow.saes.forward import Forward

SPARSE_BELOW = 0.15
"""Share of active latents under which the sparse path is faster (benchmarks/steps.py)."""
SPARSE_BELOW_ON_GPU = 160
"""Active latents of an input under which the sparse path is taken on a GPU: a TopK step of 128 was measured at 7
encoder products there, a dense step of ReLU is aimed at 10."""
MOST_WIDENED = 4
"""Times the room at first, beyond which a step that lacks some, and those up to the next line of the log, are dense."""
MOST, LEAST = 1.5, 8
"""Times the mean, and so many more, latents of one input: a GPU makes room for these, and for rows with more some spare."""
_FIRST_ROWS = 64  # that the first step's path is decided from


class FollowsDensity(SAE):
    """Mixin for variants with many active latents at first and few later: dense steps, then sparse ones.

    Attributes:
        density: () share of the latents that were active when the path was last decided, -1 before the first
            step; saved, so that a run that is resumed takes the same path.
        active: () int64, latents that were active in the last batch's rows of this process.
        counted: the number of rows of that whole batch, 0 before the first.
    """

    forgets_latents = True
    density: Tensor
    active: Tensor

    def __init__(self, d_in: int, d_sae: int) -> None:
        super().__init__(d_in, d_sae)
        self.register_buffer("density", -torch.ones(()))
        self.register_buffer("active", torch.zeros((), dtype=torch.int64), persistent=False)
        self.counted = 0
        self.known: float | None = None  # `density` on the host
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    @property
    def is_sparse(self) -> bool:
        if self.known is None:
            self.known = float(self.density)
        below = SPARSE_BELOW
        if acts_as_gpu(self.density):
            below = min(below, SPARSE_BELOW_ON_GPU / self.d_sae)
        return 0 <= self.known < below

    def dials(self) -> dict[str, object]:
        return {**super().dials(), "known": None, "counted": 0}

    @property
    def most(self) -> int:
        known = 1.0 if self.known is None or self.known < 0 else self.known
        return min(round(MOST * known * self.d_sae) + LEAST, self.d_sae)

    def widen(self) -> None:
        if self.widened < MOST_WIDENED:
            super().widen()
        else:
            self.density.fill_(1.0)
            self.known = 1.0

    def settle(self) -> None:
        if self.counted:
            active = self.sum_over_entries(self.active)
            self.density.copy_(active.float() / self.counted / self.whole_d_sae)
        self.known = None

    @torch.no_grad()
    def look_at_first(self, x: Tensor) -> None:
        if self.is_sparse or self.known != -1:
            return
        x = x[:_FIRST_ROWS]
        latents = self.activate(self.pre_activations(x), self.condition(x))
        self.active.copy_((latents != 0).sum())
        self.counted = self.rows(x)
        self.settle()

    @torch.no_grad()
    def end_step(self, fwd: Forward) -> None:
        fwd.count_active(self.active)
        self.counted = self.rows(fwd.x)
        if not acts_as_gpu(self.active):  # else the trainer says when
            self.settle()


def _forget(sae: Any, keys: object) -> None:
    sae.known = None
