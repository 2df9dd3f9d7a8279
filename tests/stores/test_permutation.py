"""The shuffle: exact, invertible, and to statistical tests a uniform one."""

import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from saeflow.stores.permutation import Permutation


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 1024, 99991, 300_000])
def test_every_id_has_one_place_and_comes_back(n: int) -> None:
    shuffle = Permutation(n, seed=3)
    places = shuffle.forward(np.arange(n))
    np.testing.assert_array_equal(np.bincount(places, minlength=n), np.ones(n))
    np.testing.assert_array_equal(shuffle.inverse(places), np.arange(n))


@pytest.mark.parametrize("n", [10**9, 10**12 + 39, (1 << 62) - 1])
def test_large_domains_need_no_memory(n: int) -> None:
    shuffle = Permutation(n, seed=0)
    ids = np.random.default_rng(0).integers(0, n, 2000)
    places = shuffle.forward(ids)
    assert places.min() >= 0
    assert places.max() < n
    assert len(np.unique(places)) == len(np.unique(ids))
    np.testing.assert_array_equal(shuffle.inverse(places), ids)


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_every_order_of_a_few_ids_is_as_likely(n: int) -> None:
    orders = Counter(tuple(Permutation(n, seed).forward(np.arange(n))) for seed in range(6000))
    counts = [*orders.values(), *[0] * (math.factorial(n) - len(orders))]
    assert stats.chisquare(counts).pvalue > 1e-4


def test_places_of_two_neighbours_are_independent() -> None:
    n = 40
    counts = np.zeros((n, n))
    for seed in range(8000):
        first, second = Permutation(n, seed).forward(np.array([17, 18]))
        counts[first, second] += 1
    assert not counts.diagonal().any()
    assert stats.chisquare(counts[~np.eye(n, dtype=bool)]).pvalue > 1e-4


@pytest.mark.parametrize("n", [50_000, 1_000_003])
def test_one_large_shuffle_looks_uniform(n: int) -> None:
    places = Permutation(n, seed=11).forward(np.arange(n))
    bins = 50  # a block of ids is spread evenly over blocks of places
    table = np.zeros((bins, bins))
    np.add.at(table, (np.arange(n) * bins // n, places * bins // n), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-4
    steps = np.diff(places)
    follows = np.abs(steps) == 1  # about Poisson with mean 2
    assert 1e-5 < stats.poisson.cdf(follows.sum(), 2) < 1 - 1e-5
    low_bits = np.bincount(places % 16 * 16 + np.arange(n) % 16, minlength=256)
    assert stats.chisquare(low_bits, low_bits.sum() * np.ones(256) / 256).pvalue > 1e-4
    assert abs(stats.spearmanr(np.arange(n), places).statistic) < 4 / math.sqrt(n)


def test_ascents_come_in_no_pattern() -> None:
    places = Permutation(100_000, seed=2).forward(np.arange(100_000))
    ascents = int((np.diff(places) > 0).sum())  # Eulerian: mean (n - 1) / 2, variance (n + 1) / 12
    assert abs(ascents - 99_999 / 2) < 4.5 * math.sqrt(100_001 / 12)


def test_seeds_and_sizes_give_unrelated_shuffles() -> None:
    places = [Permutation(5000, seed).forward(np.arange(5000)) for seed in range(20)]
    same = [int((a == b).sum()) for i, a in enumerate(places) for b in places[:i]]
    assert 1e-5 < stats.poisson.cdf(sum(same), len(same)) < 1 - 1e-5  # one match a pair on average
    assert not np.array_equal(Permutation(4999, 0).forward(np.arange(4999)), places[0][:4999])


def test_shape_is_kept_and_bad_ids_are_refused() -> None:
    shuffle = Permutation(100, 0)
    ids = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(shuffle.forward(ids), shuffle.forward(ids.ravel()).reshape(2, 3))
    assert shuffle.forward(np.array([], int)).shape == (0,)
    for ids in (np.array([100]), np.array([-1])):
        with pytest.raises(ValueError, match=r"ids must be in 0\.\.99"):
            shuffle.forward(ids)
    with pytest.raises(ValueError, match="n must be in"):
        Permutation(0, 0)
