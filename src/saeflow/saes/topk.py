"""TopK SAE: keep the k largest latents of each input (Gao et al. 2024, arXiv:2406.04093)."""

from torch import Tensor

from saeflow.operators import SparseLatents, keep_topk, topk_sparse
from saeflow.saes.base import SAE, Forward, Options, check_k, check_weight
from saeflow.saes.schedules import make_schedule


class TopK(SAE):
    """z = TopK_k(relu(a)) per row; ties go to the lower index.

    Args:
        k: latents per input at the end of the schedule, and for inference.
        k_schedule: how k gets there.
        auxk_weight: weight of the AuxK loss (1/32 in the paper).
    """

    def __init__(
        self, d_in: int, d_sae: int, *, k: int, k_schedule: Options, auxk_weight: float
    ) -> None:
        super().__init__(d_in, d_sae)
        self.k = check_k(k, d_sae)
        self.schedule = make_schedule("k", k, k_schedule, 1, d_sae)
        self.auxk_weight = check_weight("auxk_weight", auxk_weight)

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

    def select(
        self, pre_acts: Tensor, condition: Tensor | None, margin: Tensor | float
    ) -> SparseLatents:
        return self.ranks.largest_of_rows(topk_sparse(pre_acts, self.k, self.room), self.k)

    def losses(self, fwd: Forward, dead: Tensor) -> dict[str, Tensor]:
        return super().losses(fwd, dead) | {"auxk": self.auxk_weight * self.auxk(fwd, dead)}

    def facts(self, fwd: Forward) -> dict[str, float]:
        return {"k": self.k}
