"""Reconstruction metrics against plain numpy, scikit-learn and rows worked out by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import explained_variance_score, r2_score
from sklearn.metrics.pairwise import paired_cosine_distances

from saeflow.errors import UserError
from saeflow.evaluation.reconstruction import Reconstruction
from saeflow.tables.metrics import check


def measure(x: np.ndarray, x_hat: np.ndarray, batch_size: int = 7) -> dict[str, float]:
    sums = Reconstruction(torch.tensor(x.mean(0)))
    for start in range(0, len(x), batch_size):
        stop = start + batch_size
        sums.add(torch.tensor(x[start:stop]), torch.tensor(x_hat[start:stop]))
    return sums.metrics()


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Activations with a large mean, unequal scales and one huge row, and a biased reconstruction."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((101, 6)) * [1, 2, 3, 0.1, 5, 1] + [50, 0, -3, 1, 0, 0]
    x[17] *= 40
    return x, 0.9 * x + 0.3 + 0.1 * rng.standard_normal(x.shape)


def test_a_row_worked_out_by_hand() -> None:
    # means 1 and 2: squared distances 1 + 4 in each row; errors (0, -1) and (0, 1)
    x, x_hat = np.array([[2.0, 0.0], [0.0, 4.0]]), np.array([[2.0, 1.0], [0.0, 3.0]])
    got = measure(x, x_hat)
    assert got["fvu"] == pytest.approx(2 / 10, abs=1e-15)
    assert got["explained_variance"] == pytest.approx(0.8, abs=1e-15)
    assert got["nmse"] == pytest.approx(2 / 20, abs=1e-15)
    assert got["mse"] == pytest.approx(2 / 4, abs=1e-15)
    assert got["cosine"] == pytest.approx((2 / 5**0.5 + 1) / 2, abs=1e-15)
    assert got["relative_norm"] == pytest.approx((5**0.5 + 3) / 6, abs=1e-15)
    assert got["fve_dictionary_learning"] == pytest.approx(1 - 2 / 10, abs=1e-15)  # mean error is 0
    assert got["ev_legacy_saelens"] == pytest.approx(1 - (1 / 5 + 1 / 5) / 2, abs=1e-15)
    assert got["nmse_token_openai"] == pytest.approx((1 / 4 + 1 / 16) / 2, abs=1e-15)
    # scalar mean 1.5: (.5^2 + 1.5^2 + 1.5^2 + 2.5^2) = 11
    assert got["r2_overcomplete"] == pytest.approx(1 - 2 / 11, abs=1e-15)
    # mean squares 10 a row and 5 an entry: the denominator is 10 - 25
    assert got["ev_saelens_6_18"] == pytest.approx(1 + 1 / 15, abs=1e-15)
    # standard deviations of the rows with n - 1: sqrt 2 and sqrt 8
    by_hand = (1 / (2**0.5 + 1e-5) ** 2 + 1 / (8**0.5 + 1e-5) ** 2) / 4
    assert got["nmse_layernorm_batchtopk"] == pytest.approx(by_hand, abs=1e-15)


def test_every_metric_is_in_the_metric_table(pair: tuple[np.ndarray, np.ndarray]) -> None:
    measured = measure(*pair)
    check(measured)
    assert set(measured) == {
        "nmse", "fvu", "explained_variance", "cosine", "relative_norm", "mse", "fve_dictionary_learning",
        "ev_legacy_saelens", "ev_saelens_6_18", "nmse_token_openai", "nmse_layernorm_batchtopk", "r2_overcomplete",
    }  # fmt: skip


def test_matches_plain_numpy(pair: tuple[np.ndarray, np.ndarray]) -> None:
    x, x_hat = pair
    e, got = x - x_hat, measure(x, x_hat)
    norms, norms_hat = np.linalg.norm(x, axis=1), np.linalg.norm(x_hat, axis=1)
    assert got["nmse"] == pytest.approx((e**2).sum() / (x**2).sum(), rel=1e-12)
    assert got["fvu"] == pytest.approx((e**2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-12)
    assert got["relative_norm"] == pytest.approx(norms_hat.sum() / norms.sum(), rel=1e-12)
    assert got["mse"] == pytest.approx((e**2).mean(), rel=1e-12)
    assert got["nmse_token_openai"] == pytest.approx(
        ((e**2).sum(1) / (x**2).sum(1)).mean(), rel=1e-12
    )
    by_row = 1 - (e**2).sum(1) / ((x - x.mean(0)) ** 2).sum(1)
    assert got["ev_legacy_saelens"] == pytest.approx(by_row.mean(), rel=1e-12)
    total, residual = torch.tensor(x).var(0).sum(), torch.tensor(e).var(0).sum()
    assert got["fve_dictionary_learning"] == pytest.approx(float(1 - residual / total), rel=1e-12)
    centred, centred_hat = ((a - x.mean(1, keepdims=True)) for a in (x, x_hat))
    scale = x.std(1, ddof=1, keepdims=True) + 1e-5
    standardised = ((centred / scale - centred_hat / scale) ** 2).mean()
    assert got["nmse_layernorm_batchtopk"] == pytest.approx(standardised, rel=1e-12)


def test_matches_scikit_learn(pair: tuple[np.ndarray, np.ndarray]) -> None:
    x, x_hat = pair
    got = measure(x, x_hat)
    weighted = r2_score(x, x_hat, multioutput="variance_weighted")
    assert got["explained_variance"] == pytest.approx(weighted, abs=1e-12)
    free_bias = explained_variance_score(x, x_hat, multioutput="variance_weighted")
    assert got["fve_dictionary_learning"] == pytest.approx(free_bias, abs=1e-12)
    assert got["r2_overcomplete"] == pytest.approx(r2_score(x.ravel(), x_hat.ravel()), abs=1e-12)
    assert got["cosine"] == pytest.approx(1 - paired_cosine_distances(x, x_hat).mean(), abs=1e-12)


@pytest.mark.parametrize("batch_size", [1, 10, 50, 1000])
def test_batch_size_does_not_change_a_metric(
    pair: tuple[np.ndarray, np.ndarray], batch_size: int
) -> None:
    assert measure(*pair, batch_size) == pytest.approx(measure(*pair, 7), rel=1e-12)


@pytest.mark.parametrize("factor", [1e-3, 30.0])
def test_ratios_do_not_change_when_activations_are_scaled(
    pair: tuple[np.ndarray, np.ndarray], factor: float
) -> None:
    plain, scaled = measure(*pair), measure(pair[0] * factor, pair[1] * factor)
    of_a_unit = {"mse", "nmse_layernorm_batchtopk", "ev_saelens_6_18"}  # 1e-5 is not scaled
    for name in set(plain) - of_a_unit:
        assert scaled[name] == pytest.approx(plain[name], rel=1e-9), name
    assert scaled["mse"] == pytest.approx(plain["mse"] * factor**2, rel=1e-9)


def test_the_mean_row_explains_nothing_and_the_rows_themselves_all(
    pair: tuple[np.ndarray, np.ndarray],
) -> None:
    x = pair[0]
    assert measure(x, np.tile(x.mean(0), (len(x), 1)))["fvu"] == pytest.approx(1, rel=1e-12)
    perfect = measure(x, x)
    assert perfect["fvu"] == perfect["nmse"] == perfect["mse"] == 0
    assert perfect["cosine"] == pytest.approx(1, abs=1e-12)
    assert perfect["relative_norm"] == 1


def test_spread_far_below_the_mean_survives() -> None:
    """A one-pass sum of squares would lose it all: spread 1e-6 around 1e5."""
    rng = np.random.default_rng(1)
    noise = 1e-6 * rng.standard_normal((500, 3))
    x = 1e5 + noise
    exact = x - x.mean(0)
    assert measure(x, x - 0.5 * exact)["fvu"] == pytest.approx(0.25, rel=1e-4)


def test_a_zero_reconstruction_has_cosine_zero_and_fvu_of_the_mean() -> None:
    x = np.random.default_rng(2).standard_normal((9, 4)) + 3
    got = measure(x, np.zeros_like(x))
    assert got["cosine"] == got["relative_norm"] == 0
    assert got["nmse"] == 1
    assert got["fvu"] > 1


@pytest.mark.parametrize("row", [[3.0, 0.1, -7.3], [0.0, 0.0, 0.0]])
def test_constant_activations_are_refused(row: list[float]) -> None:
    x = np.tile(row, (1001, 1))
    with pytest.raises(UserError, match="all 1001 evaluated rows are equal"):
        measure(x, x)


def test_one_row_is_refused() -> None:
    with pytest.raises(UserError, match="all 1 evaluated rows are equal"):
        measure(np.ones((1, 2)), np.ones((1, 2)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_reconstruction_that_is_not_finite_is_refused(bad: float) -> None:
    x = np.random.default_rng(3).standard_normal((8, 2))
    x_hat = x.copy()
    x_hat[4, 1] = bad
    with pytest.raises(UserError, match="not finite"):
        measure(x, x_hat)
