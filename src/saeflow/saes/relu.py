"""ReLU SAE with an L1 penalty (Bricken et al. 2023; Cunningham et al. 2023, arXiv:2309.08600)."""

from torch import Tensor

from saeflow.operators import SparseLatents, lowered
from saeflow.saes.base import Forward, Options, check_choice, check_weight
from saeflow.saes.density import FollowsDensity
from saeflow.saes.initialisation import INITIALISATIONS
from saeflow.saes.schedules import make_schedule


class ReLU(FollowsDensity):
    """z = relu(a); the loss adds l1 * sum_i z_i, the mean over the batch; decoder rows are unit.

    Args:
        l1: weight of the penalty at the end of its schedule.
        l1_schedule: how it gets there, such as a linear warm-up from 0.
        loss: squared, the sum over d_in; norm_weighted, mean((x - x_hat)^2 / ||x||), over dimensions too
            (the ReLU SAE of the Sparsemax release).
        initialisation: of the weights; see `saes.initialisation`.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        l1: float,
        l1_schedule: Options,
        loss: str,
        initialisation: str,
    ) -> None:
        super().__init__(d_in, d_sae)
        self.loss = check_choice("loss", loss, "squared", "norm_weighted")
        self.initialisation = check_choice("initialisation", initialisation, *INITIALISATIONS)
        self.schedule = make_schedule("l1", check_weight("l1", l1), l1_schedule, 0, float("inf"))
        self.l1 = self.schedule.target

    def begin_step(self, step: int, total: int) -> None:
        self.l1 = self.schedule(step, total)

    def activate(self, pre_acts: Tensor, condition: Tensor | None) -> Tensor:
        return pre_acts.relu()

    def select(
        self, pre_acts: Tensor, condition: Tensor | None, margin: Tensor | float
    ) -> SparseLatents:
        return SparseLatents.from_above(
            pre_acts, lowered(pre_acts.new_zeros(()), margin), self.room
        )

    def losses(self, fwd: Forward, dead: Tensor) -> dict[str, Tensor]:
        penalty = self.ranks.over_both(fwd.values.sum()) / self.ranks.rows(fwd.x)
        losses = super().losses(fwd, dead)
        if self.loss == "norm_weighted":
            losses["reconstruction"] = self.norm_weighted_error(fwd)
        return losses | {"l1": self.l1 * penalty}

    def facts(self, fwd: Forward) -> dict[str, float]:
        return {"l1_weight": self.l1}
