"""AbsTopK SAE: keep the k latents of largest size of each input, with their signs (Zhu et al. 2025, arXiv:2510.00404)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from saeflow.operators import SparseLatents, keep_topk, topk_sparse
from saeflow.saes.topk import TopK, TopKOptions


@dataclass(frozen=True, kw_only=True)
class AbsTopKOptions(TopKOptions):
    """Options of `abs_topk`: those of `topk`, with the largest latents by size."""


class AbsTopK(TopK):
    """z = a on the k entries of largest |a| of each row, else 0; ties go to the lower index.

    A latent stands for a direction and its opposite. AuxK chooses dead latents by their size, too (SAELens).
    """

    Options = AbsTopKOptions

    is_signed = True

    def activate(self, pre_acts: Tensor, condition: Tensor | None) -> Tensor:
        return keep_topk(pre_acts.abs(), self.k) * pre_acts.detach().sign()

    def select(
        self, pre_acts: Tensor, condition: Tensor | None, margin: Tensor | float
    ) -> SparseLatents:
        chosen = topk_sparse(pre_acts.abs(), self.moved("k", torch.int32), self.room)
        return self.largest_of_rows(chosen, self.k).at(pre_acts)

    def activate_selected(self, selected: SparseLatents, condition: Tensor | None) -> SparseLatents:
        return selected
