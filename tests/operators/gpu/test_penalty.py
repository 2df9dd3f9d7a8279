"""A penalty on a sum over the batch, worked out by hand, with its gradient."""

import pytest
import torch

from saeflow.operators import penalty


@pytest.mark.parametrize("is_on_device", [True, False])
@pytest.mark.parametrize("target", [None, 3.0, 8.0])
def test_a_penalty_is_the_weighted_mean_or_its_squared_distance_from_a_target(
    target: float | None, is_on_device: bool, path: str
) -> None:
    """50 latents in 10 rows, 5 a row."""
    total = torch.tensor(50.0, device=path, requires_grad=True)
    weight, wanted = (
        None if n is None else torch.tensor(n, device=path) if is_on_device else n
        for n in (0.25, target)
    )
    assert weight is not None
    found = penalty(total, 10, weight, wanted)
    (slope,) = torch.autograd.grad(3 * found, [total])
    excess = 1 if target is None else 5 / target - 1
    expected = 0.25 * (5 if target is None else excess**2)
    of_mean = 0.25 * (1 if target is None else 2 * excess / target)
    assert found.item() == pytest.approx(expected, rel=1e-6)
    assert slope.item() == pytest.approx(3 * of_mean / 10, rel=1e-6)
