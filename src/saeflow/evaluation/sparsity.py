"""Sparsity: exact counts and quantiles of active latents in memory that does not grow with the rows."""

import math

import numpy as np
import torch
from torch import Tensor

Histogram = list[tuple[float, float, int]]
"""Bins (left, right, count): left <= value < right."""

DENSE_RATE = 0.1

_MOST_BINS = 256
_RATE_BIN = 0.25  # decades


class Sparsity:
    """Streaming counts of non-zero latents (a latent may be negative: zero is what counts).

    Args:
        d_sae: number of latents, may be 0 (the mean as a baseline has none).
        device: where the latents are.
    """

    def __init__(self, d_sae: int, device: str | torch.device = "cpu") -> None:
        self.d_sae = d_sae
        self.l0_counts = torch.zeros(d_sae + 1, dtype=torch.int64, device=device)
        self.fired = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def add(self, latents: Tensor) -> Tensor:
        """Add latents (n, d_sae); returns their L0 (n,) int64."""
        active = latents != 0
        l0 = active.sum(1)
        self.l0_counts += torch.bincount(l0, minlength=self.d_sae + 1)
        self.fired += active.sum(0)
        return l0

    @property
    def rows(self) -> int:
        return int(self.l0_counts.sum())

    def quantile(self, q: float) -> float:
        """Exact quantile of L0, interpolated linearly as numpy.quantile does by default."""
        cumulative = torch.cumsum(self.l0_counts, 0).cpu().numpy()
        place = (int(cumulative[-1]) - 1) * q
        low, high = (
            int(np.searchsorted(cumulative, index, side="right"))
            for index in (math.floor(place), math.ceil(place))
        )
        return low + (high - low) * (place - math.floor(place))

    def metrics(self) -> dict[str, float]:
        """Return the metrics of sparsity; dead and dense fractions only where there are latents."""
        values = torch.arange(self.d_sae + 1, device=self.l0_counts.device)
        metrics = {
            "l0_mean": int((self.l0_counts * values).sum()) / self.rows,
            "l0_median": self.quantile(0.5),
            "l0_p5": self.quantile(0.05),
            "l0_p95": self.quantile(0.95),
        }
        if self.d_sae:
            fired = self.fired.cpu().numpy()
            metrics["dead_fraction"] = float((fired == 0).mean())
            metrics["dense_fraction"] = float((fired > DENSE_RATE * self.rows).mean())
        return metrics

    def histograms(self) -> dict[str, Histogram]:
        """`l0` (rows per L0) and `log10_firing_rate` (latents per rate; dead ones are left out).

        L0 bins have width 1, or the least power of two that needs at most 256 bins, and run without
        gaps from the least to the largest L0. Rate bins are a quarter of a decade wide; a latent
        that fires on every row is in the last bin.
        """
        return {"l0": self._l0_histogram(), "log10_firing_rate": self._rate_histogram()}

    def _l0_histogram(self) -> Histogram:
        counts = self.l0_counts.cpu().numpy()
        found = np.flatnonzero(counts)
        width = 1
        while found[-1] // width - found[0] // width >= _MOST_BINS:
            width *= 2
        bins = np.bincount(found // width - found[0] // width, weights=counts[found])
        start = int(found[0]) // width
        return [
            (float((start + i) * width), float((start + i + 1) * width), int(count))
            for i, count in enumerate(bins)
        ]

    def _rate_histogram(self) -> Histogram:
        fired = self.fired.cpu().numpy()
        rates = np.log10(fired[fired > 0] / self.rows)
        if not len(rates):
            return []
        first = min(math.floor(math.log10(1 / self.rows) / _RATE_BIN), -1)
        index = np.clip(np.floor(rates / _RATE_BIN).astype(int), first, -1) - first
        bins = np.bincount(index, minlength=-first)
        return [
            ((first + i) * _RATE_BIN, (first + i + 1) * _RATE_BIN, int(count))
            for i, count in enumerate(bins)
        ]
