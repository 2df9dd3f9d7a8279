import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from saeflow.operators.geometric_median import geometric_median


def by_minimising(points: np.ndarray) -> np.ndarray:
    """Independent reference: a general minimiser of the sum of distances."""
    distances = lambda y: np.linalg.norm(points - y, axis=1).sum()  # noqa: E731
    start = np.median(points, axis=0)
    return minimize(distances, start, method="BFGS", options={"gtol": 1e-9}).x


@pytest.mark.parametrize("d", [1, 2, 8])
@pytest.mark.parametrize("n", [5, 41, 201])
def test_matches_a_general_minimiser(n: int, d: int) -> None:
    points = np.random.default_rng(n + d).standard_normal((n, d)) ** 3
    got = geometric_median(torch.tensor(points), tol=1e-12, max_iter=20_000)
    expected = np.median(points, axis=0) if d == 1 else by_minimising(points)
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_pulls_of_the_points_cancel_at_the_median() -> None:
    points = torch.randn(100, 6, dtype=torch.float64)
    offsets = points - geometric_median(points, tol=1e-10, max_iter=1000)
    pull = (offsets / offsets.norm(dim=1, keepdim=True)).sum(0)
    assert pull.norm() < 1e-6


def test_a_point_with_half_of_the_weight_is_the_median() -> None:
    points = torch.cat([torch.tensor([[1.0, 2.0]]).repeat(6, 1), torch.randn(5, 2)])
    got = geometric_median(points, max_iter=1000)
    torch.testing.assert_close(got, torch.tensor([1.0, 2.0]), atol=1e-4, rtol=0)


def test_starting_on_a_point_that_is_not_the_median_moves_off_it() -> None:
    # the mean, where the iteration starts, is the point (0, 0)
    others = [[3.0, 0], [-1, 1], [-1, -1], [-1, 0.5], [0, -0.5]]
    points = torch.tensor([[0.0, 0], *others], dtype=torch.float64)
    assert points.mean(0).norm() == 0
    got = geometric_median(points, tol=1e-12, max_iter=5000)
    np.testing.assert_allclose(got, by_minimising(points.numpy()), atol=1e-5)
    assert got.norm() > 0.01


def test_starting_on_the_median_stays_there() -> None:
    cross = torch.tensor([[0.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
    assert geometric_median(cross).tolist() == [0, 0]
    # the others pull with a force of 0.41 < 1, less than the point itself holds
    triangle = torch.tensor([[0.0, 0], [2, 0], [-1, 1], [-1, -1]])
    assert geometric_median(triangle).tolist() == [0, 0]


def test_an_outlier_moves_it_far_less_than_the_mean() -> None:
    points = torch.randn(99, 4)
    shifted = torch.cat([points, torch.full((1, 4), 1e6)])
    assert (geometric_median(shifted) - geometric_median(points)).norm() < 0.2


@pytest.mark.parametrize("points", [[[5.0, 7.0]], [[5.0, 7.0]] * 4])
def test_equal_points_are_their_own_median(points: list[list[float]]) -> None:
    assert geometric_median(torch.tensor(points)).tolist() == [5.0, 7.0]


def test_dtype_is_kept_and_the_argument_unchanged() -> None:
    points = torch.randn(4, 50).to(torch.bfloat16).t()
    before = points.clone()
    assert geometric_median(points).dtype == torch.bfloat16
    assert torch.equal(points, before)


def test_wrong_points_are_refused() -> None:
    with pytest.raises(ValueError, match="row 1: points must be finite"):
        geometric_median(torch.tensor([[1.0], [torch.nan]]))
    with pytest.raises(ValueError, match=r"\(n, d\) with n >= 1, got \(0, 3\)"):
        geometric_median(torch.zeros(0, 3))
    with pytest.raises(TypeError, match=r"floating point, got torch\.int64"):
        geometric_median(torch.zeros(2, 3, dtype=torch.int64))
