"""AuxK's pieces, for which the host does not wait: dead columns, the largest of each row, products with copied rows."""

import pytest
import torch
from torch import Tensor

from saeflow.operators import decode_columns, first_of, keep_largest, keep_topk


@pytest.mark.parametrize("count", [0, 3, 16, 50])
def test_dead_columns_come_first_and_none_twice(count: int, path: str) -> None:
    dead = torch.zeros(50, dtype=torch.bool, device=path)
    dead[[3, 4, 17, 30, 49]] = True
    found = first_of(dead, count).tolist()
    assert found[:5] == [3, 4, 17, 30, 49][:count]
    assert len(set(found)) == count
    assert sorted(found[5:]) == found[5:]


@pytest.mark.parametrize("k", [1, 7, 40, 96])
def test_the_largest_are_those_of_keep_topk(k: int, path: str) -> None:
    """Rows are ordinary ones, equal ones, ties, one with fewer positive entries than k, one with none."""
    scores = torch.randn(8, 96, generator=torch.Generator().manual_seed(0)).to(path)
    scores[1], scores[2] = scores[0], scores[2].round()
    scores[3], scores[4, 2:], scores[5] = 1.0, -1.0, -1.0
    weights = torch.randn(8, 96, generator=torch.Generator().manual_seed(1)).to(path)
    results = []
    for operator in (keep_largest, keep_topk):
        given = scores.clone().requires_grad_()
        kept = operator(given.relu(), k)
        (kept * weights).sum().backward()
        results.append((kept.detach(), given.grad))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_products_with_copied_rows_are_products_with_the_whole(path: str) -> None:
    generator = torch.Generator().manual_seed(2)
    latents, W_dec = (torch.randn(s, generator=generator).to(path) for s in ((6, 3), (40, 20)))
    columns = torch.tensor([30, 2, 17], device=path)
    at_output = torch.randn(6, 20, generator=generator).to(path)

    def gradients(of: Tensor, W: Tensor, x_hat: Tensor) -> tuple[Tensor, ...]:
        return x_hat.detach(), *torch.autograd.grad(x_hat, (of, W), at_output)

    given = latents.clone().requires_grad_(), W_dec.clone().requires_grad_()
    found = gradients(*given, decode_columns(*given, columns, is_rounded=False))
    exact = latents.double().requires_grad_(), W_dec.double().requires_grad_()
    whole = torch.zeros(6, 40, dtype=torch.float64, device=path).index_copy(1, columns, exact[0])
    for ours, expected in zip(found, gradients(*exact, whole @ exact[1]), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
