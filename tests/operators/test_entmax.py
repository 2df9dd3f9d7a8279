import entmax as entmax_package
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from saeflow.operators import rows
from saeflow.operators.entmax import entmax
from saeflow.operators.sparsemax import sparsemax


def by_root_finding(scores: np.ndarray, alpha: float) -> np.ndarray:
    """Independent reference: solve for tau, the sum normalised through its logarithm."""
    z = (alpha - 1) * (scores - scores.max())

    def p(tau: float) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.exp(np.log(np.maximum(z - tau, 0)) / (alpha - 1))

    tau = brentq(lambda tau: p(tau).sum() - 1, -1, -1e-300, xtol=1e-300, rtol=1e-15, maxiter=2000)
    return p(tau)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.sampled_from([1, 2, 7, 100, 512, 700]),
    scale=st.sampled_from([0, 1e-3, 0.1, 1, 30, 1e4]),
    shift=st.sampled_from([0, 1e4]),
    alpha=st.sampled_from([1.01, 1.1, 1.3, 1.5, 1.9, 2.0, 2.5, 3.0]),
)
def test_matches_root_finding(seed: int, n: int, scale: float, shift: float, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    scores = shift + scale * rng.standard_normal((4, n))
    scores[1] = scores[1].round()  # ties
    got = entmax(torch.tensor(scores), alpha)
    expected = np.stack([by_root_finding(row, alpha) for row in scores])
    np.testing.assert_allclose(got, expected, atol=1e-9)
    np.testing.assert_allclose(got.sum(1), 1, atol=1e-9)
    single = entmax(torch.tensor(scores, dtype=torch.float32), alpha)
    exact = [by_root_finding(row, alpha) for row in scores.astype(np.float32).astype(float)]
    np.testing.assert_allclose(single, exact, atol=1.2e-7)


@pytest.mark.parametrize("n", [20, 600])
def test_value_and_gradients_match_the_entmax_package(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, n, dtype=torch.float64, generator=generator)
    grad = torch.randn(4, n, dtype=torch.float64, generator=generator)
    alpha = torch.tensor([[1.2], [1.5], [1.7], [2.0]], dtype=torch.float64)
    ours = scores.clone().requires_grad_(), alpha[:, 0].clone().requires_grad_()
    theirs = scores.clone().requires_grad_(), alpha.clone().requires_grad_()
    expected = entmax_package.entmax_bisect(*theirs, n_iter=100)
    got = entmax(*ours)
    got.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad)
    torch.testing.assert_close(ours[1].grad, theirs[1].grad[:, 0], rtol=1e-6, atol=1e-6)


def test_alpha_1_5_matches_the_sorting_form_of_the_entmax_package() -> None:
    scores = torch.randn(10, 800, dtype=torch.float64)
    torch.testing.assert_close(entmax(scores, 1.5), entmax_package.entmax15(scores))


def test_alpha_2_is_sparsemax() -> None:
    scores = torch.randn(10, 800, dtype=torch.float64)
    torch.testing.assert_close(entmax(scores, 2), sparsemax(scores), atol=1e-14, rtol=0)


def test_alpha_near_1_tends_to_softmax() -> None:
    scores = torch.randn(10, 600, dtype=torch.float64)
    torch.testing.assert_close(entmax(scores, 1 + 1e-6), scores.softmax(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("alpha", [1.05, 1.5, 2.0, 2.7])
@pytest.mark.parametrize("n", [1, 6, 600])
def test_gradcheck_in_scores_and_alpha(alpha: float, n: int) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(3, n, dtype=torch.float64, generator=generator, requires_grad=True)
    for shape in ((), (3,)):
        a = torch.full(shape, alpha, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(entmax, (scores, a), fast_mode=n > 10)


def test_alpha_is_taken_per_row_or_broadcast() -> None:
    scores = torch.randn(2, 3, 50)
    alpha = torch.tensor([1.2, 1.5, 2.0])
    expected = torch.stack([entmax(scores[:, i], float(alpha[i])) for i in range(3)], 1)
    torch.testing.assert_close(entmax(scores, alpha), expected)


def test_equal_scores_share_equally_at_any_alpha() -> None:
    for alpha in (1.001, 1.5, 2.0, 4.0, 8.0):
        p = entmax(torch.full((2, 9), 1e4), alpha)
        torch.testing.assert_close(p, torch.full((2, 9), 1 / 9))


@pytest.mark.parametrize("n", [4, 600])
def test_minus_infinity_excludes_an_entry(n: int) -> None:
    scores = torch.randn(4, n, dtype=torch.float64)
    masked = scores.clone()
    masked[:, ::2] = -torch.inf
    p = entmax(masked.requires_grad_(), 1.5)
    torch.testing.assert_close(p[:, 1::2], entmax(scores[:, 1::2], 1.5))
    p[:, 1].sum().backward()
    assert masked.grad.isfinite().all()
    assert not masked.grad[:, ::2].any()


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, alpha = torch.randn(50, 600), torch.linspace(1.1, 2, 50).requires_grad_()
    whole = torch.autograd.grad(entmax(scores, alpha)[:, 0].sum(), alpha)[0]
    monkeypatch.setitem(rows.BLOCK, "cpu", 1000)
    got = torch.autograd.grad(entmax(scores, alpha)[:, 0].sum(), alpha)[0]
    torch.testing.assert_close(got, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_once(dtype: torch.dtype) -> None:
    scores = torch.randn(4, 600).to(dtype)
    assert torch.equal(entmax(scores, 1.5), entmax(scores.float(), 1.5).to(dtype))


def test_edge_shapes_and_non_contiguous_input() -> None:
    assert entmax(torch.tensor([-7.0]), 1.5).tolist() == [1.0]
    assert entmax(torch.zeros(0, 4), 1.5).shape == (0, 4)
    scores = torch.randn(600, 4)
    assert torch.equal(entmax(scores.t(), 1.5), entmax(scores.t().contiguous(), 1.5))


@pytest.mark.parametrize("alpha", [1.0, 0.5, float("nan"), float("inf")])
def test_alpha_at_or_below_1_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="row 0: alpha must be finite and > 1"):
        entmax(torch.randn(2, 5), alpha)
    with pytest.raises(ValueError, match="row 1: alpha must be finite and > 1"):
        entmax(torch.randn(2, 5), torch.tensor([1.5, alpha]))


def test_nan_is_refused_by_row_and_integers_by_type() -> None:
    scores = torch.randn(3, 5)
    scores[2, 1] = torch.nan
    with pytest.raises(ValueError, match="row 2: scores hold NaN"):
        entmax(scores, 1.5)
    with pytest.raises(TypeError, match="alpha must be floating point"):
        entmax(torch.randn(3, 5), torch.tensor(2))
