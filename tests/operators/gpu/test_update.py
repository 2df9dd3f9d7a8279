"""The update in one pass, against torch's own clipping and Adam, and unit rows after each step."""

import pytest
import torch

from saeflow.operators.gpu.update import Part, measure, update

RATE, EPS, LARGEST = 0.01, 1e-8, 1.0
SHAPES = {
    "matrix": (7, 20),
    "long row": (1, 2500),
    "unit rows": (5, 12),
    "vector": (1500,),
    "short vector": (3,),
}


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99)])
def test_steps_are_those_of_torchs_adam(betas: tuple[float, float], path: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    start["unit rows"] /= start["unit rows"].norm(dim=1, keepdim=True)
    reference = {name: t.clone().requires_grad_() for name, t in start.items()}
    adam = torch.optim.Adam(reference.values(), lr=RATE, betas=betas, eps=EPS)
    parts = {
        name: Part(
            parameter=t.to(path),
            gradient=torch.zeros_like(t, device=path),
            exp_avg=torch.zeros_like(t, device=path),
            exp_avg_sq=torch.zeros_like(t, device=path),
            shadow=t.to(path, torch.bfloat16) if name != "vector" else None,
            is_unit=name == "unit rows",
        )
        for name, t in start.items()
    }
    steps = {name: torch.zeros((), device=path) for name in SHAPES}
    for number in range(3):
        moving = [name for name in SHAPES if name != "short vector" or number != 1]
        for name, leaf in reference.items():
            if name not in moving:
                leaf.grad = None
                continue
            gradient = torch.randn(leaf.shape, generator=generator) * 10.0 ** (-number)
            leaf.grad = gradient.clone()
            parts[name].gradient.copy_(gradient)
        norm = torch.nn.utils.clip_grad_norm_(reference.values(), LARGEST)
        adam.step()
        with torch.no_grad():
            reference["unit rows"] /= reference["unit rows"].norm(dim=1, keepdim=True)
        numbers = {"betas": betas, "eps": EPS, "largest_norm": LARGEST}
        rate, skip = torch.tensor(RATE, device=path), torch.tensor(False, device=path)
        of_moving = (
            [parts[name] for name in moving],
            norm.to(path),
            [steps[name] for name in moving],
        )
        update(*of_moving, rate, skip, **numbers)
    assert {name: int(step) for name, step in steps.items()} == {
        name: int(adam.state[leaf]["step"]) for name, leaf in reference.items()
    }
    for name, leaf in reference.items():
        part = parts[name]
        torch.testing.assert_close(part.parameter.cpu(), leaf.detach(), rtol=1e-5, atol=1e-6)
        state = adam.state[leaf]
        torch.testing.assert_close(part.exp_avg.cpu(), state["exp_avg"], rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(part.exp_avg_sq.cpu(), state["exp_avg_sq"], rtol=1e-5, atol=1e-8)
        if part.shadow is not None:
            # A GPU rounds to the nearest, Triton's interpreter towards 0.
            torch.testing.assert_close(part.shadow.float(), part.parameter, rtol=2**-7, atol=0)


def test_a_skipped_update_writes_nothing(path: str) -> None:
    tensors = [torch.rand(4, 6, device=path) for _ in range(4)]
    tensors[1][2, 3] = torch.nan
    before = [t.clone() for t in tensors]
    part = Part(*tensors, shadow=torch.zeros(4, 6, device=path, dtype=torch.bfloat16), is_unit=True)
    step = torch.tensor(5.0, device=path)
    norm, rate = torch.tensor(torch.nan, device=path), torch.tensor(0.1, device=path)
    skip = torch.tensor(True, device=path)
    update([part], norm, [step], rate, skip, betas=(0.9, 0.999), eps=EPS, largest_norm=1.0)
    for now, then in zip(tensors, before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
    assert part.shadow is not None
    assert not part.shadow.any()
    assert step == 5


@pytest.mark.parametrize("shape", [(7, 20), (1, 3000), (2, 1)])
def test_a_gradient_is_measured_without_its_part_along_unit_rows(
    shape: tuple[int, int], path: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    gradient, rows = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    rows = rows / rows.norm(dim=1, keepdim=True)
    gradient[-1] = 0
    plain = gradient.float().to(path)
    expected = gradient.square().sum(1)
    torch.testing.assert_close(measure(plain).double().cpu(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(plain.cpu(), gradient.float())
    squares = measure(plain, rows.float().to(path))
    projected = gradient - (gradient * rows).sum(1, keepdim=True) * rows
    torch.testing.assert_close(plain.double().cpu(), projected, rtol=1e-4, atol=1e-5)
    expected = projected.square().sum(1)
    torch.testing.assert_close(squares.double().cpu(), expected, rtol=1e-4, atol=1e-5)
