"""Latents that AuxK trains: the dead, and where asked for those that fire too rarely for their rank (aux_zipf, arXiv:2411.02124)."""

import torch
from torch import Tensor

from saeflow.operators import SparseLatents, fit_zipf, zipf
from saeflow.saes import SAE, Forward

WINDOW = 100
"""Steps over which firing is counted: enough that a law can be fitted, few beside those of a run."""
SHARE = 0.5
"""Share of the expected firings below which a latent is underused: below all of them half of all latents lie by chance."""


class Usage:
    """Counts of how often latents fired in a window of steps, and the latents that the last window found underused.

    Zipf's law is fitted to the counts of a window; the latent of rank r is underused until the next window ends if it
    fired less than SHARE times as often as the law expects of rank r. Nothing is counted where AuxK trains the dead alone.

    Attributes:
        state: tensors that steps change, with an entry for each latent.
    """

    def __init__(self, sae: SAE) -> None:
        self.sae, self.is_on = sae, sae.auxk_latents == "underused"
        self.fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_dec.device)
        self.underused = torch.zeros_like(self.fired, dtype=torch.bool)
        self.state = [self.fired, self.underused] if self.is_on else []

    def begin(self, step: int) -> None:
        """Close a window, if one ends before this step: on a GPU the host waits for its counts."""
        if not self.is_on or step == 0 or step % WINDOW:
            return
        found = underused(self.sae.whole_of("W_dec", self.fired))
        self.underused.copy_(self.sae.part_of("W_dec", found))
        self.fired.zero_()

    @torch.no_grad()
    def trained_by_auxk(self, fwd: Forward, dead: Tensor) -> Tensor:
        """Count the firings of a pass; mask (d_sae,) of the latents that AuxK trains, of those that are dead and others."""
        if not self.is_on:
            return dead
        latents = fwd.latents
        fired = latents.count() if isinstance(latents, SparseLatents) else (latents != 0).sum(0)
        self.fired.add_(self.sae.sum_over_rows(fired))
        return dead | self.underused

    def most(self, dead: Tensor) -> int:
        """Return how many latents AuxK trains, of those that are dead and others: the host waits."""
        return int((dead | self.underused).sum())

    def saved(self) -> dict[str, Tensor]:
        """Return the state of the whole SAE, for a checkpoint; every rank has to ask for it."""
        return {f"usage.{n}": self.sae.whole_of("W_dec", part) for n, part in enumerate(self.state)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take the state from a checkpoint."""
        for n, part in enumerate(self.state):
            part.copy_(self.sae.part_of("W_dec", tensors[f"usage.{n}"]))


def underused(fired: Tensor) -> Tensor:
    """Mask (n,) of latents that fired less than SHARE times as often as Zipf's law, fitted to all, expects of their rank.

    Args:
        fired: (n,) int64; where none fired, nothing is expected.
    """
    if not fired.any():
        return torch.zeros_like(fired, dtype=torch.bool)
    expected = zipf(len(fired), *fit_zipf(fired)).to(fired.device) * fired.sum()
    order = fired.argsort(descending=True, stable=True)
    mask = torch.zeros_like(fired, dtype=torch.bool)
    mask[order] = fired[order] < SHARE * expected
    return mask
