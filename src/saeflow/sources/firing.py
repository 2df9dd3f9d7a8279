"""Active features of each sample: their number, their identity and their co-occurrence.

Each feature has a rate and, in each sample, an arrival time E / rate with E ~ Exp(1). Given the number
of active features, the first that many to arrive fire: that is weighted sampling without replacement.
Under the law `bernoulli` every feature that arrives before time 1 fires, so each has its own
probability and the number follows. A child never arrives before its parent, and of exclusive siblings
only the first arrives at all, so the number stays exact with a hierarchy too.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from saeflow.errors import UserError

LAWS = ("bernoulli", "constant", "lognormal", "poisson", "two_point", "uniform")


def largest_l0(law: Mapping[str, Any]) -> int:
    """The largest number of features that a law lets fire in one sample."""
    key = {"constant": "mean", "two_point": "high"}.get(law["kind"], "largest")
    return int(law[key])


def sample_l0(law: Mapping[str, Any], size: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers of active features.

    Args:
        law: {kind: constant, mean} | {kind: poisson, mean, smallest, largest} |
            {kind: lognormal, mean, sigma, smallest, largest} | {kind: uniform, smallest, largest} |
            {kind: two_point, low, high, high_share}; values outside smallest..largest are clipped.
            {kind: bernoulli, mean, p_min, p_max, largest} sets only an upper bound here.
        size: how many samples.
        rng: source of randomness.

    Returns:
        (size,) int64.
    """
    match law["kind"]:
        case "constant":
            return np.full(size, law["mean"], dtype=np.int64)
        case "bernoulli":
            return np.full(size, law["largest"], dtype=np.int64)
        case "uniform":
            return rng.integers(law["smallest"], law["largest"], size, endpoint=True)
        case "two_point":
            result: np.ndarray = np.where(
                rng.random(size) < law["high_share"], law["high"], law["low"]
            )
            return result
        case "poisson":
            counts = rng.poisson(law["mean"], size)
        case "lognormal":
            location = np.log(law["mean"]) - law["sigma"] ** 2 / 2
            counts = np.rint(rng.lognormal(location, law["sigma"], size)).astype(np.int64)
        case unknown:
            raise UserError(f"l0_law.kind: expected one of {', '.join(LAWS)}, found {unknown!r}.")
    return np.clip(counts, law["smallest"], law["largest"]).astype(np.int64)


def firing_rates(n_features: int, exponent: float, law: Mapping[str, Any]) -> np.ndarray:
    """Rates of arrival, falling with rank as rank^-exponent (Zipf).

    Under `bernoulli` the firing probabilities c rank^-exponent, clipped to p_min..p_max, sum to the
    law's mean, and a rate is -log(1 - p); otherwise only the rates' ratios matter.

    Returns:
        (n_features,) float64, decreasing.
    """
    from scipy.optimize import brentq  # planning imports this module, and need not wait for scipy

    zipf = np.arange(1, n_features + 1, dtype=np.float64) ** -exponent
    if law["kind"] != "bernoulli":
        return zipf
    low, high = law["p_min"], law["p_max"]

    def missing(scale: float) -> float:
        return float(np.clip(scale * zipf, low, high).sum() - law["mean"])

    scale = brentq(missing, 0, high / zipf[-1], xtol=1e-12)
    result: np.ndarray = -np.log1p(-np.clip(scale * zipf, low, high))
    return result


class Hierarchy:
    """A forest: `roots` trees in which every node has `branching` children, `depth` levels below the root.

    The forest's features come first, level by level; the others are free of it.

    Args:
        roots, branching, depth: its shape.
        exclusive: at most one child of a parent fires.
    """

    def __init__(self, *, roots: int, branching: int, depth: int, exclusive: bool) -> None:
        self.roots = roots
        self.branching = branching
        self.depth = depth
        self.exclusive = exclusive
        sizes = [roots * branching**level for level in range(depth + 1)]
        self.starts = [0, *np.cumsum(sizes).tolist()]

    @property
    def size(self) -> int:
        """Number of features in the forest."""
        return int(self.starts[-1])

    def parents(self, n_features: int) -> np.ndarray:
        """(n_features,) int32: each feature's parent, -1 where there is none."""
        parents = np.full(n_features, -1, dtype=np.int32)
        for level in range(1, self.depth + 1):
            start, stop = self.starts[level], self.starts[level + 1]
            parents[start:stop] = self.starts[level - 1] + np.arange(stop - start) // self.branching
        return parents

    def arrange(self, rates: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Deal the rates out at random, but within a tree no child's is above its parent's level."""
        rates = rng.permutation(rates)
        trees = np.concatenate(
            [
                np.arange(start, stop).reshape(self.roots, -1)
                for start, stop in zip(self.starts, self.starts[1:], strict=False)
            ],
            axis=1,
        )  # (roots, nodes of a tree), level by level
        rates[trees] = -np.sort(-rates[trees], axis=1)
        return rates

    def delay(self, times: np.ndarray) -> None:
        """Let no child arrive before its parent, nor more than one of exclusive siblings; in place.

        Args:
            times: (samples, n_features) float32 arrival times.
        """
        for level in range(1, self.depth + 1):
            start, stop = self.starts[level], self.starts[level + 1]
            children = times[:, start:stop].reshape(len(times), -1, self.branching)
            if self.exclusive:
                first = children.argmin(axis=2, keepdims=True)
                children[np.arange(self.branching) != first] = np.inf
            above = times[:, self.starts[level - 1] : start, None]
            after = np.nextafter(above, np.float32(np.inf), dtype=np.float32)
            times[:, start:stop] = np.maximum(children, after).reshape(len(times), -1)


def loadings(n_features: int, rank: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    """(n_features, rank) float32 rows of squared norm `strength`: what features share of a sample's factors."""
    rows = rng.standard_normal((n_features, rank))
    rows *= np.sqrt(strength) / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32)


def arrival_times(
    samples: int, rates: np.ndarray, shared: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    """Arrival times E / rate, E ~ Exp(1), independent or joined by a Gaussian copula.

    Args:
        samples: number of samples.
        rates: (n_features,) float32.
        shared: (n_features, rank) loadings; features i and j then have the copula's correlation
            shared_i . shared_j. None: independent.
        rng: source of randomness.

    Returns:
        (samples, n_features) float32.
    """
    from scipy.special import log_ndtr

    times: np.ndarray
    if shared is None:
        times = rng.standard_exponential((samples, len(rates)), dtype=np.float32) / rates
        return times
    own = np.sqrt(1 - np.square(shared).sum(axis=1))
    gaussian = rng.standard_normal((samples, len(rates)), dtype=np.float32) * own
    gaussian += rng.standard_normal((samples, shared.shape[1]), dtype=np.float32) @ shared.T
    times = (-log_ndtr(gaussian) / rates).astype(np.float32)
    return times


def first_arrivals(times: np.ndarray, counts: np.ndarray, most: int, until: float) -> np.ndarray:
    """The features that fire, by index.

    Args:
        times: (samples, n_features) arrival times.
        counts: (samples,) how many fire, at most.
        most: the largest count there can be.
        until: only those that arrive before this time fire.

    Returns:
        (samples, most) int32, increasing, padded with -1.
    """
    n_features = times.shape[1]
    if most < n_features:
        early = np.argpartition(times, most - 1, axis=1)[:, :most]
    else:
        early = np.broadcast_to(np.arange(n_features), times.shape)
    when = np.take_along_axis(times, early, axis=1)
    order = np.argsort(when, axis=1, kind="stable")
    early, when = np.take_along_axis(early, order, axis=1), np.take_along_axis(when, order, axis=1)
    fires = (np.arange(early.shape[1]) < counts[:, None]) & (when < until)
    indices = np.full((len(times), most), n_features, dtype=np.int32)
    indices[:, : early.shape[1]] = np.where(fires, early, n_features)
    indices.sort(axis=1)
    indices[indices == n_features] = -1
    return indices
