import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from saeflow.operators import fit_zipf, zipf


def test_shares_are_the_formula() -> None:
    expected = (np.arange(1, 6) + 2.5) ** -1.5
    np.testing.assert_allclose(zipf(5, 1.5, 2.5), expected / expected.sum(), rtol=1e-12)


@pytest.mark.parametrize(("exponent", "shift"), [(1.0, 0.0), (1.4, 8.0), (0.6, 1.0), (0.0, 0.0)])
def test_a_fit_finds_the_law_of_exact_counts(exponent: float, shift: float) -> None:
    law = zipf(500, exponent, shift)
    found = fit_zipf(1e6 * law[torch.randperm(500, generator=torch.Generator().manual_seed(0))])
    np.testing.assert_allclose(zipf(500, *found), law, rtol=1e-6)


def test_a_fit_is_the_largest_likelihood() -> None:
    random = np.random.default_rng(1)
    counts = random.poisson(3000 * zipf(200, 1.2, 5.0).numpy())
    ordered = np.sort(counts)[::-1]

    def loss(parameters: np.ndarray) -> float:
        exponent, shift = np.exp(parameters)
        weights = (np.arange(1, 201) + shift) ** -exponent
        return -float(ordered @ np.log(weights / weights.sum()))

    best = minimize(
        loss, np.log([1.0, 3.0]), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-9}
    )
    found = np.log(fit_zipf(torch.tensor(counts)))
    assert loss(found) - best.fun < 0.1  # shifts are tried on a grid
    fixed = np.log(fit_zipf(torch.tensor(counts), shift=5.0))
    of_one = minimize(lambda s: loss(np.array([s[0], np.log(5.0)])), [0.0], method="Nelder-Mead")
    assert fixed[0] == pytest.approx(of_one.x[0], abs=1e-3)


def test_latents_that_never_fired_leave_a_finite_law() -> None:
    exponent, shift = fit_zipf(torch.tensor([0.0, 9.0, 0.0, 1.0]))
    assert np.isfinite([exponent, shift]).all()
    assert exponent > 1
    assert fit_zipf(torch.tensor([5.0]))[1] >= 0


def test_what_is_known_is_not_fitted() -> None:
    counts = 1e6 * zipf(50, 1.0, 2.0)
    assert fit_zipf(counts, exponent=0.3, shift=7.0) == (0.3, 7.0)
    assert fit_zipf(counts, exponent=1.0)[1] == pytest.approx(2.0)
