from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from saeflow.operators import rows
from saeflow.operators.jumprelu import jumprelu, step


def smoothed_step(pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Independent reference: the step blurred by the rectangle kernel; autograd differentiates it.

    The straight-through gradient of the threshold is the exact one of this function.
    """
    return ((pre_acts - threshold) / bandwidth + 0.5).clamp(0, 1)


@pytest.fixture
def example() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pre_acts = torch.randn(40, 3, 12, dtype=torch.float64, generator=generator)
    threshold = torch.rand(12, dtype=torch.float64, generator=generator)
    grad = torch.randn(40, 3, 12, dtype=torch.float64, generator=generator)
    return pre_acts.requires_grad_(), threshold.requires_grad_(), grad


def test_values_by_hand() -> None:
    pre_acts = torch.tensor([-1.0, 0.4, 0.5, 0.6, torch.inf])
    threshold = torch.tensor([0.5])
    torch.testing.assert_close(
        jumprelu(pre_acts, threshold, 0.1), torch.tensor([0, 0, 0, 0.6, torch.inf])
    )
    assert step(pre_acts, threshold, 0.1).tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("bandwidth", [0.05, 0.5])
def test_gradient_of_step_is_that_of_the_blurred_step(
    example: tuple[Tensor, Tensor, Tensor], bandwidth: float
) -> None:
    pre_acts, threshold, grad = example
    got = torch.autograd.grad(step(pre_acts, threshold, bandwidth), threshold, grad)[0]
    blurred = smoothed_step(pre_acts.detach(), threshold, bandwidth)
    torch.testing.assert_close(got, torch.autograd.grad(blurred, threshold, grad)[0])
    assert (got != 0).sum() > 8


@pytest.mark.parametrize("bandwidth", [0.05, 0.5])
def test_gradients_of_jumprelu(example: tuple[Tensor, Tensor, Tensor], bandwidth: float) -> None:
    pre_acts, threshold, grad = example
    by_a, by_t = torch.autograd.grad(
        jumprelu(pre_acts, threshold, bandwidth), (pre_acts, threshold), grad
    )
    torch.testing.assert_close(by_a, grad * (pre_acts > threshold))
    blurred = threshold.detach() * smoothed_step(pre_acts.detach(), threshold, bandwidth)
    torch.testing.assert_close(by_t, torch.autograd.grad(blurred, threshold, grad)[0])


def test_step_gives_no_gradient_to_pre_acts() -> None:
    pre_acts, threshold = torch.randn(4, 5, requires_grad=True), torch.rand(5, requires_grad=True)
    step(pre_acts, threshold, 1.0).sum().backward()
    assert pre_acts.grad is None


def test_kernel_is_open_at_its_edges() -> None:
    threshold = torch.ones(4, requires_grad=True)
    pre_acts = torch.tensor([0.75, 0.7500001, 1.2499999, 1.25])
    step(pre_acts, threshold, 0.5).sum().backward()
    assert threshold.grad.tolist() == [0, -2, -2, 0]


def test_blocks_do_not_change_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    pre_acts, threshold = torch.rand(5, 10, 30), torch.rand(30, requires_grad=True)
    whole = torch.autograd.grad(step(pre_acts, threshold, 0.2).sum(), threshold)[0]
    monkeypatch.setitem(rows.BLOCK, "cpu", 100)
    got = torch.autograd.grad(step(pre_acts, threshold, 0.2).sum(), threshold)[0]
    torch.testing.assert_close(got, whole)


@pytest.mark.parametrize("shape", [(), (1,), (12,), (3, 1), (3, 12)])
def test_threshold_gradient_has_the_shape_it_was_broadcast_from(shape: tuple[int, ...]) -> None:
    pre_acts = torch.rand(7, 3, 12)
    threshold = torch.full(shape, 0.5, requires_grad=True)
    for operator in (jumprelu, step):
        got = torch.autograd.grad(operator(pre_acts, threshold, 0.4).sum(), threshold)[0]
        expanded = torch.full_like(pre_acts, 0.5, requires_grad=True)
        dense = torch.autograd.grad(operator(pre_acts, expanded, 0.4).sum(), expanded)[0]
        torch.testing.assert_close(got, dense.sum_to_size(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_pre_acts_with_a_float32_threshold(dtype: torch.dtype) -> None:
    pre_acts = torch.rand(500, 6).to(dtype).requires_grad_()
    threshold = torch.full((6,), 0.5, requires_grad=True)
    z = jumprelu(pre_acts, threshold, 0.01)
    by_a, by_t = torch.autograd.grad(z.sum(), (pre_acts, threshold))
    near = ((pre_acts.detach().float() - 0.5).abs() < 0.005).float()
    assert (z.dtype, by_a.dtype, by_t.dtype) == (dtype, dtype, torch.float32)
    torch.testing.assert_close(by_t, -50 * near.sum(0))


def test_edge_shapes_and_non_contiguous_input() -> None:
    assert jumprelu(torch.zeros(0, 4), torch.zeros(4), 1.0).shape == (0, 4)
    pre_acts, threshold = torch.randn(4, 9).t(), torch.rand(4)
    before = pre_acts.clone()
    for operator in (jumprelu, step):
        got = operator(pre_acts, threshold, 1.0)
        assert torch.equal(got, operator(pre_acts.contiguous(), threshold, 1.0))
    assert torch.equal(pre_acts, before)


@pytest.mark.parametrize("operator", [jumprelu, step])
def test_wrong_arguments_are_refused(operator: Callable[..., Tensor]) -> None:
    floats, threshold = torch.zeros(3, 4), torch.zeros(4)
    with pytest.raises(ValueError, match="bandwidth must be > 0, got 0"):
        operator(floats, threshold, 0)
    with pytest.raises(ValueError, match=r"threshold \(3,\) does not broadcast to pre_acts \(3, 4"):
        operator(floats, torch.zeros(3), 1.0)
    with pytest.raises(ValueError, match="does not broadcast"):
        operator(floats, torch.zeros(2, 3, 4), 1.0)
    with pytest.raises(ValueError, match=r"pre_acts must have shape \(..., n\), got \(\)"):
        operator(torch.tensor(1.0), torch.tensor(1.0), 1.0)
    with pytest.raises(
        TypeError, match=r"pre_acts must be a floating point tensor, got torch\.int64"
    ):
        operator(floats.long(), threshold, 1.0)
    with pytest.raises(TypeError, match="threshold must be a floating point tensor, got float"):
        operator(floats, 0.5, 1.0)


def test_gradient_in_the_values_is_that_of_a_small_step() -> None:
    """Away from the thresholds the function is smooth."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    threshold = torch.full((7,), 0.3, dtype=torch.float64)
    values = torch.where((values - 0.3).abs() < 0.01, values + 0.1, values).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: jumprelu(x, threshold, 0.01), values, eps=1e-4)
