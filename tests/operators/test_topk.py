import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saeflow.operators import rows
from saeflow.operators.topk import keep_topk, topk_indices, topk_sparse


def kept_by_stable_sort(values: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Independent reference: a stable sort keeps equal entries in index order."""
    order = np.argsort(-values, axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1, kind="stable")
    return np.where(rank < k[..., None], values, 0)


def kept_by_repeated_maximum(row: np.ndarray, k: int) -> np.ndarray:
    """Independent reference: take out the first largest entry k times."""
    left, kept = row.copy(), np.zeros_like(row)
    for _ in range(min(k, len(row))):
        i = int(left.argmax())
        kept[i], left[i] = row[i], -np.inf
    return kept


def random_values(seed: int, n: int) -> np.ndarray:
    """Rows of every kind: continuous, many ties, few positive, constant, large."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((6, n)).astype(np.float32)
    values[1] = rng.integers(-2, 3, n)
    values[2] = np.maximum(values[2] - 1.5, 0)
    values[3] = rng.choice([-1.0, 0.0, 1e4])
    values[4] *= 1e4
    values[5] = -np.abs(values[5]).round(1)
    return values


# n up to 600 with a small k bounds by group maxima; a k near n bisects
@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 600), share=st.sampled_from([0.01, 0.1, 1]))
def test_keeps_what_a_stable_sort_keeps(seed: int, n: int, share: float) -> None:
    values = random_values(seed, n)
    rng = np.random.default_rng(seed)
    for k in (int(share * n), rng.integers(0, int(share * n) + 2, 6)):
        expected = kept_by_stable_sort(values, np.broadcast_to(k, 6))
        got = keep_topk(torch.tensor(values), k if isinstance(k, int) else torch.tensor(k))
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("k", [0, 1, 3, 17, 200, 1000])
def test_keeps_what_repeated_maximum_keeps(k: int) -> None:
    values = random_values(0, 200)
    expected = np.stack([kept_by_repeated_maximum(row, k) for row in values])
    np.testing.assert_array_equal(keep_topk(torch.tensor(values), k), expected)


@pytest.mark.parametrize("k", [1, 2, 5, 40, 99])
def test_ties_go_to_the_lower_index_whatever_the_rest_of_the_row(k: int) -> None:
    values = torch.zeros(3, 640)
    values[:, 200:500] = 1  # 300 equal entries, k of them fit
    values[1, 600] = 2
    indices, _ = topk_indices(values, k)
    assert indices[0].tolist() == list(range(200, 200 + k))
    assert indices[1].tolist() == [*range(200, 199 + k), 600]


def test_ties_above_the_floor_go_to_the_lower_index() -> None:
    values = torch.rand(2, 640)
    values[:, ::20] = 5  # 32 ties in one group of columns: the other groups put the floor below
    assert topk_indices(values, 5)[0].tolist() == [[0, 20, 40, 60, 80]] * 2


def test_a_row_with_no_positive_entry_keeps_its_first_zeros() -> None:
    values = torch.relu(-torch.rand(2, 512))
    values[1, :300] = -1
    indices, kept = topk_indices(values, 4)
    assert indices.tolist() == [[0, 1, 2, 3], [300, 301, 302, 303]]
    assert not kept.any()


def test_infinities_are_ordinary_values() -> None:
    values = torch.full((1, 300), -torch.inf)
    values[0, [7, 9]] = torch.tensor([1.0, torch.inf])
    assert topk_indices(values, 3)[0].tolist() == [[0, 7, 9]]


@pytest.mark.parametrize("n", [10, 700])
@pytest.mark.parametrize("wanted", [3, torch.tensor([[0, 1], [5, 2], [9, 9]])])
def test_gradient_passes_through_the_kept_entries_only(n: int, wanted: int | Tensor) -> None:
    values = torch.randn(3, 2, n, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 2, n, dtype=torch.float64)
    keep_topk(values, wanted).backward(grad)
    k = np.broadcast_to(np.asarray(wanted), (3, 2))
    kept = kept_by_stable_sort(values.detach().numpy(), k) != 0
    np.testing.assert_array_equal(values.grad, np.where(kept, grad, 0))


def test_gradcheck() -> None:
    values = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True)
    k = torch.tensor([[1, 2, 3], [0, 9, 5]])
    assert torch.autograd.gradcheck(lambda v: keep_topk(v, 4), values)
    assert torch.autograd.gradcheck(lambda v: keep_topk(v, k), values)
    assert torch.autograd.gradgradcheck(lambda v: keep_topk(v, 4), values)
    assert torch.autograd.gradcheck(lambda v: topk_indices(v, k)[1], values)
    assert torch.autograd.gradcheck(lambda v: topk_sparse(v, 4).values, values[0])


@pytest.mark.parametrize("k", [5, torch.tensor([5, 0, 3, 9])])
def test_index_and_sparse_forms_hold_the_same_entries(k: int | Tensor) -> None:
    values = torch.randn(4, 400)
    kept = keep_topk(values, k)
    indices, chosen = topk_indices(values, k)
    assert indices.shape == chosen.shape == (4, int(torch.as_tensor(k).max()))
    assert torch.equal(torch.zeros(4, 400).scatter_add(1, indices, chosen), kept)
    sparse = topk_sparse(values, k)
    assert torch.equal(sparse.dense(), kept)
    assert torch.equal(sparse.offsets.diff(), torch.as_tensor(k).expand(4))


def test_unused_slots_are_index_0_value_0_at_the_right() -> None:
    indices, values = topk_indices(torch.tensor([[3.0, 9, 7], [3, 9, 7]]), torch.tensor([1, 3]))
    assert indices.tolist() == [[1, 0, 0], [0, 1, 2]]
    assert values.tolist() == [[9, 0, 0], [3, 9, 7]]


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randint(-3, 4, (50, 300)).float()
    whole = topk_indices(values, 7)
    monkeypatch.setitem(rows.BLOCK, "cpu", 1000)
    assert torch.equal(topk_indices(values, 7)[0], whole[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_is_kept_and_values_unchanged(dtype: torch.dtype) -> None:
    values = torch.randn(3, 500).to(dtype)
    kept = keep_topk(values, 9)
    assert kept.dtype == dtype
    np.testing.assert_array_equal(
        kept.double(), kept_by_stable_sort(values.double().numpy(), np.full(3, 9))
    )


def test_non_contiguous_input_and_argument_left_unchanged() -> None:
    values = torch.randn(300, 4, 2).permute(2, 1, 0)
    before = values.clone()
    kept = keep_topk(values, 5)
    assert torch.equal(kept, keep_topk(values.contiguous(), 5))
    assert torch.equal(values, before)


def test_edge_shapes() -> None:
    assert keep_topk(torch.tensor([2.0]), 1).tolist() == [2.0]
    assert keep_topk(torch.tensor([2.0, 3.0]), torch.tensor(1)).tolist() == [0, 3.0]
    assert keep_topk(torch.zeros(0, 5, 4), 2).shape == (0, 5, 4)
    assert topk_indices(torch.zeros(0, 4), 2)[0].shape[0] == 0
    assert topk_indices(torch.zeros(3, 4), 0)[0].shape == (3, 0)
    assert topk_indices(torch.randn(2, 4), 9)[0].shape == (2, 4)


@pytest.mark.parametrize("n", [5, 800])
def test_nan_is_refused_by_row(n: int) -> None:
    values = torch.randn(4, n)
    values[2, n - 1] = torch.nan
    with pytest.raises(ValueError, match="row 2"):
        keep_topk(values, 1)


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (-1, ValueError, "row 0: k must be >= 0, got -1"),
        (torch.tensor([1, -1]), ValueError, "row 1: k must be >= 0, got -1"),
        (2.0, TypeError, "float"),
        (True, TypeError, "bool"),
        (torch.tensor([1.0, 2.0]), TypeError, "float32"),
        (torch.tensor([1, 2, 3]), ValueError, r"leading shape \(2,\), got \(3,\)"),
    ],
)
def test_wrong_k_is_refused(k: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        keep_topk(torch.randn(2, 5), k)
