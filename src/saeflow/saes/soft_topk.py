"""SoftSAE: a network decides how many latents each input uses, through a soft top-k (arXiv:2605.06610)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from saeflow.errors import UserError
from saeflow.operators import pre_acts
from saeflow.operators.soft_topk import FAR, FAR_SINGLE
from saeflow.saes.base import (
    Forward,
    Options,
    check_choice,
    check_count,
    check_k,
    check_number,
    check_weight,
)
from saeflow.saes.per_input_k import PerInputK
from saeflow.saes.schedules import make_schedule

BETA = 5.0  # of the budget's softplus


class SoftTopK(PerInputK):
    """k_hat = clamp(k_max sigmoid(MLP(x - b_dec)), 1, d_sae); z = v soft_topk(v, k_hat, alpha).

    The loss adds budget_weight * softplus_5(mean k_hat - k): a mean k_hat above k costs, one below does
    not. For the last `hard_fraction` of the steps, and in use, z is the hard top-floor(k_hat), with no
    budget loss, and k_hat has no gradient.

    Args:
        k: the budget: latents an input on average, at the end of its schedule.
        k_schedule: how the budget gets there.
        k_max: the largest k_hat, of which it starts at about a half: a number, or {times_k: m} for m k
            (2 in the released language-model runs; 2 d_in in those on images).
        estimator_width: hidden units of the MLP, or None for d_sae (the released code's: one more
            dense product a step). The first units start as the encoder's directions.
        alpha: temperature of the soft top-k at the end of its schedule, in units of scaled activations.
        alpha_schedule: how it gets there.
        budget_weight: lambda_k.
        hard_fraction: share of the steps, the last ones, with the hard top-k.
        hard_phase: what the error trains then: full, encoder and decoder; decoder, the decoder alone
            (released code), beside AuxK, which still trains the encoder's columns of dead latents.
        reach: temperatures below the threshold of the soft top-k down to which a latent counts as active
            and alive; 30 leaves out masks below 5e-14, 103 nothing that float32 holds (released code).
        auxk_weight: weight of the AuxK loss.
    """

    divides_latents = False

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        k: int,
        k_schedule: Options,
        k_max: float | Mapping[str, float],
        estimator_width: int | None,
        alpha: float,
        alpha_schedule: Options,
        budget_weight: float,
        hard_fraction: float,
        hard_phase: str,
        reach: float,
        auxk_weight: float,
    ) -> None:
        super().__init__(d_in, d_sae)
        self.k: float = check_k(k, d_sae)
        self.schedule = make_schedule("k", k, k_schedule, 1, d_sae)
        self.k_max = largest_k(k_max, k)
        alpha = check_number("alpha", alpha, 1e-8, 1e8)
        self.alpha_schedule = make_schedule("alpha", alpha, alpha_schedule, 1e-8, 1e8)
        self.temperature = alpha
        self.budget_weight = check_weight("budget_weight", budget_weight)
        self.hard_fraction = check_number("hard_fraction", hard_fraction, 0, 1)
        self.hard_phase = check_choice("hard_phase", hard_phase, "full", "decoder")
        self.reach = check_number("reach", reach, FAR, FAR_SINGLE)
        self.auxk_weight = check_weight("auxk_weight", auxk_weight)
        width = (
            d_sae if estimator_width is None else check_count("estimator_width", estimator_width)
        )
        self.hidden = nn.Linear(d_in, width)
        self.output = nn.Linear(width, 1)
        with torch.no_grad():
            for parameter in (*self.hidden.parameters(), *self.output.parameters()):
                parameter.zero_()

    def initialise(self, x: Tensor, generator: torch.Generator) -> None:
        super().initialise(x, generator)
        width = len(self.hidden.weight)
        with torch.no_grad():
            more = torch.randn(max(0, width - self.d_sae), self.d_in, generator=generator)
            more = more / more.norm(dim=1, keepdim=True)
            self.hidden.weight.copy_(torch.cat((self.W_dec[:width], more)))
            bound = width**-0.5
            self.output.weight.uniform_(-bound, bound, generator=generator)

    @property
    def most_k(self) -> int:
        return min(math.ceil(min(self.k_max, self.d_sae)), self.d_sae)

    def begin_step(self, step: int, total: int) -> None:
        self.k = self.schedule(step, total)
        is_hard = step >= round((1 - self.hard_fraction) * total)
        self.temperature = 0.0 if is_hard else self.alpha_schedule(step, total)
        self.is_fixed = is_hard and self.hard_phase == "decoder"

    def k_hat(self, x: Tensor) -> Tensor:
        hidden = pre_acts(x, self.hidden.weight.t(), self.hidden.bias, self.b_dec).relu()
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 is 2 apart near 256
            share = self.output(hidden.to(self.output.weight.dtype))[:, 0].sigmoid()
        k_hat = self.k_max * share
        return k_hat.clamp(1, self.d_sae)

    def losses(self, fwd: Forward, dead: Tensor) -> dict[str, Tensor]:
        losses = super().losses(fwd, dead) | {"auxk": self.auxk_weight * self.auxk(fwd, dead)}
        if self.is_soft:
            assert fwd.condition is not None
            over = self.ranks.batch_mean(fwd.condition) - self.k
            losses["budget"] = self.budget_weight * softplus(over, beta=BETA)
        return losses

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        super().fold_scale(scale)
        self.hidden.weight.div_(scale)

    def facts(self, fwd: Forward) -> dict[str, float]:
        assert fwd.condition is not None
        k_hat = self.ranks.all_rows(fwd.condition.detach())
        return {
            "k": self.k,
            "k_hat": float(k_hat.mean()),
            "k_hat_std": float(k_hat.std()),
            "temperature": self.temperature,
        }


def largest_k(value: Any, k: int) -> float:
    """k_max from its option and the budget k.

    Raises:
        UserError: it is neither a number nor {times_k: a number}, or below k.
    """
    if isinstance(value, Mapping):
        if set(value) != {"times_k"}:
            raise UserError(
                f"k_max: expected a number or {{times_k: a number}}, found {dict(value)}."
            )
        return k * check_number("k_max.times_k", value["times_k"], 1, 1e9)
    return check_number("k_max", value, k, 1e9)
