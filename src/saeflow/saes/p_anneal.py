"""P-annealed SAE: an L_p penalty whose p falls below 1 (Karvonen et al. 2024, arXiv:2408.00113)."""

import torch
from torch import Tensor

from saeflow.operators import SparseLatents, lowered
from saeflow.saes.base import (
    Forward,
    Options,
    check_choice,
    check_count,
    check_number,
    check_weight,
)
from saeflow.saes.density import FollowsDensity
from saeflow.saes.initialisation import INITIALISATIONS
from saeflow.saes.schedules import make_schedule


class PAnneal(FollowsDensity):
    """z = relu(a); the loss adds l1 * sum_i z_i^p, the mean over the batch.

    p falls from 1 to `p_end` in `p_updates` equal jumps, equally spaced from `anneal_start` to the end
    of the run, so that the last interval has `p_end`; the released code jumps after each interval, and
    never trains at `p_end`. At each jump the weight is multiplied by (mean penalty at the old p) / (mean at the new
    p) over the last 10 steps, so that the penalty itself does not jump.

    Args:
        l1: weight of the penalty while p = 1, at the end of its schedule.
        l1_schedule: how it gets there.
        p_end: the last p.
        p_updates: number of jumps.
        anneal_start: share of the steps before the annealing.
        first_jump: at_start of the annealing, or after_interval (dictionary_learning, whose 10 values of
            p make 9 jumps).
        initialisation: of the weights; see `saes.initialisation`.
    """

    WINDOW = 10
    place: Tensor  # (1,) int64, of this step in `recent`
    recent: Tensor
    factor: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        l1: float,
        l1_schedule: Options,
        p_end: float,
        p_updates: int,
        anneal_start: float,
        first_jump: str,
        initialisation: str,
    ) -> None:
        super().__init__(d_in, d_sae)
        self.initialisation = check_choice("initialisation", initialisation, *INITIALISATIONS)
        first_jump = check_choice("first_jump", first_jump, "at_start", "after_interval")
        self.at_once = int(first_jump == "at_start")  # jumps made when the annealing starts
        self.schedule = make_schedule("l1", check_weight("l1", l1), l1_schedule, 0, float("inf"))
        self.p_end = check_number("p_end", p_end, 0.01, 1)
        self.p_updates = check_count("p_updates", p_updates)
        self.anneal_start = check_number("anneal_start", anneal_start, 0, 1)
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

    def select(
        self, pre_acts: Tensor, condition: Tensor | None, margin: Tensor | float
    ) -> SparseLatents:
        return SparseLatents.from_above(
            pre_acts, lowered(pre_acts.new_zeros(()), margin), self.room
        )

    def losses(self, fwd: Forward, dead: Tensor) -> dict[str, Tensor]:
        penalty = self.ranks.over_both(sum_of_powers(fwd.values, self.p_after(self.jumps)))
        penalty = penalty / self.ranks.rows(fwd.x)
        return super().losses(fwd, dead) | {"penalty": self.weight.to(penalty.dtype) * penalty}

    @property
    def weight(self) -> Tensor:
        """() the penalty's weight now, in float64."""
        return self.l1 * self.factor

    @torch.no_grad()
    def end_step(self, fwd: Forward) -> None:
        super().end_step(fwd)
        if not self.is_before_jump:
            return
        for row, jumps in enumerate((self.jumps, self.jumps + 1)):
            penalty = self.ranks.over_both(sum_of_powers(fwd.values.detach(), self.p_after(jumps)))
            self.recent[row].index_copy_(0, self.place, penalty.to(self.recent.dtype).view(1))

    def facts(self, fwd: Forward) -> dict[str, float]:
        return {"l1_weight": float(self.weight), "p": self.p_after(self.jumps)}


def sum_of_powers(values: Tensor, p: float) -> Tensor:
    """() sum of v^p over the positive values, with gradient 0 at the others."""
    if p == 1:
        return values.sum()
    return torch.where(values > 0, values, 1).pow(p).mul(values > 0).sum()
