import numpy as np
import pytest
import torch
from torch import Tensor

from saeflow.operators import allotment, choose_by_column, feature_choice, order_columns, sparse


def by_definition(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Independent reference, column by column: 1 for the chosen entries."""
    mask = np.zeros_like(values)
    for i, count in enumerate(counts):
        rows = sorted(range(len(values)), key=lambda b, i=i: (-values[b, i], b))
        for row in rows[:count]:
            mask[row, i] = values[row, i] > 0
    return mask


@pytest.fixture(params=[False, True])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of ordering columns: as far as the host knows that it must, and whole."""
    monkeypatch.setattr(sparse, "is_padded", request.param)


def drawn(seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Values on a coarse grid, with many ties and zeros of both signs, and counts from none to all rows."""
    random = np.random.default_rng(seed)
    values = np.round(random.standard_normal((rows, columns)) * 2) / 2
    values[random.random(values.shape) < 0.1] = -0.0
    counts = random.integers(0, rows + 1, columns)
    counts[0] = 0
    return torch.tensor(values, requires_grad=True), torch.tensor(counts)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 1), (1, 9), (12, 8), (40, 5)])
@pytest.mark.usefixtures("device")
def test_values_and_gradients_are_those_of_sorted_columns(rows: int, columns: int) -> None:
    values, counts = drawn(rows + columns, rows, columns)
    expected = by_definition(values.detach().numpy(), counts.numpy())
    found = feature_choice(values, counts)
    np.testing.assert_array_equal(found.detach(), values.detach().numpy() * expected)
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(0)).double()
    (found * weights).sum().backward()
    np.testing.assert_array_equal(values.grad, weights.numpy() * expected)
    assert (found[:, 0] == 0).all()


@pytest.mark.usefixtures("device")
def test_of_equal_entries_those_of_lower_rows_are_chosen() -> None:
    values = torch.tensor([[1.0, -0.0], [2.0, 3.0], [1.0, 3.0], [1.0, 3.0]])
    counts = torch.tensor([3, 2])
    assert feature_choice(values, counts).tolist() == [[1, 0], [2, 3], [1, 3], [0, 0]]


@pytest.mark.usefixtures("device")
def test_the_choice_ends_between_two_entries() -> None:
    values = torch.tensor([[5.0, 5, 5, -1], [3.0, 3, 3, -1], [-1.0, -1, 1, -1]])
    ordered = order_columns(values, torch.tensor([1, 2, 3, 2]))
    assert ordered.least.tolist() == [5, 3, 1, 0]
    assert ordered.following.tolist() == [3, 0, 0, 0]
    nothing = order_columns(values, torch.zeros(4, dtype=torch.int64))
    assert nothing.least.tolist() == [torch.inf] * 4
    assert not choose_by_column(values, torch.zeros(4, dtype=torch.int64), nothing.least).any()


def test_what_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        feature_choice(torch.tensor([[torch.nan]]), torch.tensor([1]))


def by_bisection(weights: np.ndarray, total: int, most: int) -> np.ndarray:
    """Independent reference: the factor by bisection, then the largest remainders one after the other."""
    total = min(total, most * len(weights))
    least = 1 if total >= len(weights) else 0
    low, high = 0.0, (total + most) / weights.min()
    for _ in range(300):
        middle = (low + high) / 2
        if np.clip(middle * weights, least, most).sum() < total:
            low = middle
        else:
            high = middle
    exact = np.clip(high * weights, least, most)
    counts = np.floor(exact + 1e-9).astype(int)
    while counts.sum() < total:
        counts[np.argmax(np.where(counts < most, exact - counts, -1))] += 1
        exact = np.where(counts > exact, counts, exact)  # each gets one at most
    return counts


@pytest.mark.parametrize("total", [0, 3, 17, 30, 31, 100, 355, 599, 600, 900])
@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 3.0])
def test_a_budget_is_divided_by_weights_within_bounds(total: int, exponent: float) -> None:
    weights = np.random.default_rng(2).permutation(np.arange(1, 31) ** -exponent)
    found = allotment(torch.tensor(weights), total, most=20)
    assert found.sum() == min(total, 600)
    assert found.min() >= (1 if total >= 30 else 0)
    assert found.max() <= 20
    np.testing.assert_array_equal(found, by_bisection(weights, total, 20))
    as_tensor = allotment(torch.tensor(weights), torch.tensor(float(total)), most=20)
    assert torch.equal(found, as_tensor)


def test_a_thousand_latents_of_a_steep_law_add_up() -> None:
    weights = torch.arange(1, 5001, dtype=torch.float64) ** -1.3
    found = allotment(weights, 32_768, most=1024)
    assert found.sum() == 32_768
    assert (found.diff() <= 0).all()
    assert found[0] == 1024
    assert found[-1] == 1
