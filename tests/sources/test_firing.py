"""Features fire as often, as many and as much together as the parameters say."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy import stats

from saeflow.errors import UserError
from saeflow.sources.firing import (
    Hierarchy,
    arrival_times,
    firing_rates,
    first_arrivals,
    largest_l0,
    loadings,
    sample_l0,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


N = 20_000
LAWS: dict[str, tuple[dict[str, Any], Any]] = {
    "poisson": ({"kind": "poisson", "mean": 6.0, "smallest": 0, "largest": 40}, stats.poisson(6).cdf),
    "uniform": ({"kind": "uniform", "smallest": 3, "largest": 12}, stats.randint(3, 13).cdf),
    "lognormal": (
        {"kind": "lognormal", "mean": 20.0, "sigma": 0.5, "smallest": 0, "largest": 10_000},
        lambda k: stats.lognorm(0.5, scale=20 * np.exp(-0.125)).cdf(k + 0.5),
    ),
    "two_point": (
        {"kind": "two_point", "low": 4, "high": 16, "high_share": 0.25},
        lambda k: np.where(k < 4, 0, np.where(k < 16, 0.75, 1)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAWS)
def test_numbers_of_active_features_follow_their_law(name: str) -> None:
    law, cdf = LAWS[name]
    counts = sample_l0(law, N, rng())
    values = np.arange(counts.max() + 1)
    empirical = np.searchsorted(np.sort(counts), values, side="right") / N
    assert np.abs(empirical - cdf(values)).max() < 2 / np.sqrt(N)  # Kolmogorov-Smirnov, p < 0.001
    assert counts.max() <= largest_l0(law)


def test_the_constant_law_is_constant_and_clipping_is_exact() -> None:
    law = {"kind": "constant", "mean": 7}
    assert set(sample_l0(law, 100, rng())) == {7}
    assert largest_l0(law) == 7
    clipped = sample_l0({"kind": "poisson", "mean": 6, "smallest": 4, "largest": 8}, N, rng())
    assert set(clipped) == {4, 5, 6, 7, 8}
    assert np.mean(clipped == 8) == pytest.approx(stats.poisson(6).sf(7), abs=0.015)


def test_an_unknown_law_is_refused() -> None:
    with pytest.raises(UserError, match="expected one of bernoulli, constant"):
        sample_l0({"kind": "cauchy"}, 3, rng())


def indicator(indices: np.ndarray, n_features: int) -> np.ndarray:
    """(samples, n_features) bool from padded indices, checking that none is named twice."""
    active = np.zeros((len(indices), n_features + 1), dtype=int)
    np.add.at(active, (np.arange(len(indices))[:, None], indices), 1)
    active = active[:, :n_features]
    assert active.max() <= 1
    return active.astype(bool)


def successive_sampling(weights: np.ndarray, k: int) -> np.ndarray:
    """Independent reference: inclusion probabilities of k draws without replacement, exactly."""
    included = np.zeros(len(weights))

    def draw(left: tuple[int, ...], probability: float, chosen: tuple[int, ...]) -> None:
        if len(chosen) == k:
            included[list(chosen)] += probability
            return
        total = weights[list(left)].sum()
        for i in left:
            rest = tuple(j for j in left if j != i)
            draw(rest, probability * weights[i] / total, (*chosen, i))

    draw(tuple(range(len(weights))), 1.0, ())
    return included


@pytest.mark.parametrize("strength", [None, 0.6])
def test_given_their_number_features_fire_in_proportion_to_their_rates(
    strength: float | None,
) -> None:
    rates = firing_rates(6, 1.0, {"kind": "constant", "mean": 2}).astype(np.float32)
    np.testing.assert_allclose(rates, 1 / np.arange(1, 7), rtol=1e-6)
    shared = None if strength is None else loadings(6, 1, 0.0, rng())
    times = arrival_times(N, rates, shared, rng(1))
    active = indicator(first_arrivals(times, np.full(N, 2), 2, np.inf), 6)
    assert set(active.sum(1)) == {2}
    np.testing.assert_allclose(active.mean(0), successive_sampling(rates, 2), atol=4 * 0.5 / N**0.5)


def test_bernoulli_features_fire_independently_with_their_own_probabilities() -> None:
    law = {"kind": "bernoulli", "mean": 3.0, "p_min": 0.02, "p_max": 0.4, "largest": 20}
    rates = firing_rates(20, 0.7, law)
    p = 1 - np.exp(-rates)
    assert p.sum() == pytest.approx(3.0, abs=1e-6)
    assert (p.max(), p.min()) == (pytest.approx(0.4), pytest.approx(p[-1]))
    inner = (p < 0.399) & (p > 0.021)
    ranks = np.arange(1, 21)
    assert np.ptp(p[inner] * ranks[inner] ** 0.7) < 1e-9  # Zipf between the clips
    times = arrival_times(N, rates.astype(np.float32), None, rng())
    active = indicator(first_arrivals(times, np.full(N, 20), 20, 1.0), 20)
    np.testing.assert_allclose(active.mean(0), p, atol=4 * 0.5 / N**0.5)
    correlation = np.corrcoef(active.T) - np.eye(20)
    assert np.abs(correlation).max() < 5 / N**0.5


def test_counts_vary_from_sample_to_sample_and_are_kept() -> None:
    law = {"kind": "uniform", "smallest": 0, "largest": 9}
    counts = sample_l0(law, N, rng())
    times = arrival_times(N, np.ones(9, dtype=np.float32), None, rng(1))
    indices = first_arrivals(times, counts, 9, np.inf)
    assert np.array_equal((indices >= 0).sum(1), counts)
    found = np.where(indices < 0, 99, indices)
    assert (np.diff(found, axis=1)[found[:, 1:] < 99] > 0).all()  # increasing, padding last


def test_correlated_firing_follows_the_gaussian_copula() -> None:
    rates = -np.log1p(-np.array([0.3, 0.3, 0.1, 0.2], dtype=np.float32))
    shared = np.sqrt(np.float32(0.8)) * np.array(
        [[1, 0], [1, 0], [-1, 0], [0, 1]], dtype=np.float32
    )
    times = arrival_times(4 * N, rates, shared, rng())
    active = indicator(first_arrivals(times, np.full(4 * N, 4), 4, 1.0), 4)
    np.testing.assert_allclose(active.mean(0), [0.3, 0.3, 0.1, 0.2], atol=0.008)  # margins are kept
    for i, j, rho in ((0, 1, 0.8), (0, 2, -0.8), (0, 3, 0.0)):
        cuts = stats.norm.ppf(active.mean(0)[[i, j]])
        both = stats.multivariate_normal([0, 0], [[1, rho], [rho, 1]]).cdf(cuts)
        assert (active[:, i] & active[:, j]).mean() == pytest.approx(both, abs=0.006)


def test_loadings_have_the_strength_and_rank_asked_for() -> None:
    shared = loadings(50, 3, 0.4, rng())
    np.testing.assert_allclose(np.square(shared).sum(1), 0.4, rtol=1e-5)
    assert np.linalg.matrix_rank(shared) == 3


FOREST = {"roots": 4, "branching": 3, "depth": 2}


def parents_by_hand() -> list[int]:
    """4 roots, 12 children, 36 grandchildren, 8 features outside the forest."""
    children = [root for root in range(4) for _ in range(3)]
    grandchildren = [4 + child for child in range(12) for _ in range(3)]
    return [-1] * 4 + children + grandchildren + [-1] * 8


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("until", [np.inf, 1.0])
def test_children_fire_only_with_their_parents(exclusive: bool, until: float) -> None:
    forest = Hierarchy(**FOREST, exclusive=exclusive)
    parents = forest.parents(60)
    assert parents.tolist() == parents_by_hand()
    assert forest.size == 52
    rates = np.full(60, 0.7, dtype=np.float32)
    times = arrival_times(4000, rates, None, rng())
    own = times.copy()
    forest.delay(times)
    counts = sample_l0({"kind": "uniform", "smallest": 1, "largest": 20}, 4000, rng(1))
    active = indicator(first_arrivals(times, counts, 20, until), 60)
    if until == np.inf:
        assert np.array_equal(active.sum(1), counts)  # the number stays exact
    has_parent = parents >= 0
    assert not (active[:, has_parent] & ~active[:, parents[has_parent]]).any()
    assert active[:, has_parent].any(axis=0).all()  # every child fires at times
    siblings = np.stack([active[:, parents == p].sum(1) for p in range(16)], axis=1)
    assert siblings.max() == (1 if exclusive else 3)
    assert np.array_equal(times[:, 52:], own[:, 52:])  # features outside the forest are free
    if exclusive:  # the first of the siblings is the one that fires
        for parent in range(4):
            group = np.flatnonzero(parents == parent)
            chosen = active[:, group].any(1)
            first = own[:, group].argmin(1)
            assert np.array_equal(active[:, group].argmax(1)[chosen], first[chosen])


def test_parents_are_at_least_as_frequent_as_their_children() -> None:
    forest = Hierarchy(**FOREST, exclusive=True)
    zipf = firing_rates(60, 0.5, {"kind": "constant", "mean": 2})
    rates, parents = forest.arrange(zipf, rng()), forest.parents(60)
    np.testing.assert_allclose(np.sort(rates), np.sort(zipf))
    for child, parent in enumerate(parents):
        assert parent < 0 or rates[parent] >= rates[child]
    outside = rates[forest.size :]
    assert outside.max() > np.median(zipf) > outside.min()  # dealt at random, not what is left over
    assert all(a > b for a, b in pairwise(zipf))
