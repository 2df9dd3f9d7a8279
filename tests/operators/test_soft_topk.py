import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import logsumexp
from torch import Tensor

from saeflow.operators import rows
from saeflow.operators.soft_topk import soft_topk
from saeflow.operators.topk import keep_topk


def laplace(t: np.ndarray) -> np.ndarray:
    return np.where(t <= 0, np.exp(np.minimum(t, 0)) / 2, 1 - np.exp(-np.maximum(t, 0)) / 2)


def by_root_finding(values: np.ndarray, k: float, temperature: float) -> np.ndarray:
    """Independent reference: solve sum F((values - b) / temperature) = k for b."""
    near = np.sort(values)[-int(np.ceil(k))]  # b is measured from here, to keep its digits
    t = (values - near) / temperature
    low, high = t.min() - 40 - np.log(len(t)), t.max() + 40 + np.log(len(t))
    b = brentq(lambda b: laplace(t - b).sum() - k, low, high, xtol=1e-14, rtol=1e-15)
    return laplace(t - b)


def by_sorting(values: np.ndarray, k: float, temperature: float) -> tuple[np.ndarray, float]:
    """Independent reference: the closed form of each interval of the sorted row; mask and b."""
    t = -np.sort(-values) / temperature
    edges = np.concatenate([[np.inf], t, [-np.inf]])
    for j in range(len(t) + 1):  # j entries above b
        log_a = logsumexp(-t[:j]) if j else -np.inf
        log_d = logsumexp(t[j:]) if j < len(t) else -np.inf
        if j == k:
            b = (log_d - log_a) / 2
        else:  # A y^2 - 2 (j - k) y - D = 0 with y = exp(b)
            root = np.logaddexp(2 * np.log(abs(j - k)), log_a + log_d) / 2
            large = np.logaddexp(np.log(abs(j - k)), root)
            b = large - log_a if j > k else log_d - large
        if edges[j + 1] - 1e-12 <= b <= edges[j] + 1e-12:
            return laplace(values / temperature - b), b * temperature
    raise AssertionError("no interval holds the root")


def exact_gradients(
    values: np.ndarray, k: float, temperature: float, grad: np.ndarray
) -> tuple[np.ndarray, float]:
    """Independent reference: the Jacobian of the implicit formula, written out."""
    _, b = by_sorting(values, k, temperature)
    f = np.exp(-np.abs(values - b) / temperature) / (2 * temperature)
    w = np.exp(-np.abs(values - b) / temperature + np.abs(values - b).min() / temperature)
    w /= w.sum()
    jacobian = np.diag(f) - np.outer(f, w)
    return grad @ jacobian, grad @ w


TEMPERATURES = [1e-6, 1e-4, 1e-2, 0.1, 1.0, 30.0]


# small n or large k is solved on the whole row; otherwise on entries above a floor, and if these
# are many, with the rest summed up: all three occur below
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.sampled_from([2, 7, 100, 300, 900]),
    share=st.sampled_from([0.01, 0.1, 0.9]),
    temperature=st.sampled_from(TEMPERATURES),
    kind=st.sampled_from(["continuous", "relu", "ties", "constant", "large"]),
    is_integer=st.booleans(),
)
def test_matches_root_finding(
    seed: int, n: int, share: float, temperature: float, kind: str, is_integer: bool
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((3, n)).astype(np.float32)
    if kind == "relu":
        values = np.maximum(values, 0)
    if kind == "ties":
        values = values.round()
    if kind == "constant":
        values[:] = 3
    if kind == "large":
        values *= 1e4
    k = 1 + share * (n - 1) * rng.random(3)
    k = k.round() if is_integer else k
    expected = np.stack(
        [
            by_root_finding(row, kr, temperature)
            for row, kr in zip(values.astype(float), k, strict=True)
        ]
    )
    double = soft_topk(torch.tensor(values, dtype=torch.float64), torch.tensor(k), temperature)
    np.testing.assert_allclose(double, expected, atol=1e-7)
    np.testing.assert_allclose(double.sum(1), k, rtol=1e-9)
    single = soft_topk(torch.tensor(values), torch.tensor(k), temperature)
    # (values - b) / temperature carries the rounding of values - b, relative to its size
    np.testing.assert_allclose(single, expected, atol=3e-7)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("k", [0.3, 1, 2.5, 7, 60.25])
@pytest.mark.parametrize("n", [61, 700])
def test_value_and_gradients_match_the_sorting_form(n: int, k: float, temperature: float) -> None:
    rng = np.random.default_rng(0)
    rows_, grads = rng.standard_normal((2, 4, n))
    rows_[1] = np.maximum(rows_[1], 0)
    rows_[2] = rows_[2].round(1)
    values = torch.tensor(rows_, requires_grad=True)
    k_rows = torch.full((4,), k, dtype=torch.float64, requires_grad=True)
    mask = soft_topk(values, k_rows, temperature)
    mask.backward(torch.tensor(grads))
    for i in range(4):
        np.testing.assert_allclose(
            mask[i].detach(), by_sorting(rows_[i], k, temperature)[0], atol=1e-11
        )
        by_values, by_k = exact_gradients(rows_[i], k, temperature, grads[i])
        np.testing.assert_allclose(values.grad[i], by_values, atol=1e-9 / temperature)
        np.testing.assert_allclose(k_rows.grad[i], by_k, atol=1e-9)


@pytest.mark.parametrize("n", [1, 5, 300])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_gradcheck_in_values_and_k(n: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, n, dtype=torch.float64, generator=generator, requires_grad=True)
    for k in (torch.tensor(0.6), torch.tensor([0.2, 0.5, 0.9]) * min(n, 9)):
        k = k.double().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda v, k: soft_topk(v, k, temperature), (values, k), fast_mode=n > 10
        )


def test_a_low_temperature_gives_the_hard_top_k() -> None:
    values = torch.rand(5, 400)
    hard = (keep_topk(values, 7) > 0).float()
    torch.testing.assert_close(soft_topk(values, 7, 1e-9), hard)


def test_two_entries_share_by_the_distance_to_their_middle() -> None:
    p = soft_topk(torch.tensor([1.0, 3.0]), 1, 2.0)  # b = 2 by symmetry, half a temperature away
    torch.testing.assert_close(
        p, torch.tensor([0.5 * np.exp(-0.5), 1 - 0.5 * np.exp(-0.5)]).float()
    )


def test_equal_entries_share_equally() -> None:
    for value in (0.0, -1e4, 1e4):
        p = soft_topk(torch.full((2, 300), value), 30.0, 1e-4)
        torch.testing.assert_close(p, torch.full((2, 300), 0.1))


def test_gradient_in_k_is_shared_across_a_gap_where_every_slope_underflows() -> None:
    values = torch.tensor([5.0, 3.0, 1.0, 0.0])
    k = torch.tensor(2.0, requires_grad=True)
    mask = soft_topk(values, k, 1e-3)
    assert mask.tolist() == [1, 1, 0, 0]
    by_k = torch.stack([torch.autograd.grad(p, k, retain_graph=True)[0] for p in mask])
    torch.testing.assert_close(by_k, torch.tensor([0, 0.5, 0.5, 0]))


@pytest.mark.parametrize("n", [4, 300])
def test_k_of_0_and_n_give_the_limits(n: int) -> None:
    values = torch.randn(2, n, dtype=torch.float64, requires_grad=True)
    k = torch.tensor([0.0, n], dtype=torch.float64, requires_grad=True)
    mask = soft_topk(values, k, 0.3)
    assert mask.tolist() == [[0.0] * n, [1.0] * n]
    grad = torch.randn(2, n, dtype=torch.float64)
    by_values, by_k = torch.autograd.grad(mask, (values, k), grad)
    assert not by_values.any()
    limit = torch.stack([(values[0] / 0.3).softmax(0), (-values[1] / 0.3).softmax(0)])
    torch.testing.assert_close(by_k, (grad * limit).sum(1))


@pytest.mark.parametrize("n", [6, 400])
@pytest.mark.parametrize("temperature", [1e-3, 1.0])
def test_minus_infinity_excludes_an_entry(n: int, temperature: float) -> None:
    values = torch.randn(3, n, dtype=torch.float64)
    masked = values.clone()
    masked[:, ::2] = -torch.inf
    masked.requires_grad_()
    for k in (1.5, n // 2):
        p = soft_topk(masked, k, temperature)
        torch.testing.assert_close(p[:, 1::2], soft_topk(values[:, 1::2], k, temperature))
        assert not p[:, ::2].any()
        p[:, 1].sum().backward()
        assert masked.grad.isfinite().all()
    with pytest.raises(ValueError, match="row 0: k exceeds the number of finite values"):
        soft_topk(masked, n // 2 + 1, temperature)


@pytest.mark.parametrize("temperature", [1e-3, 0.1])
def test_blocks_do_not_change_the_result(
    monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    values, k = torch.randn(50, 300), torch.linspace(1, 9, 50).requires_grad_()
    whole = soft_topk(values, k, temperature)
    by_k = torch.autograd.grad(whole[:, 0].sum(), k)[0]
    monkeypatch.setitem(rows.BLOCK, "cpu", 1000)
    got = soft_topk(values, k, temperature)
    torch.testing.assert_close(got, whole)
    torch.testing.assert_close(torch.autograd.grad(got[:, 0].sum(), k)[0], by_k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_once(dtype: torch.dtype) -> None:
    values = torch.randn(4, 300).to(dtype).requires_grad_()
    k = torch.full((4,), 8.5, requires_grad=True)
    mask = soft_topk(values, k, 0.01)
    assert torch.equal(mask, soft_topk(values.detach().float(), 8.5, 0.01).to(dtype))
    mask[:, 0].sum().backward()
    assert (values.grad.dtype, k.grad.dtype) == (dtype, torch.float32)


def test_edge_shapes_non_contiguous_input_and_broadcast_k() -> None:
    assert soft_topk(torch.tensor([-7.0]), 0.25, 1.0).tolist() == [0.25]
    assert soft_topk(torch.zeros(0, 4), 2, 1.0).shape == (0, 4)
    values = torch.randn(300, 3, 2).permute(2, 1, 0)
    before = values.clone()
    k = torch.tensor([2.0, 5, 9])
    expected = torch.stack([soft_topk(values[:, i], float(k[i]), 0.1) for i in range(3)], 1)
    torch.testing.assert_close(soft_topk(values, k, 0.1), expected)
    assert torch.equal(values, before)


@pytest.mark.parametrize("n", [4, 400])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_refused(n: int, wrong: float) -> None:
    values = torch.randn(2, 2, n)
    values[1, 1, n - 1] = wrong
    with pytest.raises(ValueError, match="row 3: values hold NaN or inf"):
        soft_topk(values, 1.5, 0.1)


@pytest.mark.parametrize(
    ("k", "temperature", "message"),
    [
        (6, 0.1, r"row 0: k must be in 0\.\.5, got 6\.0"),
        (torch.tensor([1, -0.1]), 0.1, r"row 1: k must be in 0\.\.5"),
        (float("nan"), 0.1, "row 0: k must be"),
        (2, 0.0, "temperature must be > 0, got 0"),
        (2, float("nan"), "temperature must be > 0"),
    ],
)
def test_wrong_k_or_temperature_is_refused(
    k: float | Tensor, temperature: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        soft_topk(torch.randn(2, 5), k, temperature)


def test_a_longer_reach_counts_what_float32_holds() -> None:
    """b lies log 2 temperatures above the largest, so that F of the others is exp(-distance from it) / 4."""
    temperature, far = 1e-3, torch.tensor([[0.0, 20, 50, 80, 101, 120]])
    values = -far * temperature
    plain = soft_topk(values, 0.25, temperature)
    longer = soft_topk(values, 0.25, temperature, reach=103)
    assert (plain > 0).tolist() == [[True, True, False, False, False, False]]
    assert (longer > 0).tolist() == [[True, True, True, True, True, False]]
    expected = 0.25 * (-far.double()).exp()
    torch.testing.assert_close(longer[:, :4].double(), expected[:, :4], rtol=1e-3, atol=0)
    torch.testing.assert_close(longer, plain, rtol=1e-6, atol=1e-13)
