"""Bootstrap intervals over contexts: a resample adds up the sums of its contexts and divides once.

Tokens of a context are not independent, so contexts (images, samples) are drawn and not rows (Efron 1979, the
percentile interval of 95 %).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from saeflow.evaluation.measure import Lines, Result, Seen

RATIOS = {
    "fvu": ("error", "spread"),
    "nmse": ("error", "power"),
    "cosine": ("cosine", "rows"),
    "l0_mean": ("l0", "rows"),
    "ce_degradation": ("rise", "tokens"),
    "kl": ("divergence", "tokens"),
}
"""By metric that has an interval, the two sums whose quotient it is."""
_SHARE = 0.95

Sums = Mapping[str, np.ndarray]
"""(contexts,) float64 of each sum."""


class PerContext:
    """Each context's part of the sums of RATIOS.

    Args:
        contexts: of the split.
        settings: resamples and seed.
    """

    def __init__(self, contexts: int, settings: Mapping[str, int]) -> None:
        self.settings = settings
        names = ("rows", "error", "power", "spread", "cosine", "l0")
        self.all = {name: np.zeros(contexts) for name in names}

    def update(self, seen: Seen) -> None:
        self.add_rows(seen.column("context"), seen.terms, seen.l0)

    def add_rows(self, context: np.ndarray, terms: Mapping[str, Tensor], l0: Tensor) -> None:
        """Add rows (n,) of some contexts."""
        for name, values in {**terms, "l0": l0}.items():
            np.add.at(self.all[name], context, values.cpu().numpy())
        np.add.at(self.all["rows"], context, 1)

    @property
    def sums(self) -> dict[str, np.ndarray]:
        """Return the sums of the contexts that have evaluated rows."""
        seen = self.all["rows"] > 0
        return {name: values[seen] for name, values in self.all.items()}

    def result(self) -> Result:
        return Result(tables={"intervals": interval_lines(self.sums, self.settings)})


def resample(sums: Sums, settings: Mapping[str, int]) -> dict[str, np.ndarray]:
    """(resamples,) sums of as many contexts as there are, drawn with replacement.

    The same contexts are drawn for any sums of equally many contexts, so that differences are paired.

    Args:
        sums: of each context.
        settings: resamples and seed.
    """
    contexts = len(next(iter(sums.values())))
    values = np.stack(list(sums.values()), axis=1)
    drawn = np.empty((settings["resamples"], values.shape[1]))
    random = np.random.default_rng(settings["seed"])
    for number in range(len(drawn)):
        chosen = random.integers(contexts, size=contexts)
        drawn[number] = np.bincount(chosen, minlength=contexts) @ values
    return dict(zip(sums, drawn.T, strict=True))


def ratios(sums: Sums) -> dict[str, Any]:
    """The metrics of RATIOS that some sums allow, a number or (resamples,) each."""
    return {
        metric: sums[over] / sums[under]
        for metric, (over, under) in RATIOS.items()
        if over in sums and under in sums
    }


def bounds(values: np.ndarray) -> tuple[float, float]:
    """The percentile interval of some resamples."""
    low, high = np.quantile(values, [(1 - _SHARE) / 2, (1 + _SHARE) / 2])
    return float(low), float(high)


def total(sums: Sums) -> dict[str, Any]:
    """The sums over all contexts."""
    return {name: values.sum() for name, values in sums.items()}


def interval_lines(sums: Sums, settings: Mapping[str, int]) -> Lines:
    """Lines of the table `intervals`: value, low and high of each metric, and of how many contexts."""
    contexts = len(next(iter(sums.values())))
    drawn = ratios(resample(sums, settings))
    lines = []
    for metric, value in ratios(total(sums)).items():
        low, high = bounds(drawn[metric])
        line = {"metric": metric, "value": float(value), "low": low, "high": high}
        lines.append(line | {"contexts": contexts})
    return lines
