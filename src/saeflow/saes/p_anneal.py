"""P-annealed SAE: an L_p penalty whose p falls below 1 (Karvonen et al. 2024, arXiv:2408.00113)."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saeflow.config.options import VariantOptions, option
from saeflow.operators import SparseLatents, penalty
from saeflow.operators.autograd import applied
from saeflow.operators.gpu import dense
from saeflow.saes.density import FollowsDensity
from saeflow.saes.forward import Forward
from saeflow.saes.initialisation import INITIALISATION, Initialisation
from saeflow.saes.schedules import Moving, ScheduleForm, make_schedule


@dataclass(frozen=True, kw_only=True)
class PAnnealOptions(VariantOptions):
    """Options of `p_anneal`."""

    l1: float = option(
        "Weight of the penalty while p is 1, at the end of its schedule.", low=0, high=1e30
    )
    l1_schedule: ScheduleForm = option(
        "Schedule by which l1 reaches its value.",
        default={"kind": "linear", "from": 0, "until": 0.05},
    )
    p_end: float = option("The last p (Karvonen et al. 2024).", default=0.2, low=0.01, high=1)
    p_updates: int = option("Number of jumps of p.", default=10, unit="jumps", low=1)
    anneal_start: float = option("Share of the steps before the annealing.", low=0, high=1)
    first_jump: Literal["at_start", "after_interval"] = option(
        "Time of the first jump of p: at_start of the annealing, or after_interval (dictionary_learning, whose 10 values of p "
        "make 9 jumps).",
        default="at_start",
    )
    initialisation: Initialisation = option(INITIALISATION, default="unit")


class PAnneal(FollowsDensity):
    """z = relu(a); the loss adds l1 * sum_i z_i^p, the mean over the batch.

    p falls from 1 to `p_end` in `p_updates` equal jumps, equally spaced from `anneal_start` to the end
    of the run, so that the last interval has `p_end`; the released code jumps after each interval, and
    never trains at `p_end`. At each jump the weight is multiplied by (mean penalty at the old p) / (mean at the new
    p) over the last 10 steps, so that the penalty itself does not jump.
    """

    Options = PAnnealOptions

    WINDOW = 10
    l1 = Moving[float]()
    place: Tensor  # (1,) int64, of this step in `recent`
    recent: Tensor
    factor: Tensor

    def __init__(self, d_in: int, d_sae: int, options: PAnnealOptions) -> None:
        super().__init__(d_in, d_sae)
        self.initialisation = options.initialisation
        self.at_once = int(options.first_jump == "at_start")  # jumps made when the annealing starts
        self.schedule = make_schedule("l1", options.l1, options.l1_schedule, 0, float("inf"))
        self.p_end = options.p_end
        self.p_updates = options.p_updates
        self.anneal_start = options.anneal_start
        self.l1, self.jumps = self.schedule.target, 0
        self.is_before_jump = True  # the penalty counts at a jump that comes within the window
        # The penalty of the last steps at their p and at the next one; what the weight grew by.
        self.register_buffer("recent", torch.zeros(2, self.WINDOW, dtype=torch.float64))
        self.register_buffer("place", torch.zeros(1, dtype=torch.int64), persistent=False)
        self.register_buffer("factor", torch.ones((), dtype=torch.float64))

    def p_after(self, jumps: int) -> float:
        """p after some jumps."""
        return 1 + (self.p_end - 1) * min(jumps, self.p_updates) / self.p_updates

    def jumps_at(self, step: int, total: int) -> int:
        """Jumps made when a step begins; a start beyond the last step makes none."""
        start = self.anneal_start * total
        if step < start or start >= total:
            return 0
        return min(
            self.p_updates, self.at_once + int((step - start) * self.p_updates / (total - start))
        )

    def begin_step(self, step: int, total: int) -> None:
        self.l1 = self.schedule(step, total)
        self.place.fill_(step % self.WINDOW)
        self.jumps = self.jumps_at(step, total)
        self.is_before_jump = self.jumps_at(step + self.WINDOW, total) > self.jumps
        if step and self.jumps > self.jumps_at(step - 1, total):
            at_old, at_new = self.recent.sum(1)
            self.factor.mul_(torch.where((at_old > 0) & (at_new > 0), at_old / at_new, 1))

    def activate(self, pre_acts: Tensor, condition: Tensor | None) -> Tensor:
        return pre_acts.relu()

    def activate_at_once(self, scores: Tensor, condition: Tensor | None) -> tuple[Tensor, ...]:
        """Return latents, and the sum of their powers."""
        return dense.relu(scores, self.p_after(self.jumps))

    def select(
        self, pre_acts: Tensor, condition: Tensor | None, margin: Tensor | float
    ) -> SparseLatents:
        return self.above_zero(pre_acts, margin)

    def losses(self, fwd: Forward, dead: Tensor) -> dict[str, Tensor]:
        (total,) = fwd.beside or (sum_of_powers(fwd.values, self.p_after(self.jumps)),)
        total = self.sum_over_entries(total)
        if self.is_before_jump:
            self.record(fwd)
        weighted = penalty(total, self.rows(fwd.x), self.weight.to(total.dtype))
        return super().losses(fwd, dead) | {"penalty": weighted}

    @property
    def weight(self) -> Tensor:
        """() the penalty's weight now, in float64."""
        result: Tensor = self.moved("l1", torch.float64) * self.factor
        return result

    @torch.no_grad()
    def record(self, fwd: Forward) -> None:
        """Note the penalty of a step at its p and at the next one."""
        values = fwd.values.detach()
        for row, jumps in enumerate((self.jumps, self.jumps + 1)):
            p = self.p_after(jumps)
            total = dense.relu(values, p)[1] if fwd.beside else sum_of_powers(values, p)
            total = self.sum_over_entries(total).to(self.recent.dtype)
            self.recent[row].index_copy_(0, self.place, total.view(1))

    def facts(self, fwd: Forward) -> dict[str, float]:
        return {"l1_weight": float(self.weight), "p": self.p_after(self.jumps)}


def sum_of_powers(values: Tensor, p: float) -> Tensor:
    """() sum of v^p over the positive values, with gradient 0 at the others."""
    if p == 1:
        return values.sum()
    return applied(_SumOfPowers, values, p)


class _SumOfPowers(torch.autograd.Function):
    """One tensor of the size of the values at a time, where autograd alone would keep four."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(values)
        ctx.p = p
        return _powers(values, p).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (values,) = ctx.saved_tensors
        return _powers(values, ctx.p - 1).mul_(ctx.p).mul_(grad), None


def _powers(values: Tensor, p: float) -> Tensor:
    """Return v^p of the positive values, 0 at the others."""
    return values.clamp(min=0).pow_(p).masked_fill_(~(values > 0), 0)
