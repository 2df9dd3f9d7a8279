"""JumpReLU SAE: a learned threshold per latent and an L0 penalty (Rajamanoharan et al. 2024, arXiv:2407.14435)."""

import math

import torch
from torch import Tensor, nn

from saeflow.errors import UserError
from saeflow.operators import SparseLatents, jumprelu, lowered, step
from saeflow.saes.base import Forward, Options, check_number, check_weight
from saeflow.saes.density import FollowsDensity
from saeflow.saes.schedules import make_schedule


class JumpReLU(FollowsDensity):
    """z = a 1[a > theta], theta = exp(log_theta) per latent, with straight-through gradients.

    The loss adds l0_weight * L0 (the paper's), or l0_weight * (L0 / target - 1)^2 where a target is
    given; L0 is the batch's mean.

    Args:
        l0_weight: weight of the sparsity term at the end of its schedule.
        l0_schedule: how it gets there.
        target_l0: active latents an input on average, or None for the plain penalty.
        target_schedule: how the target gets there; a k-schedule.
        threshold: the thresholds at the start, in units of the scaled activations.
        bandwidth: width of the kernel of the thresholds' gradient, in the same units.
    """

    betas = (0.0, 0.999)
    of_latents = (*FollowsDensity.of_latents, "log_theta")

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        l0_weight: float,
        l0_schedule: Options,
        target_l0: float | None,
        target_schedule: Options,
        threshold: float,
        bandwidth: float,
    ) -> None:
        super().__init__(d_in, d_sae)
        l0_weight = check_weight("l0_weight", l0_weight)
        self.weight_schedule = make_schedule("l0", l0_weight, l0_schedule, 0, float("inf"))
        self.weight = l0_weight
        self.target: float | None = None
        if target_l0 is not None:
            self.target = check_number("target_l0", target_l0, 1, d_sae)
            self.target_schedule = make_schedule("target", self.target, target_schedule, 1, d_sae)
        elif dict(target_schedule) != {"kind": "constant"}:
            raise UserError(
                f"target_schedule: expected {{kind: constant}} where target_l0 is null, found "
                f"{dict(target_schedule)}."
            )
        self.threshold = check_number("threshold", threshold, 1e-8, 1e8)
        self.bandwidth = check_number("bandwidth", bandwidth, 1e-8, 1e8)
        self.log_theta = nn.Parameter(torch.full((d_sae,), self.threshold).log())

    def begin_step(self, step: int, total: int) -> None:
        self.weight = self.weight_schedule(step, total)
        if self.target is not None:
            self.target = self.target_schedule(step, total)

    @property
    def theta(self) -> Tensor:
        """(d_sae,) thresholds, in units of the activations."""
        return self.log_theta.exp()

    def activate(self, pre_acts: Tensor, condition: Tensor | None) -> Tensor:
        return jumprelu(pre_acts, self.theta, self.bandwidth)

    def select(
        self, pre_acts: Tensor, condition: Tensor | None, margin: Tensor | float
    ) -> SparseLatents:
        """Also those below their threshold that the kernel of its gradient reaches."""
        near = self.theta - (self.bandwidth / 2 if self.training else 0)
        return SparseLatents.from_above(pre_acts, lowered(near, margin), self.room)

    def activate_selected(self, selected: SparseLatents, condition: Tensor | None) -> SparseLatents:
        theta = self.theta[selected.columns]
        return selected.with_values(jumprelu(selected.values, theta, self.bandwidth))

    def losses(self, fwd: Forward, dead: Tensor) -> dict[str, Tensor]:
        if isinstance(fwd.selected, SparseLatents):
            values, theta = fwd.selected.values, self.theta[fwd.selected.columns]
        else:
            values, theta = fwd.selected, self.theta
        l0 = self.ranks.over_both(step(values, theta, self.bandwidth).sum()) / self.ranks.rows(
            fwd.x
        )
        term = l0 if self.target is None else (l0 / self.target - 1).square()
        return super().losses(fwd, dead) | {"l0_penalty": self.weight * term}

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        super().fold_scale(scale)
        self.log_theta.add_(math.log(scale))

    def facts(self, fwd: Forward) -> dict[str, float]:
        target = {} if self.target is None else {"k": self.target}
        theta = self.ranks.over_latents(self.theta.detach().mean()) / self.ranks.of_latents
        return {**target, "l0_weight": self.weight, "theta": float(theta)}
