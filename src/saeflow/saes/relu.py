"""ReLU SAE with an L1 penalty (Bricken et al. 2023; Cunningham et al. 2023, arXiv:2309.08600)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from saeflow.config.options import VariantOptions, option
from saeflow.operators import SparseLatents, penalty
from saeflow.operators.gpu import dense
from saeflow.saes.density import FollowsDensity
from saeflow.saes.forward import Forward
from saeflow.saes.initialisation import INITIALISATION, Initialisation
from saeflow.saes.schedules import Moving, ScheduleForm, make_schedule


@dataclass(frozen=True, kw_only=True)
class ReLUOptions(VariantOptions):
    """Options of `relu`."""

    l1: float = option("Weight of the L1 penalty at the end of its schedule.", low=0, high=1e30)
    l1_schedule: ScheduleForm = option(
        "Schedule by which l1 reaches its value.",
        default={"kind": "linear", "from": 0, "until": 0.05},
    )
    loss: Literal["squared", "norm_weighted"] = option(
        "squared: the error is summed over d_in; norm_weighted: the mean of (x - x_hat)^2 / ||x||, over dimensions "
        "too (the ReLU SAE of the Sparsemax release).",
        default="squared",
    )
    initialisation: Initialisation = option(INITIALISATION, default="unit")


class ReLU(FollowsDensity):
    """z = relu(a); the loss adds l1 * sum_i z_i, the mean over the batch; decoder rows are unit."""

    Options = ReLUOptions

    l1 = Moving[float]()

    def __init__(self, d_in: int, d_sae: int, options: ReLUOptions) -> None:
        super().__init__(d_in, d_sae)
        self.loss = options.loss
        self.initialisation = options.initialisation
        self.schedule = make_schedule("l1", options.l1, options.l1_schedule, 0, float("inf"))
        self.l1 = self.schedule.target

    def begin_step(self, step: int, total: int) -> None:
        self.l1 = self.schedule(step, total)

    def activate(self, pre_acts: Tensor, condition: Tensor | None) -> Tensor:
        return pre_acts.relu()

    def activate_at_once(self, scores: Tensor, condition: Tensor | None) -> tuple[Tensor, ...]:
        """Return latents, and their sum."""
        return dense.relu(scores, 1.0)

    def select(
        self, pre_acts: Tensor, condition: Tensor | None, margin: Tensor | float
    ) -> SparseLatents:
        return self.above_zero(pre_acts, margin)

    def losses(self, fwd: Forward, dead: Tensor) -> dict[str, Tensor]:
        (total,) = fwd.beside or (fwd.values.sum(),)
        l1 = penalty(self.sum_over_entries(total), self.rows(fwd.x), self.moved("l1"))
        return super().losses(fwd, dead) | {"l1": l1}

    def reconstruction(self, fwd: Forward) -> Tensor:
        if self.loss == "norm_weighted":
            return self.norm_weighted_error(fwd)
        return super().reconstruction(fwd)

    def facts(self, fwd: Forward) -> dict[str, float]:
        return {"l1_weight": self.l1}
