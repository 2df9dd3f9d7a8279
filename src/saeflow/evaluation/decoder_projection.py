"""Decoder projection: a proxy for whether an SAE has as many active latents as its inputs have features.

Chanin and Garriga-Alonso 2025 (arXiv:2508.16560): a decoder that mixes features, since its L0 is too low or too high,
projects onto inputs in which its features are off. Of SAEs of one size and source that differ in their L0, the one of
least projection has the L0 that the proxy says.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saeflow.evaluation.controls import threshold_for
from saeflow.evaluation.measure import Result, Seen

MOST_ROWS = 4096
SHARE = 0.25
"""Place of the projection among all of a row, as a share of the latents; the paper's toy models go from a quarter to a half."""
_PART = 512  # rows whose projections are in memory at a time


class DecoderProjection:
    """The n-th largest projection of a row on decoder directions, over evenly spaced rows; n is a quarter of the latents.

    All projections (x - b_dec) . d of the rows, d of length 1, are ranked together; the measure is the largest that
    n per row exceed, divided by the root mean squared distance of the rows from their mean. It is absent where less
    than n per row are positive.

    Args:
        sae: whose `directions` and `b_dec` are taken.
        rows: how many are evaluated.
    """

    def __init__(self, sae: Any, rows: int) -> None:
        self.directions = normalize(sae.directions().detach().float(), dim=1)
        self.b_dec = sae.b_dec
        self.stride = -(-rows // MOST_ROWS)
        self.seen = 0
        self.kept: list[Tensor] = []

    def update(self, seen: Seen) -> None:
        first = -self.seen % self.stride
        self.kept.append(seen.x[first :: self.stride].float())
        self.seen += len(seen.x)

    def result(self) -> Result:
        x = torch.cat(self.kept).to(self.directions.device)
        spread = (x - x.mean(0)).square().sum(1).mean().sqrt()
        away = x if self.b_dec is None else x - self.b_dec.detach().float()

        def projections() -> Iterator[Tensor]:
            for part in away.split(_PART):
                yield part @ self.directions.t()

        found = threshold_for(projections, int(SHARE * len(self.directions)) * len(x))
        if found == 0 or not spread > 0:
            return Result()
        return Result({"decoder_projection": found / float(spread)})
