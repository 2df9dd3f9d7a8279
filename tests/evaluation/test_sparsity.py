"""L0 statistics and firing rates against numpy."""

import math

import numpy as np
import pytest
import torch

from saeflow.evaluation.sparsity import Sparsity


def count(latents: np.ndarray, batch_size: int = 13) -> Sparsity:
    sums = Sparsity(latents.shape[1])
    for start in range(0, len(latents), batch_size):
        sums.add(torch.tensor(latents[start : start + batch_size]))
    return sums


@pytest.fixture
def latents() -> np.ndarray:
    """200 rows of 40 latents with firing rates from 0 to 1, some values negative."""
    rng = np.random.default_rng(0)
    rates = np.concatenate([[0, 0, 1], np.geomspace(0.005, 0.9, 37)])
    return rng.standard_normal((200, 40)) * (rng.random((200, 40)) < rates)


def test_matches_numpy(latents: np.ndarray) -> None:
    l0, rate = (latents != 0).sum(1), (latents != 0).mean(0)
    got = count(latents).metrics()
    assert got["l0_mean"] == pytest.approx(l0.mean(), abs=1e-12)
    for name, q in [("l0_median", 0.5), ("l0_p5", 0.05), ("l0_p95", 0.95)]:
        assert got[name] == pytest.approx(np.quantile(l0, q), abs=1e-12)
    assert got["dead_fraction"] == (rate == 0).mean()
    assert got["dense_fraction"] == (rate > 0.1).mean()
    assert set(got) == {
        "l0_mean", "l0_median", "l0_p5", "l0_p95", "dead_fraction", "dense_fraction",
    }  # fmt: skip


@pytest.mark.parametrize("rows", [1, 2, 3, 10])
def test_quantiles_of_few_rows_match_numpy(rows: int) -> None:
    latents = (np.random.default_rng(rows).random((rows, 30)) < 0.4).astype(float)
    for q in (0.0, 0.05, 0.37, 0.5, 0.95, 1.0):
        expected = np.quantile(latents.sum(1), q)
        assert count(latents).quantile(q) == pytest.approx(expected, abs=1e-12)


def test_batch_size_changes_nothing(latents: np.ndarray) -> None:
    one, all_at_once = count(latents, 1), count(latents, 1000)
    assert one.metrics() == all_at_once.metrics()
    assert one.histograms() == all_at_once.histograms()


def test_a_rate_of_exactly_a_tenth_is_not_dense() -> None:
    latents = np.zeros((10, 2))
    latents[0, 0] = latents[:2, 1] = 1
    assert count(latents).metrics()["dense_fraction"] == 0.5


def test_l0_histogram_holds_every_row_where_it_belongs(latents: np.ndarray) -> None:
    l0 = (latents != 0).sum(1)
    bins = count(latents).histograms()["l0"]
    assert sum(n for *_, n in bins) == 200
    assert all(n == ((l0 >= left) & (l0 < right)).sum() for left, right, n in bins)
    assert [right for _, right, _ in bins[:-1]] == [left for left, *_ in bins[1:]]
    assert all(right - left == 1 for left, right, _ in bins)


def test_wide_l0_histogram_has_few_bins_of_one_width() -> None:
    sums = Sparsity(5000)
    sums.l0_counts[[3, 4, 999, 5000]] = torch.tensor([7, 1, 2, 5])
    bins = sums.histograms()["l0"]
    assert len(bins) <= 256
    assert {right - left for left, right, _ in bins} == {32.0}
    assert [entry for entry in bins if entry[2]] == [(0, 32, 8), (992, 1024, 2), (4992, 5024, 5)]


def test_rate_histogram_holds_every_living_latent(latents: np.ndarray) -> None:
    rate = (latents != 0).mean(0)
    logs = np.log10(rate[rate > 0])
    bins = count(latents).histograms()["log10_firing_rate"]
    assert bins[-1][1] == 0
    assert bins[0][0] <= math.log10(1 / 200) < bins[0][1]
    for left, right, n in bins:
        last = right == 0
        assert n == ((logs >= left) & ((logs < right) | last)).sum()
    assert sum(n for *_, n in bins) == len(logs)


def test_all_dead_and_no_latents_have_values() -> None:
    dead = count(np.zeros((5, 3)))
    assert dead.metrics()["dead_fraction"] == 1
    assert dead.metrics()["l0_mean"] == 0
    assert dead.histograms() == {"l0": [(0.0, 1.0, 5)], "log10_firing_rate": []}
    none = count(np.zeros((5, 0)))
    assert none.metrics() == {"l0_mean": 0, "l0_median": 0, "l0_p5": 0, "l0_p95": 0}


def test_one_row_that_fires_everywhere() -> None:
    bins = count(np.ones((1, 4))).histograms()
    assert bins["log10_firing_rate"] == [(-0.25, 0.0, 4)]
    assert bins["l0"] == [(4.0, 5.0, 1)]
