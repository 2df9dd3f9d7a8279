"""Baselines against scikit-learn, on a store held in memory."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as SklearnPCA  # noqa: N811

from saeflow.errors import UserError
from saeflow.evaluation.baselines import PCA, Identity, Mean, baselines, principal_components
from saeflow.evaluation.measure import measure_rows
from saeflow.evaluation.rows import EvaluatedRows, RowSelection

ALL_ROWS = RowSelection(positions="all", norm_limit=None)


@pytest.fixture
def store(memory_store: Any) -> Any:
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((9, 9)) * np.geomspace(1, 0.05, 9)[:, None]
    return memory_store(rng.standard_normal((400, 9)) @ mixing + 5)


@pytest.mark.parametrize("batch_size", [64, 1000])
def test_principal_components_match_scikit_learn(store: Any, batch_size: int) -> None:
    mean, directions, variances = principal_components(store, batch_size, "cpu")
    reference = SklearnPCA(svd_solver="full").fit(store.x.double().numpy())
    np.testing.assert_allclose(mean, reference.mean_, atol=1e-12)
    np.testing.assert_allclose(variances, reference.explained_variance_ * 399 / 400, rtol=1e-9)
    alignment = np.abs((directions.numpy() * reference.components_).sum(1))
    np.testing.assert_allclose(alignment, 1, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_explained_variance_of_pca_matches_scikit_learn(store: Any, rank: int) -> None:
    pca = next(b for b in baselines(store, [rank], 100, "cpu") if isinstance(b, PCA))
    got = measure_rows(pca, EvaluatedRows(store, ALL_ROWS, 100, "cpu")).metrics
    reference = SklearnPCA(rank, svd_solver="full").fit(store.x.double().numpy())
    expected = reference.explained_variance_ratio_.sum()
    assert got["explained_variance"] == pytest.approx(expected, abs=1e-6)
    assert got["l0_mean"] == rank


def test_identity_is_perfect_and_the_mean_explains_nothing(store: Any) -> None:
    identity = measure_rows(Identity(9), EvaluatedRows(store, ALL_ROWS, 100, "cpu")).metrics
    assert identity["fvu"] == identity["nmse"] == 0
    assert identity["l0_mean"] == 9
    mean = Mean(store.mean)
    got = measure_rows(mean, EvaluatedRows(store, ALL_ROWS, 100, "cpu")).metrics
    assert got["fvu"] == pytest.approx(1, rel=1e-6)
    assert got["l0_mean"] == 0


def test_ranks_from_the_width_on_are_left_out(store: Any) -> None:
    found = baselines(store, [20, 3, 9, 3, 1], 100, "cpu")
    assert [(b.variant, b.width) for b in found] == [
        ("identity", 9), ("mean", 0), ("pca", 1), ("pca", 3),
    ]  # fmt: skip


def test_rows_that_are_not_finite_are_refused(store: Any) -> None:
    store.x[7, 2] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        principal_components(store, 100, "cpu")


class Rounded(Identity):
    """A reconstruction that treats each entry by itself: no matrix product, so no rounding of one."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.round(x).relu()


@pytest.mark.parametrize("batch_size", [1, 7, 400])
def test_batch_size_does_not_change_a_metric(store: Any, batch_size: int) -> None:
    def measured(size: int) -> dict[str, float]:
        return measure_rows(Rounded(9), EvaluatedRows(store, ALL_ROWS, size, "cpu")).metrics

    assert measured(batch_size) == pytest.approx(measured(50), rel=1e-10, abs=1e-12)
