import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saeflow.operators import rows
from saeflow.operators.rows import (
    SomeEntries,
    as_rows,
    blocks,
    group_maxima,
    kth_largest,
    kth_largest_by_bisection,
    pad,
    positions,
)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 300), dtype=st.sampled_from(["f4", "f8"]))
def test_both_kth_largest_equal_the_sorted_row(seed: int, n: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    values = rng.choice([1e-30, 1.0, 1e4]) * rng.standard_normal((5, n)).round(rng.integers(0, 9))
    values = values.astype(dtype)
    values[0] = rng.choice([-np.inf, -1.0, -0.0, 0.0, 2.0, np.inf], n)
    k = rng.integers(1, n + 1, 5)
    expected = -np.sort(-values, axis=1)[np.arange(5), k - 1]
    for method in (kth_largest, kth_largest_by_bisection):
        np.testing.assert_array_equal(method(torch.tensor(values), torch.tensor(k)), expected)


def test_bisection_ties_the_two_zeros() -> None:
    entries = torch.tensor([[-0.0, 0.0, -0.0, 0.0]])
    assert kth_largest_by_bisection(entries, torch.tensor([3])).item() == 0


@pytest.mark.parametrize(("n", "size"), [(12, 3), (13, 3), (29, 10), (7, 7), (5, 1)])
def test_group_maxima_cover_every_entry_once(n: int, size: int) -> None:
    for column in range(n):  # an entry above all others, or NaN, shows in exactly one group
        row = torch.zeros(1, n)
        row[0, column] = 9
        assert (group_maxima(row, size) == 9).sum() == 1
        row[0, column] = torch.nan
        assert group_maxima(row, size).isnan().sum() == 1


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 7), (0, 4), (4, 64)])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_positions_equal_nonzero(shape: tuple[int, int], density: float) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density
    assert torch.equal(positions(mask), mask.reshape(-1).nonzero()[:, 0])
    assert torch.equal(positions(mask[1:]), mask[1:].reshape(-1).nonzero()[:, 0])
    assert torch.equal(positions(mask.t()), mask.t().reshape(-1).nonzero()[:, 0])


def test_padding_goes_to_the_right_of_short_rows() -> None:
    padded, real = pad(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 0, 1]), -1)
    assert padded.tolist() == [[1, 2], [-1, -1], [3, -1]]
    assert real.tolist() == [[True, True], [False, False], [True, False]]


def test_gather_then_scatter_restores_the_entries_above_the_floor() -> None:
    block = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    floor = torch.tensor([-9.0, 0, 0, 1, 2, 9])
    chosen = SomeEntries.above(block, floor)
    out = torch.zeros_like(block)
    chosen.scatter(chosen.gather(block, torch.nan), out)
    assert torch.equal(out, block.where(block > floor[:, None], 0))


def test_blocks_cover_all_rows_and_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rows.BLOCK, "cpu", 10)
    values = torch.zeros(7, 3)
    assert [(at.start, at.stop) for at in blocks(values)] == [(0, 3), (3, 6), (6, 7)]
    assert len(list(blocks(torch.zeros(2, 99)))) == 2  # a row is never cut


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    assert as_rows(torch.zeros(2, 3, 4, dtype=dtype), "x").dtype == torch.float32
    assert as_rows(torch.zeros(2, 3, 4, dtype=dtype), "x").shape == (6, 4)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ([1.0], TypeError),
        (torch.zeros(3, dtype=torch.int64), TypeError),
        (torch.tensor(1.0), ValueError),
        (torch.zeros(3, 0), ValueError),
    ],
)
def test_what_is_not_rows_of_floats_is_refused(wrong: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="scores must"):
        as_rows(wrong, "scores")
