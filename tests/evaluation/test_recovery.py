"""Recovery against brute force, scikit-learn and scipy, and on answers known by construction."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import precision_recall_fscore_support
from torch.nn.functional import normalize

from saeflow.evaluation.recovery import Recovery, cosines, match, spearman


def unit_rows(rows: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)


def padded(supports: list[list[int]]) -> np.ndarray:
    most = max(map(len, supports))
    return np.array([row + [-1] * (most - len(row)) for row in supports], dtype=np.int32)


@pytest.mark.parametrize("n_latents", [3, 5, 7])
def test_matching_is_the_best_of_all_assignments(n_latents: int) -> None:
    features, directions = unit_rows(5, 4, 0), unit_rows(n_latents, 4, 1)
    similarity = (features @ directions.T).numpy()
    if n_latents >= 5:
        choices = itertools.permutations(range(n_latents), 5)
        best = max(sum(similarity[i, j] for i, j in enumerate(p)) for p in choices)
    else:
        choices = itertools.permutations(range(5), n_latents)
        best = max(sum(similarity[i, j] for j, i in enumerate(p)) for p in choices)
    matching = match(similarity)
    assert matching.cosine.sum() == pytest.approx(best, abs=1e-12)
    assert (matching.latent >= 0).sum() == min(5, n_latents)
    assert Recovery(features, directions).metrics_of_dictionary()[
        "matched_feature_cosine"
    ] == pytest.approx(best / 5, abs=1e-12)


def test_a_permuted_and_scaled_dictionary_is_recovered_exactly() -> None:
    features = unit_rows(6, 8, 0)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    directions = torch.cat([unit_rows(3, 8, 9), 7 * features[order]])
    recovery = Recovery(features, directions)
    assert recovery.metrics_of_dictionary()["matched_feature_cosine"] == pytest.approx(1, abs=1e-12)
    np.testing.assert_array_equal(recovery.matching.latent[order], np.arange(3, 9))


def test_a_flipped_direction_counts_for_mcc_only() -> None:
    features = torch.eye(3)
    got = Recovery(features, -features).metrics_of_dictionary()
    assert got["mcc"] == pytest.approx(1)
    assert got["matched_feature_cosine"] == pytest.approx(0)


def test_a_flipped_direction_of_a_signed_latent_is_found() -> None:
    recovery = Recovery(torch.eye(3), -torch.eye(3)[[1, 2, 0]], is_signed=True)
    got = recovery.metrics_of_dictionary()
    assert got["matched_feature_cosine"] == got["features_found"] == 1
    assert recovery.matching.latent.tolist() == [2, 0, 1]
    directions = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    both = [Recovery(unit_rows(6, 5, 0), directions, is_signed=s).chance for s in (False, True)]
    assert both[0] < both[1] < 1


def test_half_a_dictionary_is_half_recovered() -> None:
    got = Recovery(torch.eye(4), torch.eye(4)[:2]).metrics_of_dictionary()
    assert got["matched_feature_cosine"] == pytest.approx(0.5)  # over the true features
    assert got["mcc"] == pytest.approx(1)  # over the pairs


def test_zero_directions_are_similar_to_nothing() -> None:
    assert not cosines(torch.eye(3), torch.zeros(3, 3)).any()


def test_supports_worked_out_by_hand() -> None:
    # feature 0 is latent 2, feature 1 is latent 0; latent 1 stands for nothing, feature 2 has none
    directions = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    recovery = Recovery(torch.eye(4)[:2], directions)
    latents = torch.tensor([[0.0, 1.0, 3.0], [-2.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    recovery.add(latents, padded([[0], [1], [0, 1]]))
    # row 1: hit 0, false latent 1; row 2: hit 1, false latent 2; row 3: misses 0 and 1
    got = recovery.metrics()
    assert got["support_precision"] == pytest.approx(2 / 4)
    assert got["support_recall"] == pytest.approx(2 / 4)
    assert got["support_f1"] == pytest.approx(2 / 4)
    assert got["true_l0_mean"] == pytest.approx(4 / 3)


def test_supports_match_scikit_learn_when_every_latent_has_a_feature() -> None:
    rng = np.random.default_rng(0)
    features = unit_rows(9, 12, 0)
    order = rng.permutation(9)
    truth = rng.random((60, 9)) < 0.3
    noisy = truth ^ (rng.random((60, 9)) < 0.1)
    latents = torch.tensor(noisy[:, order] * rng.uniform(0.1, 1, (60, 9)))
    supports = padded([np.flatnonzero(row).tolist() for row in truth])
    recovery = Recovery(features, features[order])
    for start in range(0, 60, 17):
        recovery.add(latents[start : start + 17], supports[start : start + 17])
    got = recovery.metrics()
    precision, recall, f1, _ = precision_recall_fscore_support(truth, noisy, average="micro")
    assert got["support_precision"] == pytest.approx(precision, abs=1e-12)
    assert got["support_recall"] == pytest.approx(recall, abs=1e-12)
    assert got["support_f1"] == pytest.approx(f1, abs=1e-12)
    expected = spearmanr(noisy.sum(1), truth.sum(1)).statistic
    assert got["spearman_l0_true"] == pytest.approx(expected, abs=1e-12)


def test_latents_without_a_feature_cost_precision() -> None:
    directions = torch.cat([torch.eye(4)[:3], torch.eye(4)[3:].repeat(5, 1)])
    recovery = Recovery(torch.eye(4)[:3], directions)
    recovery.add(torch.ones(10, 8), padded([[0, 1, 2]] * 10))
    got = recovery.metrics()
    assert got["support_precision"] == pytest.approx(3 / 8)
    assert got["support_recall"] == 1


def test_spearman_of_counted_pairs_matches_scipy() -> None:
    rng = np.random.default_rng(4)
    a = rng.integers(0, 6, 500)
    b = a + rng.integers(0, 9, 500)
    counted = Counter(zip(a.tolist(), b.tolist(), strict=True))
    assert spearman(counted) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_allowed_k_is_ranked_against_the_truth() -> None:
    recovery = Recovery(torch.eye(4), torch.eye(4))
    supports = padded([[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]])
    k_hat = torch.tensor([1.5, 1.25, 3.0, 3.5])
    recovery.add(torch.ones(4, 4), supports, k_hat)
    expected = spearmanr(k_hat.numpy(), [1, 2, 3, 4]).statistic
    got = recovery.metrics()
    assert got["spearman_k_hat_true"] == pytest.approx(expected, abs=1e-12)
    assert "spearman_l0_true" not in got  # constant L0
    assert set(got) | {"spearman_l0_true"} == {
        "matched_feature_cosine", "mcc", "support_precision", "support_recall", "support_f1", "true_l0_mean",
        "spearman_l0_true", "spearman_k_hat_true", "features_found", "matched_feature_cosine_chance",
    }  # fmt: skip


def test_a_dead_sae_has_recall_zero_and_no_precision() -> None:
    recovery = Recovery(torch.eye(3), torch.eye(3))
    recovery.add(torch.zeros(5, 3), padded([[0]] * 5))
    got = recovery.metrics()
    assert got["support_recall"] == got["support_f1"] == 0
    assert "support_precision" not in got


def test_correlations_given_the_norm_are_those_of_residuals() -> None:
    """Against scipy's ranks with the norm's regressed out, row by row."""
    rng = np.random.default_rng(3)
    count = rng.integers(1, 8, 3000)
    norm = torch.from_numpy(count**0.5 * rng.lognormal(0, 0.3, 3000))
    k_hat = torch.from_numpy(0.5 * count + 2 * norm.numpy() + rng.random(3000))
    l0 = np.minimum(12, count + rng.integers(0, 5, 3000))
    latents = torch.from_numpy((np.arange(12)[None] < l0[:, None]) * 1.0)
    indices = np.where(np.arange(7)[None] < count[:, None], np.arange(7)[None], -1)
    recovery = Recovery(torch.eye(12), torch.eye(12))
    for part in np.array_split(np.arange(3000), 4):
        recovery.add(latents[part], indices[part], k_hat[part], norm[part])
    got = recovery.metrics()
    assert got["spearman_norm_true"] == pytest.approx(spearmanr(norm, count)[0], abs=2e-3)
    for name, values in (("l0", l0), ("k_hat", k_hat.numpy())):
        ranks = [rankdata(v) for v in (values, count)]
        given = np.stack([rankdata(norm), np.ones(3000)], 1)
        a, b = (rank - given @ np.linalg.lstsq(given, rank)[0] for rank in ranks)
        assert got[f"partial_{name}_true"] == pytest.approx(np.corrcoef(a, b)[0, 1], abs=5e-3)


def test_random_directions_reach_chance_and_no_more() -> None:
    features = unit_rows(40, 16, 0)
    of_chance = [
        Recovery(features, unit_rows(80, 16, seed)).metrics_of_dictionary() for seed in range(1, 6)
    ]
    for found in of_chance:
        assert found["matched_feature_cosine"] == pytest.approx(
            found["matched_feature_cosine_chance"], abs=0.05
        )
    assert Recovery(features, features[:20]).metrics_of_dictionary()["features_found"] == 0.5
