"""Feature Choice SAE: each latent takes the inputs of a batch on which it is largest (Ayonrinde 2024, arXiv:2411.02124)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saeflow.config.options import option
from saeflow.operators import (
    SparseLatents,
    allotment,
    batch_topk,
    batch_topk_sparse,
    fit_zipf,
    zipf,
)
from saeflow.saes.base import SAE
from saeflow.saes.batch_topk import MOST
from saeflow.saes.forward import Forward
from saeflow.saes.schedules import Moving, make_schedule
from saeflow.saes.topk import KOptions

DECAY = 0.999  # of the running mean behind thresholds, as in batch_topk
NEVER = 1e30
"""Threshold of a latent that takes no input: finite, as saved weights are."""
LEAST_SHARE = 1e-30


@dataclass(frozen=True, kw_only=True)
class FeatureChoiceOptions(KOptions):
    """Options of `feature_choice`: k, the mean over a batch, and how it is divided among latents."""

    allocation: Literal["uniform", "zipf"] = option(
        "Inputs of a batch that a latent takes at most. uniform: the same number for every latent; zipf: proportional to "
        "(rank + zipf_shift)^-zipf_exponent, rank 1 for the latent that fired most often under Mutual Choice.",
        default="zipf",
    )
    mutual_fraction: float = option(
        "Share of the steps, at the start, with Mutual Choice: the largest latents of a batch, whose ever they are, as in "
        "batch_topk. The second half of these steps decides the ranks.",
        default=0.5,
        low=0,
        high=0.99,
    )
    zipf_exponent: float | None = option(
        "Exponent of the law; null for the likeliest one, given how often latents fired under Mutual Choice.",
        default=None,
        low=0,
        high=20,
    )
    zipf_shift: float | None = option(
        "Shift of ranks in the law; null for the likeliest one.", default=None, low=0, high=1e9
    )
    threshold_start_step: int = option(
        "Step from which batches count for the thresholds in use; those under Mutual Choice never do.",
        default=1000,
        unit="steps",
        low=0,
    )

    def problems(self, d_sae: int) -> Iterator[str]:
        yield from super().problems(d_sae)
        if self.allocation == "zipf" and self.mutual_fraction == 0:
            yield (
                "mutual_fraction: expected a number above 0 where allocation is zipf, since steps of Mutual Choice "
                "decide the ranks, found 0."
            )


class FeatureChoice(SAE):
    """Each latent i is active on the m_i inputs of a batch where it is largest, if above 0; sum m_i = k B.

    In use there is no batch: a latent is active above a threshold of its own, the running mean of the number halfway
    between the last activation that it takes of a batch and the next one. It starts afresh where `BatchTopK`'s does.

    The paper's text was not to be had. Its abstract and public reviews state: each latent takes at most m inputs; numbers
    of inputs follow a Zipf distribution; dead latents nearly vanish. The rest is our reading, with its reasons:

    - Training begins with Mutual Choice (`mutual_fraction`), since ranks must come from somewhere, and those of random
      first weights mean nothing.
    - m_i is at least 1 where k B is at least d_sae, since a law of some thousand ranks leaves most of them less than
      half an input of a batch, and a latent that is given none is dead by decree.
    - The threshold lies halfway between two activations. Where m_i is 1 or 2, the last activation taken is too high a
      threshold: over batches it lets through m_i - 1/2 rather than m_i, which would cost d_sae / (2 B) of k.

    A pass sorts columns; on a GPU that is a sort of all scores, and rows have the room of `batch_topk`.
    """

    Options = FeatureChoiceOptions

    of_latents = (*SAE.of_latents, "threshold", "fired", "shares", "border")
    k = Moving[float]()
    threshold: Tensor
    threshold_weight: Tensor
    fired: Tensor
    shares: Tensor
    border: Tensor

    def __init__(self, d_in: int, d_sae: int, options: FeatureChoiceOptions) -> None:
        super().__init__(d_in, d_sae)
        self.k = options.k
        self.schedule = make_schedule("k", options.k, options.k_schedule, 1, d_sae)
        self.auxk_weight = options.auxk_weight
        self.mutual_fraction = options.mutual_fraction
        self.threshold_start_step = options.threshold_start_step
        self.is_zipf = options.allocation == "zipf"
        self.law = options.zipf_exponent, options.zipf_shift
        self.is_mutual = False
        self.register_buffer("threshold", torch.zeros(d_sae))
        self.register_buffer("threshold_weight", torch.zeros(()))
        self.register_buffer("fired", torch.zeros(d_sae))  # inputs, under Mutual Choice
        self.register_buffer("shares", torch.ones(d_sae))  # m_i is proportional to them
        # What a pass found for `end_step`, which sees no scores.
        self.register_buffer("border", torch.zeros(d_sae), persistent=False)

    @property
    def is_sparse(self) -> bool:
        return True

    @property
    def most(self) -> int:
        return MOST * math.ceil(float(self.share_of_batch(self.k)))

    @property
    def reads_margin(self) -> bool:
        return False

    def begin_step(self, step: int, total: int) -> None:
        self.k = self.schedule(step, total)
        begin = min(round(self.mutual_fraction * total), total - 1)
        self.is_mutual = step < begin
        if step == begin // 2:
            self.fired.zero_()
        if step == begin and self.is_zipf:
            self.divide()
        k_changed = step > 0 and self.k != self.schedule(step - 1, total)
        if k_changed or step in (self.threshold_start_step, begin):
            self.threshold_weight.zero_()

    @torch.no_grad()
    def divide(self) -> None:
        """Give each latent the share of its rank, by how often it fired."""
        fired = self.whole_of("fired", self.fired)
        if not fired.any():
            return
        law = zipf(len(fired), *fit_zipf(fired, *self.law))
        shares = torch.empty_like(fired)
        order = fired.argsort(descending=True, stable=True)
        shares[order] = (law / law[0]).clamp(min=LEAST_SHARE).to(shares)
        self.shares.copy_(self.part_of("shares", shares))

    def allotted(self, rows: int) -> Tensor:
        """Return how many of the rows of the whole batch each latent takes at most (d_sae,)."""
        total = self.moved("k", torch.float64) * rows
        total = total.round() if isinstance(total, Tensor) else round(total)
        counts = allotment(self.whole_of("shares", self.shares), total, rows)
        return self.part_of("shares", counts)

    @torch.no_grad()
    def chosen(self, pre_acts: Tensor) -> Tensor:
        """Mask (B, d_sae) of what latents take of a batch."""
        counts = self.allotted(self.rows(pre_acts))
        mask, border = self.largest_of_columns(pre_acts, counts)
        self.border.copy_(border)
        return mask

    def activate(self, pre_acts: Tensor, condition: Tensor | None) -> Tensor:
        if not self.training:
            return pre_acts * (pre_acts > self.threshold)
        if self.is_mutual:
            return batch_topk(pre_acts.relu(), self.k)
        return pre_acts.where(self.chosen(pre_acts), 0)

    def select(
        self, pre_acts: Tensor, condition: Tensor | None, margin: Tensor | float
    ) -> SparseLatents:
        if not self.training:
            return SparseLatents.from_above(pre_acts, self.threshold, self.room)
        if self.is_mutual:
            k = self.share_of_batch(self.moved("k", torch.float64))
            return self.largest_of_batch(batch_topk_sparse(pre_acts, k, self.room), self.k)
        return SparseLatents.from_mask(pre_acts, self.chosen(pre_acts), self.room)

    def losses(self, fwd: Forward, dead: Tensor) -> dict[str, Tensor]:
        return super().losses(fwd, dead) | {"auxk": self.auxk_weight * self.auxk(fwd, dead)}

    @torch.no_grad()
    def end_step(self, fwd: Forward) -> None:
        if self.is_mutual:
            latents = fwd.latents
            fired = latents.count() if isinstance(latents, SparseLatents) else (latents != 0).sum(0)
            self.fired.add_(self.sum_over_rows(fired))
            return
        weight = DECAY * self.threshold_weight + (1 - DECAY)
        border = self.border.clamp(max=NEVER)
        mean = self.threshold + (1 - DECAY) / weight * (border - self.threshold)
        self.threshold.copy_(mean.where(border < NEVER, NEVER))
        self.threshold_weight.copy_(weight)

    def fold_scale(self, scale: float) -> None:
        super().fold_scale(scale)
        self.threshold.mul_(scale)

    def facts(self, fwd: Forward) -> dict[str, float]:
        return {"k": self.k}
