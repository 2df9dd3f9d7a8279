"""Gated SAE: one path decides which latents fire, the other how much (Rajamanoharan et al. 2024, arXiv:2404.16014)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saeflow.config.options import VariantOptions, option
from saeflow.operators import SparseLatents
from saeflow.operators.gpu import dense, on_lists
from saeflow.saes.density import FollowsDensity
from saeflow.saes.forward import Forward
from saeflow.saes.initialisation import INITIALISATION, Initialisation
from saeflow.saes.schedules import Moving, ScheduleForm, make_schedule


@dataclass(frozen=True, kw_only=True)
class GatedOptions(VariantOptions):
    """Options of `gated`."""

    l1: float = option(
        "Weight of the L1 penalty on the gate at the end of its schedule.", low=0, high=1e30
    )
    l1_schedule: ScheduleForm = option(
        "Schedule by which l1 reaches its value.",
        default={"kind": "linear", "from": 0, "until": 0.05},
    )
    initialisation: Initialisation = option(INITIALISATION, default="unit")


class Gated(FollowsDensity):
    """z = 1[pi > 0] * relu(u exp(r_mag) + b_mag), where u = (x - b_dec) W_enc and pi = u + b_enc.

    The loss adds l1 * sum_i relu(pi_i), which only the gate feels, and the error of a reconstruction
    from relu(pi) through a decoder taken as a constant, which teaches the gate.
    """

    Options = GatedOptions

    betas = (0.0, 0.999)
    takes_own_targets = False  # b_mag reads inputs without b_enc
    l1 = Moving[float]()
    of_latents = (*FollowsDensity.of_latents, "r_mag", "b_mag")

    def __init__(self, d_in: int, d_sae: int, options: GatedOptions) -> None:
        super().__init__(d_in, d_sae)
        self.initialisation = options.initialisation
        self.schedule = make_schedule("l1", options.l1, options.l1_schedule, 0, float("inf"))
        self.l1 = self.schedule.target
        self.r_mag = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))

    def begin_step(self, step: int, total: int) -> None:
        self.l1 = self.schedule(step, total)

    def activate(self, pre_acts: Tensor, condition: Tensor | None) -> Tensor:
        magnitude = ((pre_acts - self.b_enc) * self.r_mag.exp() + self.b_mag).relu()
        return magnitude * (pre_acts > 0)

    def activate_at_once(self, scores: Tensor, condition: Tensor | None) -> tuple[Tensor, ...]:
        """Return latents, the gate's positive part, and its sum."""
        return dense.gated(scores, self.b_enc, self.r_mag, self.b_mag)

    def select(
        self, pre_acts: Tensor, condition: Tensor | None, margin: Tensor | float
    ) -> SparseLatents:
        return self.above_zero(pre_acts, margin)

    def activate_selected(self, selected: SparseLatents, condition: Tensor | None) -> SparseLatents:
        if selected.lists is not None:
            return self.activate_lists(selected, condition)[0]
        b_enc, r_mag, b_mag = map(selected.of_columns, (self.b_enc, self.r_mag, self.b_mag))
        magnitude = ((selected.values - b_enc) * r_mag.exp() + b_mag).relu()
        return selected.with_values(magnitude * (selected.values > 0))

    def activate_lists(
        self, selected: SparseLatents, condition: Tensor | None
    ) -> tuple[SparseLatents, tuple[Tensor, ...]]:
        """Return latents, the gate's positive part, and its sum."""
        if selected.lists is None:
            return super().activate_lists(selected, condition)
        latents, *beside = on_lists.gated(selected.lists, self.b_enc, self.r_mag, self.b_mag)
        return selected.with_whole(latents.view(-1)), tuple(beside)

    def decoded_beside(self, beside: tuple[Tensor, ...]) -> Tensor | None:
        return beside[0] if beside else None

    def losses(self, fwd: Forward, dead: Tensor) -> dict[str, Tensor]:
        selected = fwd.selected
        if fwd.beside:
            positive, penalty = fwd.beside
        else:
            positive = (selected.values if isinstance(selected, SparseLatents) else selected).relu()
            penalty = positive.sum()
        if isinstance(selected, SparseLatents):
            errors = self.errors_of_constant(fwd, selected.with_whole(positive.view(-1)))
        else:
            part = positive @ self.W_dec.detach().to(positive.dtype)
            part = self.sum_over_latents(part.to(self.W_dec.dtype))
            errors = (fwd.target - (part + self.b_dec.detach())).square().sum(1)
        return super().losses(fwd, dead) | {
            "l1": self.moved("l1") * self.sum_over_entries(penalty) / self.rows(fwd.x),
            "gate": self.mean_over_rows(errors),
        }

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        super().fold_scale(scale)
        self.b_mag.mul_(scale)

    def facts(self, fwd: Forward) -> dict[str, float]:
        return {"l1_weight": self.l1}
