"""BatchTopK SAE: keep the B k largest latents of the batch (Bussmann et al. 2024, arXiv:2412.06410)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saeflow.config.options import option
from saeflow.operators import SparseLatents, batch_topk, batch_topk_sparse
from saeflow.operators.gpu.record import follow, least_positive
from saeflow.saes.base import SAE
from saeflow.saes.forward import Forward
from saeflow.saes.schedules import Moving, make_schedule
from saeflow.saes.topk import KOptions, ranks_of

MOST = 2  # times k, latents of one input: a GPU makes room for these, and for rows with more some spare


@dataclass(frozen=True, kw_only=True)
class BatchTopKOptions(KOptions):
    """Options of `batch_topk`: k, which is the mean over a batch, and those of the threshold in use."""

    threshold_start_step: int = option(
        "Step from which batches count for the threshold in use.", default=1000, unit="steps", low=0
    )
    threshold_start: Literal["unbiased", "first_batch"] = option(
        "Start of the running mean behind the threshold: unbiased weighs its batches alike while they are few; "
        "first_batch takes the first batch's minimum and moves from it as slowly as later (dictionary_learning).",
        default="unbiased",
    )
    pool: float | None = option(
        "Times k latents that a batch of training may use, those of largest norm over the batch (Sampled-SAE, "
        "arXiv:2508.21324, scored by the L2 norm); null for all.",
        default=None,
        low=1,
        high=1e9,
    )


class BatchTopK(SAE):
    """k latents an input on average in training; in use, the latents above a threshold.

    The threshold is the running mean of the smallest positive activation kept in each batch. It
    starts afresh whenever the schedule changes k, since a larger k keeps smaller activations, and at
    `threshold_start_step`, since activations move while the weights are young.

    Attributes:
        threshold_decay: of the running mean.
    """

    Options = BatchTopKOptions

    k = Moving[float]()
    threshold: Tensor
    threshold_weight: Tensor

    def __init__(self, d_in: int, d_sae: int, options: BatchTopKOptions) -> None:
        super().__init__(d_in, d_sae)
        self.k = options.k
        self.schedule = make_schedule("k", options.k, options.k_schedule, 1, d_sae)
        self.auxk_weight = options.auxk_weight
        self.threshold_start_step = options.threshold_start_step
        self.threshold_start = options.threshold_start
        self.threshold_decay = 0.999
        self.pool = options.pool
        self.divides_latents = self.pool is None  # else the largest of all norms are needed
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("threshold_weight", torch.zeros(()))

    @property
    def is_sparse(self) -> bool:
        return True

    @property
    def most(self) -> int:
        return MOST * math.ceil(float(self.share_of_batch(self.k)))

    def begin_step(self, step: int, total: int) -> None:
        self.k = self.schedule(step, total)
        k_changed = step > 0 and self.k != self.schedule(step - 1, total)
        if k_changed or step == self.threshold_start_step:
            self.threshold_weight.zero_()

    def activate(self, pre_acts: Tensor, condition: Tensor | None) -> Tensor:
        if self.training:
            return batch_topk(self.pooled(pre_acts, 0.0).relu(), self.k)
        return pre_acts * (pre_acts > self.threshold)

    def pooled(self, pre_acts: Tensor, left_out: float) -> Tensor:
        """Return pre-activations (B, d_sae) with a number in the place of those of latents that are not in the pool."""
        if self.pool is None:
            return pre_acts
        with torch.no_grad():
            active = pre_acts.to(self.W_dec.dtype).relu()
            squares = self.sum_over_rows(active.square().sum(0))
            size = self.moved("k", torch.float64) * self.pool
            places = ranks_of(squares[None])[0]
            is_out = places >= size.round() if isinstance(size, Tensor) else places >= round(size)
        return pre_acts.masked_fill(is_out, left_out)

    @property
    def reads_margin(self) -> bool:
        return False

    def select(
        self, pre_acts: Tensor, condition: Tensor | None, margin: Tensor | float
    ) -> SparseLatents:
        if self.training:
            k = self.share_of_batch(self.moved("k", torch.float64))
            chosen = batch_topk_sparse(self.pooled(pre_acts, -torch.inf), k, self.room)
            return self.largest_of_batch(chosen, self.k)
        return SparseLatents.from_above(pre_acts, self.threshold, self.room)

    def losses(self, fwd: Forward, dead: Tensor) -> dict[str, Tensor]:
        return super().losses(fwd, dead) | {"auxk": self.auxk_weight * self.auxk(fwd, dead)}

    def end_step(self, fwd: Forward) -> None:
        least = self.least_of_batch(least_positive(fwd.values))
        is_unbiased = self.threshold_start == "unbiased"
        follow(
            self.threshold,
            self.threshold_weight,
            least,
            self.threshold_decay,
            is_unbiased=is_unbiased,
        )

    def fold_scale(self, scale: float) -> None:
        super().fold_scale(scale)
        self.threshold.mul_(scale)

    def facts(self, fwd: Forward) -> dict[str, float]:
        return {"k": self.k, "threshold": self.threshold.item()}
