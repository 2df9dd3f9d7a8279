"""Matching pursuit against one that is written row by row, in float64, with plain autograd."""

import numpy as np
import pytest
import torch
from torch import Tensor

from saeflow.operators import matching_pursuit, sparse


def by_hand(x: Tensor, W: Tensor, threshold: float, most: int, *, stops_on_repeat: bool) -> Tensor:
    """Latents with plain autograd."""
    rows = []
    for left in x:
        latents: dict[int, Tensor] = {}
        for _ in range(most):
            pick = int(np.argmax((W @ left).detach().numpy()))
            value = torch.relu(W[pick] @ left)
            is_new = pick not in latents and float(value.detach()) > 0
            latents[pick] = latents.get(pick, torch.zeros((), dtype=x.dtype)) + value
            left = left - value * W[pick]
            if (stops_on_repeat and not is_new) or float(left.norm()) < threshold:
                break
        zero = torch.zeros((), dtype=x.dtype)
        rows.append(torch.stack([latents.get(i, zero) for i in range(len(W))]))
    return torch.stack(rows)


@pytest.fixture(params=[False, True], ids=["cpu", "as a gpu"])
def padded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "is_padded", request.param)


@pytest.mark.usefixtures("padded")
@pytest.mark.parametrize("is_unit", [True, False])
@pytest.mark.parametrize("stops_on_repeat", [True, False])
@pytest.mark.parametrize(("threshold", "most"), [(1.0, 12), (0.0, 5), (0.05, 40)])
def test_latents_and_gradients_are_those_of_plain_autograd(
    threshold: float, most: int, stops_on_repeat: bool, is_unit: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(20, 8, generator=generator, dtype=torch.float64)
    x[4] = 0.01 * x[4]  # below a threshold before its first step
    W = torch.randn(24, 8, generator=generator, dtype=torch.float64)
    W = W / W.norm(dim=1, keepdim=True) * (1 if is_unit else 0.9)
    weights = torch.randn(20, 24, generator=generator, dtype=torch.float64)
    found = []
    for pursuit in (
        lambda a, b: by_hand(a, b, threshold, most, stops_on_repeat=stops_on_repeat),
        lambda a, b: matching_pursuit(a, b, threshold, most, stops_on_repeat=stops_on_repeat),
    ):
        own_x, own_W = x.clone().requires_grad_(), W.clone().requires_grad_()
        latents = pursuit(own_x, own_W)
        (latents * weights).sum().backward()
        found.append((latents.detach(), own_x.grad, own_W.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


def test_the_stopping_rules_decide_how_many_latents_a_row_has() -> None:
    x = torch.tensor([[3.0, 2.0, 1.0], [3.0, 0.0, 0.0], [-1.0, -1.0, 0.0]])
    W = torch.eye(3)
    assert matching_pursuit(x, W, 0.0, 10).tolist() == [[3, 2, 1], [3, 0, 0], [0, 0, 0]]
    assert matching_pursuit(x, W, 1.5, 10).tolist() == [[3, 2, 0], [3, 0, 0], [0, 0, 0]]
    assert matching_pursuit(x, W, 0.0, 1).tolist() == [[3, 0, 0], [3, 0, 0], [0, 0, 0]]


def test_a_latent_may_be_taken_again_where_repeats_do_not_stop() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    W = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    W = W / W.norm(dim=1, keepdim=True)
    once, again = (
        (x - matching_pursuit(x, W, 1e-3, 200, stops_on_repeat=stops) @ W).norm(dim=1)
        for stops in (True, False)
    )
    assert (again < 1e-3).all()
    assert once.max() > 1e-2
