"""Top-AFA SAE: as many latents as it takes to reach the norm of the input (Lee et al. 2025, arXiv:2503.24277)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from saeflow.config.options import AuxKOptions, option
from saeflow.operators import SparseLatents
from saeflow.saes.density import FollowsDensity
from saeflow.saes.forward import Forward


@dataclass(frozen=True, kw_only=True)
class TopAFAOptions(AuxKOptions):
    """Options of `top_afa`; defaults are of the released runs, which sweep afa_weight over 1/128..1/16."""

    afa_weight: float = option(
        "Weight of the AFA loss, the mean over rows of (|z| - |x|)^2, beside the error's mean over dimensions. It decides "
        "how many latents there are: there is no k.",
        default=0.03125,
        low=0,
        high=1e30,
    )


class TopAFA(FollowsDensity):
    """z keeps the k largest of relu(a), k >= 1 the least at which | |z| - |x - b_dec| | is smallest.

    For nearly orthogonal unit directions |z| is about the norm of what they add up to, so that k follows from the
    norm of the input and from how fast the latents fall: the null hypothesis of adaptivity. No gradient passes
    through k. The loss is mean (x - x_hat)^2 + afa_weight (|z| - |x|)^2 + AuxK; as in the released code the norm
    there is that of x itself. On a GPU the choice is plain torch: a sort of every row.
    """

    Options = TopAFAOptions

    divides_latents = False  # each row's k needs all of its scores
    takes_own_targets = False  # the norm is read off the input too

    def __init__(self, d_in: int, d_sae: int, options: TopAFAOptions) -> None:
        super().__init__(d_in, d_sae)
        self.afa_weight = options.afa_weight
        self.auxk_weight = options.auxk_weight

    @torch.no_grad()
    def condition(self, x: Tensor) -> Tensor | None:
        norm: Tensor = torch.linalg.vector_norm((x - self.centre).to(self.W_dec.dtype), dim=1)
        return norm

    def allowed_k(self, x: Tensor) -> Tensor | None:
        with torch.no_grad():
            norm = self.condition(x)
            assert norm is not None
            return reaching(self.pre_activations(x).relu(), norm).sum(1)

    def activate(self, pre_acts: Tensor, condition: Tensor | None) -> Tensor:
        assert condition is not None
        active = pre_acts.relu()
        return active * reaching(active.detach(), condition)

    @property
    def reads_margin(self) -> bool:
        return False

    def select(
        self, pre_acts: Tensor, condition: Tensor | None, margin: Tensor | float
    ) -> SparseLatents:
        assert condition is not None
        active = pre_acts.to(condition.dtype).relu()
        chosen = reaching(active, condition) & (active > 0)
        return SparseLatents.from_mask(pre_acts, chosen, self.room)

    def losses(self, fwd: Forward, dead: Tensor) -> dict[str, Tensor]:
        squares = fwd.values.square()
        sums = (
            fwd.latents.row_sums(squares)
            if isinstance(fwd.latents, SparseLatents)
            else squares.sum(1)
        )
        length = torch.where(sums > 0, sums, 1).sqrt() * (sums > 0)  # with gradient 0 at 0
        excess = length - torch.linalg.vector_norm(fwd.x, dim=1)
        return {
            "reconstruction": self.mean_over_rows(fwd.squared_errors / self.d_out),
            "afa": self.afa_weight * self.mean_over_rows(excess.square()),
            "auxk": self.auxk_weight * self.auxk(fwd, dead),
        }


def reaching(active: Tensor, norm: Tensor) -> Tensor:
    """Mark the fewest of the largest entries of each row whose own norm is nearest to a given one.

    Args:
        active: (B, d_sae), none below 0; without gradient.
        norm: (B,).

    Returns:
        (B, d_sae) bool, at least one of each row; of equal entries those of lower indices first.
    """
    ordered = active.sort(dim=1, descending=True, stable=True)
    lengths = ordered.values.square().cumsum(1).sqrt()
    last = (lengths - norm[:, None]).abs().argmin(1, keepdim=True)  # the first of equal ones
    places = torch.arange(active.shape[1], device=active.device)
    return torch.zeros_like(active, dtype=torch.bool).scatter(1, ordered.indices, places <= last)
