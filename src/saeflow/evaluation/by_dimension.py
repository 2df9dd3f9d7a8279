"""Relation of the number of active latents to the local intrinsic dimension around a row."""

from collections.abc import Collection, Mapping
from typing import Literal

import numpy as np

from saeflow.evaluation.correlation import (
    correlation,
    multiplicities,
    partial_correlation,
    resampled_correlations,
    resampled_partial,
    resampled_ranks,
)
from saeflow.evaluation.dimension import named
from saeflow.evaluation.intervals import bounds
from saeflow.evaluation.measure import Lines, Result, Seen

_BINS = 10
_EVERYWHERE = "all"
_COLUMNS = ("context", "position", "cover")


class PerRow:
    """L0 and k of the first rows of the store, which are a random sample of it.

    Args:
        dimensions: `ESTIMATOR-NEIGHBOURS` (rows,) and `norm` (rows,), of these rows.
        columns: names of the store's columns: `cover`, the class of the object on a patch, divides patches into
            those on objects and those on the background.
        groups: by name, the positions of a context that a group of rows holds; without any, rows of several
            positions are divided into an early and a late half.
        units: (contexts,) number of the document, image or sample that each context of the split is of.
        bootstrap: resamples and seed of intervals over units; None for no intervals.
    """

    def __init__(
        self,
        dimensions: Mapping[str, np.ndarray],
        columns: Collection[str],
        groups: Mapping[str, Literal["first", "rest"]],
        units: np.ndarray,
        bootstrap: Mapping[str, int] | None,
    ) -> None:
        rows = len(dimensions["norm"])
        self.norm = dimensions["norm"]
        self.dimensions = {name: x for name, x in dimensions.items() if name != "norm"}
        self.groups, self.units, self.bootstrap = groups, units, bootstrap
        self.l0, self.k_hat = np.full(rows, np.nan), np.full(rows, np.nan)
        self.facts = {name: np.full(rows, -1) for name in _COLUMNS if name in columns}
        self.known = np.isfinite(np.stack(list(self.dimensions.values()))).all(axis=0)

    def update(self, seen: Seen) -> None:
        mine = seen.rows < len(self.l0)
        if not mine.any():
            return
        self.l0[seen.rows[mine]] = seen.l0.cpu().numpy()[mine]
        if seen.allowed is not None:
            self.k_hat[seen.rows[mine]] = seen.allowed.double().cpu().numpy()[mine]
        for name, values in self.facts.items():
            values[seen.rows[mine]] = seen.column(name)[mine]

    def result(self) -> Result:
        return Result(tables={"dimension": self.lines(), "dimension_bins": self.bins()})

    def regions(self) -> dict[str, np.ndarray]:
        """By name, which rows (rows,) a region holds of those that have an L0 and every estimate."""
        position, seen = self.facts["position"], self.known & np.isfinite(self.l0)
        found = {_EVERYWHERE: seen}
        for name, which in self.groups.items():
            found[name] = seen & ((position == 0) == (which == "first"))
        if not self.groups and len(held := np.unique(position[seen])) > 1:
            middle = (held[0] + held[-1] + 1) / 2
            found |= {"early": seen & (position < middle), "late": seen & (position >= middle)}
        if "cover" in self.facts:
            patch, on_object = seen & (position > 0), self.facts["cover"] >= 0
            found |= {"object": patch & on_object, "background": patch & ~on_object}
        return {name: held for name, held in found.items() if held.any()}

    def lines(self) -> Lines:
        """Correlations with the local intrinsic dimension, by region, estimator and neighbours."""
        return [
            {"region": region, **line}
            for region, held in self.regions().items()
            for line in self._of_region(held)
        ]

    def _of_region(self, held: np.ndarray) -> Lines:
        """Lines of the rows (rows,) of a region."""
        units = self.units[self.facts["context"][held]]
        count = len(np.unique(units))
        times = multiplicities(units, self.bootstrap) if self.bootstrap and count > 1 else None
        measured = {
            name: _Ranked(values[held], times)
            for name, values in (("l0", self.l0), ("k_hat", self.k_hat))
            if np.isfinite(values[held]).all()
        }
        norm = _Ranked(self.norm[held], times)
        lines = []
        for line, values in named(self.dimensions):
            dimension = _Ranked(values[held], times)
            line |= {"rows": int(held.sum()), "units": count}
            line["dimension"] = float(values[held].mean())
            for quantity, ranked in measured.items():
                found = _related(ranked, dimension, norm)
                line |= {name.format(quantity): value for name, value in found.items()}
            lines.append(line)
        return lines

    def bins(self) -> Lines:
        """Mean dimension, L0 and k of rows with a similar dimension: ten bins of equally many rows."""
        lines = []
        known = self.known & np.isfinite(self.l0)
        for line, dimension in named(self.dimensions):
            rows = np.flatnonzero(known)
            rows = rows[np.argsort(dimension[rows], kind="stable")]
            for number, held in enumerate(np.array_split(rows, _BINS)):
                means = {
                    name: float(values[held].mean()) if np.isfinite(values[held]).all() else None
                    for name, values in (("l0", self.l0), ("k_hat", self.k_hat))
                }
                own = {"bin": number, "rows": len(held), "dimension": float(dimension[held].mean())}
                lines.append({**line, **own, **means} if len(held) else None)
        return [line for line in lines if line]


class _Ranked:
    """A quantity of some rows, with its ranks in resamples of their units.

    Args:
        values: (rows,).
        times: (resamples, rows), see `multiplicities`; None for no resamples.
    """

    def __init__(self, values: np.ndarray, times: np.ndarray | None) -> None:
        self.values, self.times = values, times
        self.ranks = None if times is None else resampled_ranks(values, times)

    def with_(self, other: "_Ranked") -> np.ndarray | None:
        """(resamples,) rank correlations with another quantity of these rows."""
        if self.times is None or self.ranks is None or other.ranks is None:
            return None
        return resampled_correlations(self.ranks, other.ranks, self.times)


def _related(quantity: _Ranked, dimension: _Ranked, norm: _Ranked) -> dict[str, float | None]:
    """Rank correlations of a quantity, whose name is left open, with the dimension: as it is, and given the norm."""
    a, b, given = quantity.values, dimension.values, norm.values
    plain = correlation(a, b)
    if plain is None:
        return {}
    found = {"spearman_{}": plain, "partial_{}": partial_correlation(a, b, given)}
    drawn, with_norm, dimension_with_norm = (
        quantity.with_(dimension), quantity.with_(norm), dimension.with_(norm),
    )  # fmt: skip
    if drawn is None or with_norm is None or dimension_with_norm is None:
        return found
    partial = resampled_partial(drawn, with_norm, dimension_with_norm)
    for name, values in (("spearman", drawn), ("partial", partial)):
        valued = values[np.isfinite(values)]  # a resample of equal rows has no correlation
        found[f"{name}_{{}}_low"], found[f"{name}_{{}}_high"] = bounds(valued, len(valued))
    return found
