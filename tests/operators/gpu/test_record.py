"""Notes of a step, against their definition in plain Python."""

import math

import pytest
import torch

from saeflow.operators.gpu.lists import OVERFLOW, Lists
from saeflow.operators.gpu.record import (
    count_active,
    count_silent,
    fired,
    follow,
    keep_first,
    lacking,
    least_positive,
)


@pytest.mark.parametrize("kind", [torch.float32, torch.int64])
def test_the_first_fault_is_kept(kind: torch.dtype, path: str) -> None:
    fine, wrong = ([1.0, -2.0, 0.0], [3.0, math.inf, 0.0]), ([1.0, 2.0, math.nan], [0.0] * 3)
    if kind == torch.int64:
        fine, wrong = ([0, 0, 0],) * 2, ([0, 5, 0], [-1, 0, 0])
    kept = torch.zeros(3, dtype=kind, device=path)
    step = torch.tensor(-1, device=path)
    is_first_kept = []
    for number, values in enumerate([fine[0], wrong[0], fine[0], wrong[1]]):
        now = torch.tensor(number, device=path)
        found = torch.tensor(values, dtype=kind, device=path)
        is_first_kept.append(bool(keep_first(found, now, kept, step)))
    assert is_first_kept == [False, True, True, True]
    assert step.item() == 1
    expected = torch.tensor(wrong[0], dtype=kind)
    torch.testing.assert_close(kept.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_no_value_that_is_not_finite_passes(value: float, path: str) -> None:
    values = torch.tensor([1.0, value], device=path)
    kept, step = torch.zeros(2, device=path), torch.tensor(-1, device=path)
    before = torch.tensor(True, device=path)
    now = torch.tensor(7, device=path)
    assert keep_first(values, now, kept, step, before)
    assert step.item() == -1
    assert not kept.any()
    assert keep_first(values, now, kept, step, ~before)
    assert step.item() == 7


def lists_of(
    generator: torch.Generator, path: str, n_rows: int, capacity: int, d_sae: int
) -> Lists:
    """Lists whose columns beyond some never occur, with zeros among their values."""
    kept = torch.rand(n_rows, d_sae, generator=generator) < 0.3
    kept[:, d_sae // 2 :] = False
    values = torch.randn(n_rows, d_sae, generator=generator)
    values[torch.rand(n_rows, d_sae, generator=generator) < 0.7] = 0
    values[:, 1] = 0
    return Lists.from_mask(values.to(path), kept.to(path), capacity)


@pytest.mark.parametrize(
    ("n_rows", "capacity", "d_sae"), [(1, 16, 12), (40, 16, 30), (9, 128, 300)]
)
def test_a_latent_fired_where_one_of_its_entries_is_not_zero(
    n_rows: int, capacity: int, d_sae: int, path: str
) -> None:
    lists = lists_of(torch.Generator().manual_seed(n_rows), path, n_rows, capacity, d_sae)
    expected = (lists.dense() != 0).any(0)
    assert 0 < expected.sum() < d_sae // 2 + 1
    assert torch.equal(fired(lists), expected)


@pytest.mark.parametrize(("n_rows", "capacity"), [(2, 16), (700, 16)])
def test_entries_that_are_not_zero_are_counted(n_rows: int, capacity: int, path: str) -> None:
    """Entries in up to three pieces; the tensor held another number."""
    lists = lists_of(torch.Generator().manual_seed(n_rows), path, n_rows, capacity, 60)
    out = torch.tensor(77, device=path)
    count_active(lists, out)
    assert out.item() == sum(value != 0 for value in lists.values.view(-1).tolist()) > 0


@pytest.mark.parametrize("n_rows", [1, 3000])
def test_rows_that_lost_entries_are_counted(n_rows: int, path: str) -> None:
    lists = lists_of(torch.Generator().manual_seed(3), path, n_rows, 16, 40)
    lists.status.copy_(torch.randint(4, (n_rows,), generator=torch.Generator().manual_seed(4)))
    expected = sum(int(status) & OVERFLOW for status in lists.status.tolist())
    assert lacking(lists).tolist() == [expected, 0]
    assert lacking(lists, torch.tensor(9, device=path)).tolist() == [expected, 9]


def test_silence_grows_by_rows_and_ends_with_a_firing(path: str) -> None:
    n = 1500
    silent = torch.arange(n, device=path)
    has_fired = torch.arange(n, device=path) % 3 == 0
    is_long = count_silent(silent, has_fired, 10, 1000)
    expected = [0 if at % 3 == 0 else at + 10 for at in range(n)]
    assert silent.tolist() == expected
    assert is_long.tolist() == [tokens >= 1000 for tokens in expected]


def test_the_least_positive_number_of_several_pieces(path: str) -> None:
    values = torch.randn(70, 130, generator=torch.Generator().manual_seed(4))
    values[3], values[5, 5] = 0, math.nan
    expected = min(value for value in values.view(-1).tolist() if value > 0)
    assert least_positive(values.to(path)).item() == expected
    assert least_positive(-values.abs().to(path)).item() == math.inf


@pytest.mark.parametrize("is_unbiased", [True, False])
def test_a_threshold_is_the_running_mean_of_what_is_finite(is_unbiased: bool, path: str) -> None:
    """Weighted sums in float64: decay ** age of each, of which the first takes the rest unless unbiased."""
    threshold, weight = torch.zeros(2, device=path).unbind()
    found: list[float] = []
    for least in (0.5, math.inf, 1.5, 1.0, math.inf):
        follow(threshold, weight, torch.tensor(least, device=path), 0.9, is_unbiased=is_unbiased)
        found += [least] if least < math.inf else []
        weights = [0.1 * 0.9**age for age in reversed(range(len(found)))]
        weights[0] += 0 if is_unbiased else 1 - sum(weights)
        mean = sum(w * value for w, value in zip(weights, found, strict=True)) / sum(weights)
        assert threshold.item() == pytest.approx(mean, rel=1e-6)
