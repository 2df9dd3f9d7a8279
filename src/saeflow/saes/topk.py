"""TopK SAE: keep the k largest latents of each input (Gao et al. 2024, arXiv:2406.04093)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saeflow.config.options import AuxKOptions, FoundK, option
from saeflow.operators import SparseLatents, keep_topk, topk_sparse
from saeflow.saes.base import SAE
from saeflow.saes.forward import Forward
from saeflow.saes.schedules import Moving, ScheduleForm, make_schedule


@dataclass(frozen=True, kw_only=True)
class KOptions(AuxKOptions):
    """Options of an SAE with a k."""

    k: FoundK = option(
        "Active latents of an input at the end of the schedule, and in use; {mean_l0_of: ENTRY/LABEL} takes the mean "
        "L0 that another run of the store has on training activations.",
        unit="latents",
        counts_latents=True,
    )
    k_schedule: ScheduleForm = option(
        "Schedule by which k reaches its value.", default={"kind": "constant"}, counts_latents=True
    )


@dataclass(frozen=True, kw_only=True)
class TopKOptions(KOptions):
    """Options of `topk`."""

    budgets: Literal["k", "powers", "all"] = option(
        "Numbers j of latents from which an input is reconstructed in training, its j largest; the error is the mean over "
        "them. k: k alone; all: 1, 2, 3, ..., k (HierarchicalTopK, arXiv:2505.24473: one SAE for every k); powers: 1, 2, 4, "
        "8, ... and k.",
        default="k",
    )


class TopK(SAE):
    """z = TopK_k(relu(a)) per row; ties go to the lower index.

    With several budgets the loss is the mean of |x - x_hat_j|^2 over budgets j, x_hat_j from the j largest latents;
    set `k` of a trained SAE to use it with fewer. On a GPU each budget is a decoding of its own.
    """

    Options = TopKOptions

    k = Moving[int]()

    def __init__(self, d_in: int, d_sae: int, options: TopKOptions) -> None:
        super().__init__(d_in, d_sae)
        self.k = options.k
        self.schedule = make_schedule("k", options.k, options.k_schedule, 1, d_sae)
        self.auxk_weight = options.auxk_weight
        self.budgets = options.budgets
        self.divides_latents = (
            options.budgets == "k"
        )  # else ranks of latents within whole rows are needed

    def dials(self) -> dict[str, object]:
        steps = () if self.budgets == "k" else tuple(budgets_of(self.k, self.budgets))
        return {**super().dials(), "steps": steps}

    @property
    def is_sparse(self) -> bool:
        return True

    @property
    def most(self) -> int:
        return self.k

    def begin_step(self, step: int, total: int) -> None:
        self.k = round(self.schedule(step, total))

    def activate(self, pre_acts: Tensor, condition: Tensor | None) -> Tensor:
        return keep_topk(pre_acts.relu(), self.k)

    @property
    def reads_margin(self) -> bool:
        return False

    def select(
        self, pre_acts: Tensor, condition: Tensor | None, margin: Tensor | float
    ) -> SparseLatents:
        chosen = topk_sparse(pre_acts, self.moved("k", torch.int32), self.room)
        return self.largest_of_rows(chosen, self.k)

    def reconstruction(self, fwd: Forward) -> Tensor:
        if self.budgets == "k":
            return super().reconstruction(fwd)
        smaller = budgets_of(self.k, self.budgets)[:-1]
        places = ranks_of(fwd.values.detach().abs().reshape(len(fwd.x), -1))
        total = fwd.squared_errors
        for j in smaller:
            kept = fwd.values * (places < j).view(fwd.values.shape)
            x_hat = (
                self.decode_selected(fwd.latents.with_values(kept))
                if isinstance(fwd.latents, SparseLatents)
                else self.decode(kept)
            )
            total = total + (fwd.target - x_hat).square().sum(1)
        return self.mean_over_rows(total / (len(smaller) + 1))

    def losses(self, fwd: Forward, dead: Tensor) -> dict[str, Tensor]:
        return super().losses(fwd, dead) | {"auxk": self.auxk_weight * self.auxk(fwd, dead)}

    def facts(self, fwd: Forward) -> dict[str, float]:
        return {"k": self.k}


def budgets_of(k: int, kind: str) -> list[int]:
    """Return the budgets of a k in ascending order: 1, 2, 3, ..., k, or 1, 2, 4, ... and k."""
    if kind == "all":
        return list(range(1, k + 1))
    return [*(1 << n for n in range((k - 1).bit_length())), k]


def ranks_of(values: Tensor) -> Tensor:
    """Return the place (B, n) of each entry among those of its row, 0 the largest; equal ones in their order."""
    order = values.sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(values.shape[1], device=values.device).expand_as(values)
    return torch.empty_like(order).scatter_(1, order, places)
