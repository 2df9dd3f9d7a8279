import numpy as np
import pytest
import torch

from saeflow.operators import orthogonality


def by_definition(
    directions: np.ndarray, order: np.ndarray, size: int
) -> tuple[float, list[tuple[int, int, float]]]:
    """Independent reference: pair by pair; the value, and of each direction its nearest one with their cosine."""
    nearest = []
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        for i in chunk:
            best, most = -1, 0.0
            for j in chunk:
                lengths = np.linalg.norm(directions[i]) * np.linalg.norm(directions[j])
                cosine = directions[i] @ directions[j] / lengths if lengths else 0.0
                if i != j and cosine > most:
                    best, most = j, cosine
            if best >= 0:
                nearest.append((i, best, most))
    return sum(most**2 for _, _, most in nearest) / len(directions), nearest


def gradient_by_hand(directions: np.ndarray, order: np.ndarray, size: int) -> np.ndarray:
    """Gradient of cos(a, b)^2 by a: 2 cos (b/|b| - cos a/|a|) / |a|."""
    gradient = np.zeros_like(directions)
    for i, j, cosine in by_definition(directions, order, size)[1]:
        for one, other in ((i, j), (j, i)):
            length = np.linalg.norm(directions[one])
            unit = directions[one] / length
            towards = directions[other] / np.linalg.norm(directions[other])
            gradient[one] += 2 * cosine * (towards - cosine * unit) / length
    return gradient / len(directions)


@pytest.mark.parametrize(("n", "size"), [(12, 12), (12, 5), (11, 5), (13, 2), (2, 9)])
def test_value_and_gradient_are_those_of_pairs(n: int, size: int) -> None:
    random = np.random.default_rng(n * size)
    directions = random.standard_normal((n, 4)) * random.uniform(0.1, 3, (n, 1))
    order = random.permutation(n)
    tensor = torch.tensor(directions, requires_grad=True)
    found = orthogonality(tensor, torch.tensor(order), size)
    found.backward()
    np.testing.assert_allclose(found.item(), by_definition(directions, order, size)[0], rtol=1e-12)
    np.testing.assert_allclose(
        tensor.grad.numpy(), gradient_by_hand(directions, order, size), rtol=1e-9, atol=1e-12
    )


def test_gradient_is_that_of_small_changes() -> None:
    directions = torch.tensor(np.random.default_rng(3).standard_normal((9, 3)), requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: orthogonality(d, torch.arange(9), 4), (directions,))


def test_equal_directions_cost_1_and_orthogonal_and_opposite_ones_nothing() -> None:
    order = torch.arange(4)
    equal = torch.ones(4, 3, dtype=torch.float64)
    assert orthogonality(equal, order, 4).item() == pytest.approx(1)
    assert orthogonality(torch.eye(4), order, 4).item() == 0
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert orthogonality(opposite, order[:2], 2).item() == 0


def test_a_direction_of_length_0_is_near_to_none_and_has_a_finite_gradient() -> None:
    directions = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    directions.requires_grad_()
    found = orthogonality(directions, torch.arange(3), 3)
    found.backward()
    assert found.item() == pytest.approx(2 * 0.5 / 3)
    assert directions.grad is not None
    assert directions.grad.isfinite().all()


def test_directions_of_other_chunks_do_not_count() -> None:
    directions = torch.eye(2).repeat(2, 1)
    assert orthogonality(directions, torch.tensor([0, 1, 2, 3]), 2).item() == 0
    assert orthogonality(directions, torch.tensor([0, 2, 1, 3]), 2).item() == pytest.approx(1)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        orthogonality(torch.eye(3), torch.arange(3), 1)
    with pytest.raises(ValueError, match="expected 3 entries"):
        orthogonality(torch.eye(3), torch.arange(4), 2)
