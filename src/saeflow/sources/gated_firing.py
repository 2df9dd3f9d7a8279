"""Features that fire each with a probability of its own, a child only with its parent: the worlds of SynthSAEBench.

A feature fires where a standard normal number, which features share in part, is above the threshold of its probability. Of the
firing features of an exclusive group one is kept at random, whichever probability it has, and a feature without its parent is
silent (arXiv 2602.14687, section 3, and `sae_lens.synthetic`). Coefficients have a mean and a deviation for each feature; where they
would be below zero, the feature is silent.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

_MOST_SHARED = 0.99
"""Largest share of a feature's variance that it has in common with others, as in `sae_lens.synthetic`."""


@dataclass(frozen=True)
class World:
    """A dictionary and how its features fire.

    Attributes:
        features: (n, d_in) float32.
        bias: (d_in,) float32, added to every row.
        probabilities: (n,) float32, each feature's own, before parents and exclusive siblings silence it.
        means, stds: (n,) float32, of the coefficients.
        parents: (n,) int32, -1 for none.
        groups: (n,) int32, of the features of one group one fires at most; -1 for none.
        is_scaled: (n,) bool, the coefficient is multiplied by the parent's over the parent's mean.
        loadings: (n, rank) float32 on the factors that features share; rank 0 for independent ones.
        own: (n,) float32, deviation of what is a feature's own.
    """

    features: np.ndarray
    bias: np.ndarray
    probabilities: np.ndarray
    means: np.ndarray
    stds: np.ndarray
    parents: np.ndarray
    groups: np.ndarray
    is_scaled: np.ndarray
    loadings: np.ndarray
    own: np.ndarray

    @classmethod
    def of(cls, stored: Mapping[str, np.ndarray]) -> "World":
        """Return the world of stored arrays; no loadings are those of independent features."""
        independent = {
            "loadings": np.zeros((len(stored["parents"]), 0), dtype=np.float32),
            "own": np.ones(len(stored["parents"]), dtype=np.float32),
        }
        return cls(**{**independent, **stored})

    def stored(self) -> dict[str, np.ndarray]:
        """Return the arrays for a file, which cannot hold empty ones."""
        return {name: array for name, array in vars(self).items() if array.size}


def zipf_probabilities(n: int, *, exponent: float, p_max: float, p_min: float) -> np.ndarray:
    """(n,) float64 probabilities that fall from p_max to p_min as an affine function of rank^-exponent."""
    zipf = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    if n == 1:
        return np.array([p_max])
    result: np.ndarray = p_min + (p_max - p_min) * (zipf - zipf[-1]) / (zipf[0] - zipf[-1])
    return result


def compensated(probabilities: np.ndarray, parents: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Raise probabilities by about as much as parents and exclusive siblings lower them.

    A child's is divided by its parent's p, and multiplied by 1 + (sum of its siblings') / p where they are exclusive; both from
    the given probabilities. At most 1.

    Args:
        probabilities: (n,) that the features shall fire with in the end.
        parents, groups: as in `World`.
    """
    has_parent = parents >= 0
    of_parent = np.where(has_parent, probabilities[parents], 1.0)
    is_exclusive = groups >= 0
    totals = np.zeros(len(probabilities))
    np.add.at(totals, groups[is_exclusive], probabilities[is_exclusive])
    of_siblings = np.where(is_exclusive, totals[groups] - probabilities, 0.0)
    result: np.ndarray = np.minimum(
        probabilities / of_parent * (1 + np.maximum(of_siblings, 0) / of_parent), 1.0
    )
    return result


def random_loadings(
    n: int, rank: int, scale: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Normal loadings of deviation `scale`, and the deviation of what is each feature's own.

    Returns:
        (n, rank) and (n,) float32; rows of a squared norm above 0.99 are shortened to it.
    """
    rows = scale * rng.standard_normal((n, rank))
    square = np.square(rows).sum(axis=1)
    is_long = 1 - square < 1 - _MOST_SHARED
    rows[is_long] *= np.sqrt(_MOST_SHARED / square[is_long])[:, None]
    own = np.sqrt(1 - np.square(rows).sum(axis=1))
    return rows.astype(np.float32), own.astype(np.float32)


@dataclass(frozen=True)
class Entries:
    """Active features of some rows, in the order of rows and of features."""

    rows: np.ndarray
    features: np.ndarray
    values: np.ndarray

    def kept(self, mask: np.ndarray) -> "Entries":
        return Entries(self.rows[mask], self.features[mask], self.values[mask])


class Firing:
    """Draws which features of a world are active, with which coefficients.

    Features are drawn from the roots down, children only where their parent is active: what a silent parent's child
    would have been decides nothing.

    Args:
        world: any.
    """

    def __init__(self, world: World) -> None:
        from scipy.special import ndtri

        self.world = world
        self.thresholds = -ndtri(world.probabilities.astype(np.float64)).astype(np.float32)
        self.roots = np.flatnonzero(world.parents < 0)
        by_parent = np.argsort(world.parents, kind="stable")[len(self.roots) :]
        self.children = by_parent
        parents = world.parents[by_parent]
        self.first = np.searchsorted(parents, np.arange(len(world.parents)))
        self.n_children = np.bincount(parents, minlength=len(world.parents))

    def draw(self, n_rows: int, rng: np.random.Generator) -> Entries:
        """Return the active features of `n_rows` rows."""
        factors = rng.standard_normal((n_rows, self.world.loadings.shape[1]), dtype=np.float32)
        active = self._roots(factors, rng)
        found = [active]
        while True:
            active = self._children(active, factors, rng)
            if not len(active.rows):
                break
            found.append(active)
        rows, features, values = (
            np.concatenate([getattr(one, name) for one in found])
            for name in ("rows", "features", "values")
        )
        order = np.lexsort((features, rows))
        return Entries(rows[order], features[order], values[order])

    def _roots(self, factors: np.ndarray, rng: np.random.Generator) -> Entries:
        """Active features that have no parent."""
        world, roots = self.world, self.roots
        gaussian = rng.standard_normal((len(factors), len(roots)), dtype=np.float32)
        gaussian *= world.own[roots]
        gaussian += factors @ world.loadings[roots].T
        rows, places = np.nonzero(gaussian > self.thresholds[roots])
        return self._active(rows, roots[places], rng)

    def _children(self, parents: Entries, factors: np.ndarray, rng: np.random.Generator) -> Entries:
        """Active children of active features."""
        world = self.world
        counts = self.n_children[parents.features]
        which = np.repeat(np.arange(len(counts)), counts)  # (candidates,) their parents
        offset = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        features = self.children[self.first[parents.features][which] + offset]
        rows = parents.rows[which]
        gaussian = rng.standard_normal(len(rows), dtype=np.float32) * world.own[features]
        gaussian += (factors[rows] * world.loadings[features]).sum(axis=1)
        fires = gaussian > self.thresholds[features]
        above = parents.values / world.means[parents.features]
        return self._active(rows[fires], features[fires], rng, above[which[fires]])

    def _active(
        self,
        rows: np.ndarray,
        features: np.ndarray,
        rng: np.random.Generator,
        above: np.ndarray | None = None,
    ) -> Entries:
        """Features that fire, with coefficients above 0, one of each exclusive group.

        Args:
            rows, features: (entries,) of one depth.
            rng: source of randomness.
            above: (entries,) coefficients of parents over their means.
        """
        world = self.world
        drawn = rng.standard_normal(len(features), dtype=np.float32)
        values = world.means[features] + world.stds[features] * drawn
        entries = Entries(rows, features, values)
        if above is not None:
            values *= np.where(world.is_scaled[features], above, np.float32(1))
        entries = entries.kept(values > 0)
        return entries.kept(self._wins(entries, rng))

    def _wins(self, entries: Entries, rng: np.random.Generator) -> np.ndarray:
        """(entries,) bool: all without a group, and one of each group of each row, drawn with equal chances."""
        groups = self.world.groups[entries.features]
        wins: np.ndarray = groups < 0
        (grouped,) = np.nonzero(~wins)
        order = np.lexsort((rng.random(len(grouped)), groups[grouped], entries.rows[grouped]))
        grouped = grouped[order]
        pairs = np.stack([entries.rows[grouped], groups[grouped]])
        is_first = np.ones(len(grouped), dtype=bool)
        is_first[1:] = (pairs[:, 1:] != pairs[:, :-1]).any(axis=0)
        wins[grouped[is_first]] = True
        return wins
