"""The update in one pass, against torch's own clipping and Adam, and unit rows after each step."""

import math

import pytest
import torch

from saeflow.operators.gpu.update import BLOCK, MOST_AT_ONCE, Part, measure, update

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
    steps = torch.zeros(len(SHAPES), device=path)
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
        of_moving = [part if name in moving else None for name, part in parts.items()]
        update(of_moving, norm.to(path), steps, rate, skip, **numbers)
    assert steps.tolist() == [int(adam.state[leaf]["step"]) for leaf in reference.values()]
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
    step = torch.tensor([5.0], device=path)
    norm, rate = torch.tensor(torch.nan, device=path), torch.tensor(0.1, device=path)
    skip = torch.tensor(True, device=path)
    update([part], norm, step, rate, skip, betas=(0.9, 0.999), eps=EPS, largest_norm=1.0)
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
    assert float(measure([(plain, None)], plain)) == pytest.approx(
        float(gradient.square().sum()), rel=1e-5
    )
    assert torch.equal(plain.cpu(), gradient.float())
    square = float(measure([(plain, rows.float().to(path))], plain))
    projected = gradient - (gradient * rows).sum(1, keepdim=True) * rows
    torch.testing.assert_close(plain.double().cpu(), projected, rtol=1e-4, atol=1e-5)
    assert square == pytest.approx(float(projected.square().sum()), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("count", [1, 3, MOST_AT_ONCE + 2])
def test_gradients_of_any_size_are_measured_together(count: int, path: str) -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = [(BLOCK,), (1,), (3, 7), (2 * BLOCK + 3,), (5, BLOCK + 1)]
    gradients = [torch.randn(shapes[n % 5], generator=generator) for n in range(count)]
    rows = {n: torch.nn.functional.normalize(g) for n, g in enumerate(gradients) if n % 5 == 2}
    expected = sum(
        (g - (g * rows[n]).sum(1, keepdim=True) * rows[n] if n in rows else g)
        .double()
        .square()
        .sum()
        for n, g in enumerate(gradients)
    )
    on_path = [
        (g.clone().to(path), rows[n].to(path) if n in rows else None)
        for n, g in enumerate(gradients)
    ]
    assert float(measure(on_path, on_path[0][0])) == pytest.approx(float(expected), rel=1e-5)


def test_no_gradient_has_a_sum_of_zero(path: str) -> None:
    assert float(measure([], torch.ones(1, device=path))) == 0


@pytest.mark.parametrize("step", [0, 3, 4_000_000])
@pytest.mark.parametrize(("betas", "largest"), [((0.9, 0.999), 0.1), ((0.0, 0.9999), math.inf)])
def test_numbers_of_a_step_are_those_of_adam(
    step: int, betas: tuple[float, float], largest: float, path: str
) -> None:
    """The first weight shows rate, correction and clipping: its gradient is 2, its moments were 0."""
    part = Part(*(torch.tensor([v], device=path) for v in (1.0, 2.0, 0.0, 0.0)))
    steps = torch.tensor([step, step], dtype=torch.float32, device=path)
    norm, rate = torch.tensor(2.0, device=path), torch.tensor(0.01, device=path)
    skip = torch.tensor(False, device=path)
    update([part, None], norm, steps, rate, skip, betas=betas, eps=1e-30, largest_norm=largest)
    assert steps.tolist() == [step + 1, step]
    g = 2 * min(1.0, largest / (2 + 1e-6))
    first, second = (1 - betas[0]) * g, (1 - betas[1]) * g * g
    falls = [1 - beta ** (step + 1) for beta in betas]
    expected = 1 - 0.01 * (first / falls[0]) / math.sqrt(second / falls[1])
    assert float(part.parameter) == pytest.approx(expected, rel=1e-6)
