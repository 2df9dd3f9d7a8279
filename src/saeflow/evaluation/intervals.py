"""Bootstrap intervals over units (documents, images, samples): a resample adds up the sums of its units and divides once.

Tokens of a context are not independent, nor are contexts of a document, so documents are drawn with all that they
hold, and not rows (Efron 1979, the percentile interval of 95 %, in clusters). One unit alone has no interval.
"""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from saeflow.evaluation.measure import Lines, Result, Seen
from saeflow.evaluation.resampling import drawn_units

logger = logging.getLogger(__name__)

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
"""(units,) float64 of each sum."""

UNIT = "unit"
"""In saved sums, the number of each unit."""


class PerUnit:
    """Each unit's part of the sums of RATIOS.

    Args:
        units: (contexts,) the number of the unit that each context of the split is of.
        settings: resamples and seed.
    """

    def __init__(self, units: np.ndarray, settings: Mapping[str, int]) -> None:
        self.settings = settings
        self.units, self.unit_of = np.unique(units, return_inverse=True)
        names = ("rows", "error", "power", "spread", "cosine", "l0")
        self.all = {name: np.zeros(len(self.units)) for name in names}

    def update(self, seen: Seen) -> None:
        self.add_rows(seen.column("context"), seen.terms, seen.l0)

    def add_rows(self, context: np.ndarray, terms: Mapping[str, Tensor], l0: Tensor) -> None:
        """Add rows (n,) of some contexts."""
        unit = self.unit_of[context]
        for name, values in {**terms, "l0": l0}.items():
            np.add.at(self.all[name], unit, values.cpu().numpy())
        np.add.at(self.all["rows"], unit, 1)

    @property
    def sums(self) -> dict[str, np.ndarray]:
        """Return the sums of the units that have evaluated rows."""
        seen = self.all["rows"] > 0
        return {name: values[seen] for name, values in self.all.items()}

    @property
    def saved(self) -> dict[str, np.ndarray]:
        """Return these sums with the numbers of their units."""
        return {UNIT: self.units[self.all["rows"] > 0], **self.sums}

    def result(self) -> Result:
        return Result(tables={"intervals": interval_lines(self.sums, self.settings)})


def resample(sums: Sums, settings: Mapping[str, int]) -> dict[str, np.ndarray]:
    """(resamples,) sums of as many units as there are, drawn with replacement.

    The same units are drawn for any sums of equally many units, so that differences are paired.

    Args:
        sums: of each unit.
        settings: resamples and seed.
    """
    units = len(next(iter(sums.values())))
    values = np.stack(list(sums.values()), axis=1)
    drawn = np.stack([times @ values for times in drawn_units(units, settings)])
    return dict(zip(sums, drawn.T, strict=True))


def ratios(sums: Sums) -> dict[str, Any]:
    """The metrics of RATIOS that some sums allow, a number or (resamples,) each."""
    return {
        metric: sums[over] / sums[under]
        for metric, (over, under) in RATIOS.items()
        if over in sums and under in sums
    }


def bounds(values: np.ndarray, units: int) -> tuple[float, float] | tuple[None, None]:
    """The percentile interval of some resamples of so many units; None where there is one alone."""
    if units < 2:
        return None, None
    low, high = np.quantile(values, [(1 - _SHARE) / 2, (1 + _SHARE) / 2])
    return float(low), float(high)


def total(sums: Sums) -> dict[str, Any]:
    """The sums over all units."""
    return {name: values.sum() for name, values in sums.items()}


def count(sums: Sums) -> int:
    """The number of units."""
    return len(next(iter(sums.values())))


def by_unit(sums: Sums, units: np.ndarray) -> dict[str, np.ndarray]:
    """Sums (contexts,) added up by the unit (contexts,) that each context is of, in order of the units' numbers."""
    _, unit_of = np.unique(units, return_inverse=True)
    return {name: np.bincount(unit_of, weights=values) for name, values in sums.items()}


def interval_lines(sums: Sums, settings: Mapping[str, int]) -> Lines:
    """Lines of the table `intervals`: value, low and high of each metric, and of how many units."""
    units = count(sums)
    if units < 2:
        logger.warning("one document, image or sample was evaluated: no interval can be given")
    drawn = ratios(resample(sums, settings))
    lines = []
    for metric, value in ratios(total(sums)).items():
        low, high = bounds(drawn[metric], units)
        line = {"metric": metric, "value": float(value), "low": low, "high": high}
        lines.append(line | {"units": units})
    return lines
