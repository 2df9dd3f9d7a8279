import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saeflow.operators import rows
from saeflow.operators.batch_topk import batch_topk, batch_topk_sparse


def kept_by_stable_sort(values: np.ndarray, k: float) -> np.ndarray:
    """Independent reference: a stable sort of the flat batch keeps equal entries in order."""
    flat = values.reshape(-1)
    first = np.argsort(-flat, kind="stable")[: round(flat.size // values.shape[-1] * k)]
    kept = np.zeros_like(flat)
    kept[first] = flat[first]
    return kept.reshape(values.shape)


def kept_by_threshold(values: np.ndarray, k: float) -> np.ndarray:
    """Independent reference for batches without ties: compare with the K-th largest."""
    total = round(values[..., 0].size * k)
    return np.where(values >= np.partition(values.reshape(-1), -total)[-total], values, 0)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 300)),
    share=st.sampled_from([0.01, 0.1, 1.0]),
    kind=st.sampled_from(["continuous", "ties", "few positive", "constant"]),
)
def test_keeps_what_a_stable_sort_keeps(
    seed: int, shape: tuple[int, int], share: float, kind: str
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * rng.choice([1e-3, 1, 1e4])
    if kind == "ties":
        values = rng.integers(-2, 3, shape).astype(float)
    if kind == "few positive":
        values = np.maximum(values - 1.5 * values.std(), 0)
    if kind == "constant":
        values[:] = rng.choice([-1.0, 0.0, 3.0])
    k = share * shape[1] * rng.random()
    np.testing.assert_array_equal(
        batch_topk(torch.tensor(values), k), kept_by_stable_sort(values, k)
    )


@pytest.mark.parametrize("k", [0.5, 1, 3.3, 40, 250])
def test_keeps_what_a_threshold_keeps(k: float) -> None:
    values = np.random.default_rng(0).standard_normal((3, 5, 256))
    np.testing.assert_array_equal(batch_topk(torch.tensor(values), k), kept_by_threshold(values, k))


def test_rows_take_as_many_as_they_deserve() -> None:
    values = torch.zeros(4, 512)
    values[2, 100:108] = 1
    assert batch_topk_sparse(values, 2).l0().tolist() == [0, 0, 8, 0]


def test_ties_go_to_the_lower_flat_index() -> None:
    values = torch.ones(3, 256)
    values[1, 5] = 2
    sparse = batch_topk_sparse(values, 2)
    assert sparse.rows.tolist() == [0, 0, 0, 0, 0, 1]
    assert sparse.columns.tolist() == [0, 1, 2, 3, 4, 5]


def test_ties_above_the_floor_go_to_the_lower_flat_index() -> None:
    values = torch.rand(2, 640)
    values[1, ::20] = 5  # 32 ties in one group of columns: the other groups put the floor below
    sparse = batch_topk_sparse(values, 5)
    assert sparse.rows.tolist() == [1] * 10
    assert sparse.columns.tolist() == list(range(0, 200, 20))


def test_count_is_rounded_over_the_batch() -> None:
    for k, total in ((0.2, 1), (0.25, 2), (1.0, 7), (2.5, 18), (0.0, 0), (99.0, 21)):
        assert len(batch_topk_sparse(torch.randn(7, 3), k).columns) == total


def test_sparse_form_is_sorted_and_equals_the_dense_one() -> None:
    values = torch.randn(20, 333)
    sparse = batch_topk_sparse(values, 6)
    flat = sparse.rows * 333 + sparse.columns
    assert (flat.diff() > 0).all()
    assert torch.equal(sparse.dense(), batch_topk(values, 6))


@pytest.mark.parametrize("n", [9, 500])
def test_gradient_passes_through_the_kept_entries_only(n: int) -> None:
    values = torch.randn(4, n, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(4, n, dtype=torch.float64)
    batch_topk(values, 3).backward(grad)
    kept = kept_by_stable_sort(values.detach().numpy(), 3) != 0
    np.testing.assert_array_equal(values.grad, np.where(kept, grad, 0))


def test_gradcheck() -> None:
    values = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: batch_topk(v, 2.5), values)
    assert torch.autograd.gradcheck(lambda v: batch_topk_sparse(v, 2.5).values, values)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randint(-3, 4, (50, 300)).float()
    whole = batch_topk(values, 60), batch_topk(values, 7)
    monkeypatch.setitem(rows.BLOCK, "cpu", 1000)
    assert torch.equal(batch_topk(values, 60), whole[0])
    assert torch.equal(batch_topk(values, 7), whole[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_values_and_dtype(dtype: torch.dtype) -> None:
    values = torch.randn(6, 300).to(dtype)
    kept = batch_topk(values, 4)
    assert kept.dtype == dtype
    np.testing.assert_array_equal(kept.double(), kept_by_stable_sort(values.double().numpy(), 4))


def test_edge_shapes_and_non_contiguous_input() -> None:
    assert batch_topk(torch.tensor([2.0]), 1).tolist() == [2.0]
    assert batch_topk(torch.zeros(0, 4), 2).shape == (0, 4)
    assert len(batch_topk_sparse(torch.zeros(0, 4), 2)) == 0
    values = torch.randn(200, 6).t()
    assert torch.equal(batch_topk(values, 3), batch_topk(values.contiguous(), 3))


@pytest.mark.parametrize("k", [0, 1, 100])
def test_nan_is_refused_by_row(k: int) -> None:
    values = torch.randn(2, 2, 300)
    values[1, 1, 299] = torch.nan
    with pytest.raises(ValueError, match="row 3"):
        batch_topk(values, k)


@pytest.mark.parametrize(
    ("k", "error"),
    [(-1, ValueError), (float("nan"), ValueError), (True, TypeError), (torch.tensor(2), TypeError)],
)
def test_wrong_k_is_refused(k: float, error: type[Exception]) -> None:
    with pytest.raises(error, match="k must be"):
        batch_topk(torch.randn(2, 5), k)
