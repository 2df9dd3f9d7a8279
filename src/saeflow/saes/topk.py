"""TopK SAE: keep the k largest latents of each input (Gao et al. 2024, arXiv:2406.04093)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from saeflow.config.options import FoundK, VariantOptions, option
from saeflow.operators import SparseLatents, keep_topk, topk_sparse
from saeflow.saes.base import SAE
from saeflow.saes.forward import Forward
from saeflow.saes.schedules import Moving, ScheduleForm, make_schedule


@dataclass(frozen=True, kw_only=True)
class TopKOptions(VariantOptions):
    """Options of `topk`."""

    k: FoundK = option(
        "Active latents of an input at the end of the schedule, and in use; {mean_l0_of: ENTRY/LABEL} takes the mean "
        "L0 that another run of the store has on training activations.",
        unit="latents",
        counts_latents=True,
    )
    k_schedule: ScheduleForm = option(
        "Schedule by which k reaches its value.", default={"kind": "constant"}, counts_latents=True
    )
    auxk_weight: float = option(
        "Weight of the AuxK loss (Gao et al. 2024, appendix A.2).",
        default=0.03125,
        low=0,
        high=1e30,
    )


class TopK(SAE):
    """z = TopK_k(relu(a)) per row; ties go to the lower index."""

    Options = TopKOptions

    k = Moving[int]()

    def __init__(self, d_in: int, d_sae: int, options: TopKOptions) -> None:
        super().__init__(d_in, d_sae)
        self.k = options.k
        self.schedule = make_schedule("k", options.k, options.k_schedule, 1, d_sae)
        self.auxk_weight = options.auxk_weight

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

    def losses(self, fwd: Forward, dead: Tensor) -> dict[str, Tensor]:
        return super().losses(fwd, dead) | {"auxk": self.auxk_weight * self.auxk(fwd, dead)}

    def facts(self, fwd: Forward) -> dict[str, float]:
        return {"k": self.k}
