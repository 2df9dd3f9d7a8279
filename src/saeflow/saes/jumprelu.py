"""JumpReLU SAE: a learned threshold per latent and an L0 penalty (Rajamanoharan et al. 2024, arXiv:2407.14435)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from saeflow.config.options import VariantOptions, option
from saeflow.operators import SparseLatents, jumprelu, lowered, penalty, step
from saeflow.operators.gpu import dense, on_lists
from saeflow.saes.density import FollowsDensity
from saeflow.saes.forward import Forward
from saeflow.saes.initialisation import INITIALISATION, Initialisation
from saeflow.saes.schedules import Moving, ScheduleForm, make_schedule


@dataclass(frozen=True, kw_only=True)
class JumpReLUOptions(VariantOptions):
    """Options of `jumprelu`."""

    l0_weight: float = option(
        "Weight of the sparsity term at the end of its schedule.", low=0, high=1e30
    )
    l0_schedule: ScheduleForm = option(
        "Schedule by which l0_weight reaches its value.",
        default={"kind": "linear", "from": 0, "until": 0.05},
    )
    target_l0: float | None = option(
        "Active latents of an input on average; null for the plain penalty.",
        default=None,
        unit="latents",
        counts_latents=True,
    )
    target_schedule: ScheduleForm = option(
        "Schedule by which target_l0 reaches its value.",
        default={"kind": "constant"},
        counts_latents=True,
    )
    threshold: float = option(
        "The thresholds at the start (Rajamanoharan et al. 2024, for rows of mean squared norm 1).",
        default=0.001,
        unit="scaled activations",
        low=1e-8,
        high=1e8,
    )
    bandwidth: float = option(
        "Width of the kernel of the thresholds' gradient.",
        default=0.001,
        unit="scaled activations",
        low=1e-8,
        high=1e8,
    )
    form: Literal["standard", "dictionary_learning"] = option(
        "standard: log theta is learned, the encoder takes x - b_dec, and the penalty's estimator acts on both sides "
        "of theta; dictionary_learning: theta itself is learned, the encoder takes x, and the estimator acts on z, so "
        "that a latent below theta feels it only where theta is within half a bandwidth of 0.",
        default="standard",
    )
    initialisation: Initialisation = option(INITIALISATION, default="unit")

    def problems(self, d_sae: int) -> Iterator[str]:
        yield from super().problems(d_sae)
        if self.target_l0 is None and self.target_schedule != {"kind": "constant"}:
            yield (
                "target_schedule: expected {kind: constant} where target_l0 is null, found "
                f"{self.target_schedule}."
            )


class JumpReLU(FollowsDensity):
    """z = a 1[a > theta], theta per latent, with straight-through gradients.

    The loss adds l0_weight * L0 (the paper's), or l0_weight * (L0 / target - 1)^2 where a target is
    given; L0 is the batch's mean.
    """

    Options = JumpReLUOptions

    betas = (0.0, 0.999)
    weight = Moving[float]()
    target = Moving[float | None]()

    def __init__(self, d_in: int, d_sae: int, options: JumpReLUOptions) -> None:
        super().__init__(d_in, d_sae)
        self.initialisation = options.initialisation
        self.is_standard = options.form == "standard"
        self.weight = options.l0_weight
        self.weight_schedule = make_schedule(
            "l0", self.weight, options.l0_schedule, 0, float("inf")
        )
        self.target = options.target_l0
        if self.target is not None:
            self.target_schedule = make_schedule(
                "target", self.target, options.target_schedule, 1, d_sae
            )
        self.threshold = options.threshold
        self.bandwidth = options.bandwidth
        start = torch.full((d_sae,), self.threshold)
        learned = "log_theta" if self.is_standard else "direct_theta"
        self.register_parameter(learned, nn.Parameter(start.log() if self.is_standard else start))
        self.of_latents = (*FollowsDensity.of_latents, learned)

    log_theta: Tensor
    direct_theta: Tensor

    def begin_step(self, step: int, total: int) -> None:
        self.weight = self.weight_schedule(step, total)
        if self.target is not None:
            self.target = self.target_schedule(step, total)

    @property
    def theta(self) -> Tensor:
        """(d_sae,) thresholds, in units of the activations."""
        if self.is_standard:
            return self.log_theta.exp()
        # In use the released class takes relu of what is above theta, in training it does not.
        return self.direct_theta if self.training else self.direct_theta.clamp(min=0)

    @property
    def centre(self) -> Tensor:
        return super().centre if self.is_standard else self.b_dec.new_zeros(self.d_in)

    def readers(self) -> tuple[Tensor, Tensor]:
        if self.is_standard:
            return super().readers()
        return self.W_enc, self.b_enc + self.b_dec @ self.W_enc

    def activate(self, pre_acts: Tensor, condition: Tensor | None) -> Tensor:
        return jumprelu(pre_acts, self.theta, self.bandwidth)

    def activate_at_once(self, scores: Tensor, condition: Tensor | None) -> tuple[Tensor, ...]:
        """Return latents, and how many are active."""
        return dense.jumprelu(scores, self.theta, self.bandwidth, of_latents=not self.is_standard)

    def select(
        self, pre_acts: Tensor, condition: Tensor | None, margin: Tensor | float
    ) -> SparseLatents:
        """Also those below their threshold that the kernel of its gradient reaches."""
        learned = self.log_theta if self.is_standard else self.theta
        below = self.bandwidth / 2 if self.training else 0.0
        least = lowered(learned, margin, below, of_log=self.is_standard)
        return SparseLatents.from_above(pre_acts, least, self.room)

    def activate_selected(self, selected: SparseLatents, condition: Tensor | None) -> SparseLatents:
        theta = selected.of_columns(self.theta)
        return selected.with_values(jumprelu(selected.values, theta, self.bandwidth))

    def activate_lists(
        self, selected: SparseLatents, condition: Tensor | None
    ) -> tuple[SparseLatents, tuple[Tensor, ...]]:
        """Return latents, and how many are active."""
        if selected.lists is None or not self.is_standard:
            return super().activate_lists(selected, condition)
        latents, count = on_lists.jumprelu(selected.lists, self.log_theta, self.bandwidth)
        return selected.with_whole(latents.view(-1)), (count,)

    def losses(self, fwd: Forward, dead: Tensor) -> dict[str, Tensor]:
        acts = fwd.selected if self.is_standard else fwd.latents
        if fwd.beside:
            (count,) = fwd.beside
        elif isinstance(acts, SparseLatents):
            count = acts.total(step(acts.values, acts.of_columns(self.theta), self.bandwidth))
            if not self.is_standard:
                count = count + self.unlisted(acts, len(fwd.x))
        else:
            count = step(acts, self.theta, self.bandwidth).sum()
        target = None if self.target is None else self.moved("target")
        count, rows = self.sum_over_entries(count), self.rows(fwd.x)
        l0_penalty = penalty(count, rows, self.moved("weight"), target)
        return super().losses(fwd, dead) | {"l0_penalty": l0_penalty}

    def unlisted(self, latents: SparseLatents, rows: int) -> Tensor:
        """() 0, with the gradient of theta that `step` has from the zeros that are not listed."""
        zeros = (rows - latents.listed()).to(self.theta.dtype)
        return (zeros * step(torch.zeros_like(self.theta), self.theta, self.bandwidth)).sum()

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        super().fold_scale(scale)
        if self.is_standard:
            self.log_theta.add_(math.log(scale))
        else:
            self.direct_theta.mul_(scale)

    @torch.no_grad()
    def fold_shift(self, shift: Tensor) -> None:
        super().fold_shift(shift)
        if not self.is_standard:  # its encoder takes x, not x - b_dec
            self.b_enc.sub_(shift @ self.W_enc)

    def facts(self, fwd: Forward) -> dict[str, float]:
        target = {} if self.target is None else {"k": self.target}
        theta = self.mean_over_latents(self.theta.detach())
        return {**target, "l0_weight": self.weight, "theta": float(theta)}
