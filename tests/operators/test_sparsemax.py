from itertools import combinations

import entmax as entmax_package
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from saeflow.operators import rows
from saeflow.operators.sparsemax import sparsemax


def by_root_finding(scores: np.ndarray) -> np.ndarray:
    """Independent reference: solve sum(max(scores - tau, 0)) = 1 for tau."""
    scores = scores - scores.max()
    tau = brentq(lambda tau: np.maximum(scores - tau, 0).sum() - 1, -1, 0, xtol=1e-15)
    return np.maximum(scores - tau, 0)


def by_sorting(scores: np.ndarray) -> np.ndarray:
    """Independent reference: algorithm 1 of the paper."""
    ordered = -np.sort(-scores)
    size = np.arange(1, len(scores) + 1)
    support = size[1 + size * ordered > np.cumsum(ordered)].max()
    return np.maximum(scores - (ordered[:support].sum() - 1) / support, 0)


def by_all_supports(scores: np.ndarray) -> np.ndarray:
    """Independent reference: the nearest of the projections on every face of the simplex."""
    best, distance = scores, np.inf
    for size in range(1, len(scores) + 1):
        for face in map(list, combinations(range(len(scores)), size)):
            p = np.zeros_like(scores)
            p[face] = scores[face] + (1 - scores[face].sum()) / size
            if (p >= 0).all() and ((p - scores) ** 2).sum() < distance:
                best, distance = p, ((p - scores) ** 2).sum()
    return best


# small n is solved on the whole row, large n on the entries above the floor
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.sampled_from([1, 2, 7, 100, 511, 512, 600, 1000]),
    scale=st.sampled_from([0, 1e-3, 0.1, 1, 30, 1e4]),
    shift=st.sampled_from([0, -50, 1e4]),
)
def test_matches_root_finding_and_sorting(seed: int, n: int, scale: float, shift: float) -> None:
    rng = np.random.default_rng(seed)
    scores = shift + scale * rng.standard_normal((4, n))
    scores[1] = scores[1].round()  # ties
    got = sparsemax(torch.tensor(scores))
    np.testing.assert_allclose(got, np.stack([*map(by_root_finding, scores)]), atol=1e-10)
    np.testing.assert_allclose(got, np.stack([*map(by_sorting, scores)]), atol=1e-10)
    np.testing.assert_allclose(got.sum(1), 1, atol=1e-12)
    single = sparsemax(torch.tensor(scores, dtype=torch.float32))
    exact = [by_root_finding(row) for row in scores.astype(np.float32).astype(float)]
    np.testing.assert_allclose(single, exact, atol=1.2e-7)


def test_is_the_nearest_point_of_the_simplex() -> None:
    scores = np.random.default_rng(0).standard_normal((50, 7))
    expected = np.stack([by_all_supports(row) for row in scores])
    np.testing.assert_allclose(sparsemax(torch.tensor(scores)), expected, atol=1e-12)


@pytest.mark.parametrize("n", [20, 600])
def test_value_and_gradient_match_the_entmax_package(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (0.01, 1.0, 5.0):
        scores = scale * torch.randn(5, 3, n, dtype=torch.float64, generator=generator)
        grad = torch.randn(5, 3, n, dtype=torch.float64, generator=generator)
        ours, theirs = scores.clone().requires_grad_(), scores.clone().requires_grad_()
        expected = entmax_package.sparsemax(theirs)
        got = sparsemax(ours)
        got.backward(grad)
        expected.backward(grad)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("n", [1, 8, 600])
def test_gradcheck(n: int) -> None:
    scores = torch.randn(3, n, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sparsemax, scores, fast_mode=n > 10)


def test_hand_worked_rows() -> None:
    scores = torch.tensor([[0.5, 0.5, -9], [3, 1, 1], [0.6, 0.2, 0.0], [-5, -5, -5]])
    expected = [[0.5, 0.5, 0], [1, 0, 0], [0.6667, 0.2667, 0.0667], [0.3333] * 3]
    torch.testing.assert_close(sparsemax(scores), torch.tensor(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("n", [2, 6, 600])
def test_an_entry_equal_to_the_threshold_has_no_probability(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    expected = torch.rand(1000, n, dtype=torch.float64, generator=generator)
    expected /= expected.sum(1, keepdim=True)
    expected[:, 0] = 0
    expected[:, 1] += 1 - expected.sum(1)
    threshold = torch.randn(1000, 1, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(sparsemax(expected + threshold), expected)


@pytest.mark.parametrize("n", [3, 600])
def test_minus_infinity_excludes_an_entry(n: int) -> None:
    scores = torch.randn(4, n, dtype=torch.float64)
    masked = scores.clone()
    masked[:, ::2] = -torch.inf
    masked.requires_grad_()
    p = sparsemax(masked)
    assert not p[:, ::2].any()
    torch.testing.assert_close(p[:, 1::2], sparsemax(scores[:, 1::2]))
    (p[:, 1] * 3).sum().backward()
    assert masked.grad.isfinite().all()


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(50, 600, requires_grad=True)
    whole = torch.autograd.grad(sparsemax(scores)[:, 0].sum(), scores)[0]
    monkeypatch.setitem(rows.BLOCK, "cpu", 1000)
    assert torch.equal(torch.autograd.grad(sparsemax(scores)[:, 0].sum(), scores)[0], whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_once(dtype: torch.dtype) -> None:
    scores = (0.1 * torch.randn(4, 600)).to(dtype).requires_grad_()
    p = sparsemax(scores)
    assert torch.equal(p, sparsemax(scores.detach().float()).to(dtype))
    p[:, 0].sum().backward()
    assert scores.grad.dtype == dtype


def test_edge_shapes_and_non_contiguous_input() -> None:
    assert sparsemax(torch.tensor([-7.0])).tolist() == [1.0]
    empty = torch.zeros(0, 4, requires_grad=True)
    sparsemax(empty).sum().backward()
    assert empty.grad.shape == (0, 4)
    scores = torch.randn(600, 4)
    before = scores.clone()
    assert torch.equal(sparsemax(scores.t()), sparsemax(scores.t().contiguous()))
    assert torch.equal(scores, before)


@pytest.mark.parametrize("n", [4, 600])
@pytest.mark.parametrize("wrong", ["NaN", "inf", "-inf"])
def test_a_row_without_projection_is_refused(n: int, wrong: str) -> None:
    scores = torch.randn(2, 2, n)
    scores[1, 0, n - 1] = float(wrong)
    if wrong == "-inf":
        scores[1, 0] = -torch.inf
    with pytest.raises(ValueError, match=f"row 2: scores.*{wrong}"):
        sparsemax(scores)
