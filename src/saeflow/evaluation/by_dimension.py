"""Relation of the number of active latents to the local intrinsic dimension around a row."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from saeflow.evaluation.correlation import correlation, partial_correlation
from saeflow.evaluation.measure import Lines, Result, Seen

_BINS = 10


class PerRow:
    """L0 and k of the first rows of the store, which are a random sample of it.

    Args:
        dimensions: `ESTIMATOR-NEIGHBOURS` (rows,) and `norm` (rows,), of these rows.
    """

    def __init__(self, dimensions: Mapping[str, np.ndarray]) -> None:
        rows = len(dimensions["norm"])
        self.dimensions = dimensions
        self.l0, self.k_hat = np.full(rows, np.nan), np.full(rows, np.nan)

    def update(self, seen: Seen) -> None:
        mine = seen.rows < len(self.l0)
        self.l0[seen.rows[mine]] = seen.l0.cpu().numpy()[mine]
        if seen.allowed is not None:
            self.k_hat[seen.rows[mine]] = seen.allowed.double().cpu().numpy()[mine]

    def result(self) -> Result:
        return Result(tables={"dimension": self.lines(), "dimension_bins": self.bins()})

    def lines(self) -> Lines:
        """Correlations with the local intrinsic dimension, by estimator and neighbours."""
        lines = []
        norm = self.dimensions["norm"]
        for line, dimension, known in self._estimates():
            line |= {"rows": int(known.sum()), "dimension": float(dimension[known].mean())}
            for quantity, values in (("l0", self.l0), ("k_hat", self.k_hat)):
                held = known & np.isfinite(values)
                if held.any():
                    parts = values[held], dimension[held], norm[held]
                    line[f"spearman_{quantity}"] = correlation(*parts[:2])
                    line[f"partial_{quantity}"] = partial_correlation(*parts)
            lines.append(line)
        return lines

    def bins(self) -> Lines:
        """Mean dimension, L0 and k of rows with a similar dimension: ten bins of equally many rows."""
        lines = []
        for line, dimension, known in self._estimates():
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

    def _estimates(self) -> Iterator[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
        """Estimator and neighbours, the estimates (rows,), and which rows have one and an L0."""
        for name in sorted(set(self.dimensions) - {"norm"}):
            estimator, _, neighbours = name.partition("-")
            line = {"estimator": estimator, "neighbours": int(neighbours)}
            dimension = self.dimensions[name]
            yield line, dimension, np.isfinite(dimension) & np.isfinite(self.l0)
