"""bfloat16 copies of weights: what a product takes is what the weights are, whoever changed them."""

import os

import pytest
import torch
from torch import Tensor, nn

from saeflow.operators import pre_acts, sparse
from saeflow.operators.gpu import shadows
from saeflow.operators.gpu.shadows import shadow
from saeflow.operators.gpu.update import Part, update


def weights(path: str) -> nn.Parameter:
    """(5, 12) laid out by columns, as W_enc is."""
    rows = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    return nn.Parameter(rows.to(path).t())


def near(copy: Tensor, parameter: Tensor) -> None:
    """A GPU rounds to the nearest, Triton's interpreter towards 0."""
    assert copy.shape == parameter.shape
    torch.testing.assert_close(copy.float(), parameter.detach(), rtol=2**-7, atol=0)


def test_a_copy_is_made_once_and_again_after_a_change(path: str) -> None:
    parameter = weights(path)
    first = shadow(parameter)
    assert torch.equal(first, parameter.to(torch.bfloat16))
    assert first.stride() == parameter.stride()
    assert shadow(parameter) is first
    with torch.no_grad():
        parameter.mul_(3)
    assert shadow(parameter) is first
    assert torch.equal(first, parameter.to(torch.bfloat16))
    module = nn.Linear(12, 5, bias=False).to(path)
    copy = shadow(module.weight)
    module.load_state_dict({"weight": torch.ones(5, 12)})
    assert shadows.refresh(module.weight) is copy
    assert bool((copy == 1).all())


def test_the_transpose_shares_the_copy_and_no_other_view_does(path: str) -> None:
    for parameter in (weights(path), nn.Parameter(torch.randn(6, 6, device=path))):
        copy = shadow(parameter)
        of_transpose = shadow(parameter.t())
        assert torch.equal(of_transpose, copy.t())
        assert of_transpose.data_ptr() == copy.data_ptr()
        for other in (parameter[1:], parameter * 1, parameter.detach(), parameter.t() * 1):
            assert torch.equal(shadow(other), other.to(torch.bfloat16))
            assert shadow(other).data_ptr() != copy.data_ptr()
    frozen = torch.randn(3, 4, device=path)
    assert shadow(frozen) is not shadow(frozen)


@pytest.mark.parametrize("is_skipped", [False, True])
def test_an_update_writes_the_copy(is_skipped: bool, path: str) -> None:
    parameter = weights(path)
    copy, before = shadow(parameter), parameter.detach().clone()
    rows = parameter.detach().t()
    zeros = torch.zeros_like(rows)
    part = Part(rows, torch.ones_like(rows), zeros, zeros.clone(), shadow=copy.t())
    count, skip = torch.zeros(1, device=path), torch.tensor(is_skipped, device=path)
    one = torch.ones((), device=path)
    update([part], one, count, one, skip, betas=(0.9, 0.99), eps=1e-8, largest_norm=1.0)
    shadows.written(parameter)
    assert torch.equal(parameter, before) == is_skipped
    near(copy, parameter)
    version = parameter._version
    assert shadow(parameter) is copy
    assert parameter._version == version
    near(copy, parameter)


def test_products_take_the_copy_and_give_what_they_gave(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameter = weights(path)
    x = torch.randn(3, 5, device=path).requires_grad_()
    bias, centre = torch.randn(12, device=path), torch.randn(5, device=path)
    found = []
    for is_gpu in (False, True):
        monkeypatch.setattr(sparse, "is_padded", is_gpu)
        with torch.autocast(path, torch.bfloat16):
            a = pre_acts(x, parameter, bias, centre)
        assert a.dtype == torch.bfloat16
        found.append((a, *torch.autograd.grad(a.float().square().sum(), (x, parameter))))
        has_copy = hasattr(parameter, "bfloat16_copy")
        assert has_copy == is_gpu or path == "cuda"
    # A GPU rounds x - centre to the nearest, Triton's interpreter towards 0.
    slack = 2**-5 if os.environ.get("TRITON_INTERPRET") == "1" else 0
    for one, other in zip(*found, strict=True):
        largest = float(one.abs().max())
        torch.testing.assert_close(other, one, rtol=0, atol=slack * largest)
    exact = pre_acts(x, parameter, bias, centre)  # no autocast: no copy
    torch.testing.assert_close(exact, (x - centre) @ parameter + bias)
