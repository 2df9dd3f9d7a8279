"""Dense latents, their sums and gradients of one pass, against autograd of the definitions in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from saeflow.operators import gpu, jumprelu, soft_topk, step
from saeflow.operators.gpu import dense
from saeflow.operators.gpu.dense_errors import squared_errors

B, M = 11, 300  # no multiples of a block
BANDWIDTH = 0.4
PRECISIONS = {
    torch.float32: 2e-5,
    torch.bfloat16: 8e-3,
}  # of what is stored, relative to the largest


@pytest.fixture(params=PRECISIONS, ids=["float32", "bfloat16"])
def scores(request: pytest.FixtureRequest, path: str) -> Tensor:
    """Rows are ordinary ones, one of ties and -0, one that is never active, one that always is."""
    scores = torch.randn(B, M, generator=torch.Generator().manual_seed(0))
    scores[1], scores[2], scores[3] = scores[1].round(), -1.0, 2.0
    scores[1, :5] = -0.0
    return scores.to(path, request.param)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns are summed over several blocks of rows."""
    monkeypatch.setattr(dense, "TALL", 8)
    monkeypatch.setattr(dense, "WIDE", 128)


def normal(*shape: int, seed: int, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(like.device)


def compare(
    ours: Callable[..., tuple[Tensor, ...]],
    reference: Callable[..., tuple[Tensor, ...]],
    scores: Tensor,
    others: list[Tensor],
) -> None:
    """Values, and the gradients of a loss of all of them, in scores and parameters."""
    single = [t.clone().requires_grad_() for t in (scores, *others)]
    exact = [t.detach().cpu().double().requires_grad_() for t in single]
    found, expected = ours(*single), reference(*exact)
    weights = [normal(*t.shape, seed=i, like=scores).to(t.dtype) for i, t in enumerate(found)]
    for total, of, given in (
        (found, single, weights),
        (expected, exact, [w.cpu() for w in weights]),
    ):
        sum((t * w.to(t.dtype)).sum().to(of[0].dtype if t.ndim else t.dtype) for t, w in zip(total, given, strict=True)).backward()  # fmt: skip
    tolerance = PRECISIONS[scores.dtype]
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == (scores.dtype if got.ndim else torch.float32)
        close(got.detach(), wanted.detach(), tolerance)
    for got, wanted in zip(single, exact, strict=True):
        assert got.grad is not None
        close(got.grad, wanted.grad, tolerance)


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    atol = tolerance * float(expected.abs().amax())
    torch.testing.assert_close(got.cpu().double(), expected, rtol=tolerance, atol=atol)


@pytest.mark.parametrize("p", [1.0, 0.5, 0.2])
def test_relu_and_the_sum_of_its_powers(p: float, scores: Tensor) -> None:
    if p < 1:  # near 0 the slope has no bound, which the test of its place needs
        scores = scores.where(scores.abs() > 0.05, 0)

    def reference(a: Tensor) -> tuple[Tensor, Tensor]:
        return a.relu(), a[a > 0].pow(p).sum()

    compare(lambda a: dense.relu(a, p), reference, scores, [])


@pytest.mark.parametrize("of_latents", [False, True])
def test_jumprelu_and_its_count(of_latents: bool, scores: Tensor) -> None:
    threshold = 0.1 + 0.3 * normal(M, seed=3, like=scores).abs()

    def reference(a: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        z = jumprelu(a, theta, BANDWIDTH)
        return z, step(z if of_latents else a, theta, BANDWIDTH).sum()

    def ours(a: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        return dense.jumprelu(a, theta, BANDWIDTH, of_latents=of_latents)

    compare(ours, reference, scores, [threshold])


def test_gated_latents_and_their_gate(scores: Tensor) -> None:
    parameters = [0.3 * normal(M, seed=seed, like=scores) for seed in (4, 5, 6)]

    def reference(a: Tensor, b: Tensor, r: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        z = ((a - b) * r.exp() + shift).relu() * (a > 0)
        return z, a.relu(), a.relu().sum()

    compare(dense.gated, reference, scores, parameters)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_perceptron_with_one_output(dtype: torch.dtype, path: str) -> None:
    """Within bounds that some rows lie beyond, whose gradient is 0."""
    like, d = torch.zeros((), device=path), 20  # whole numbers, whose products bfloat16 holds
    x, matrix = normal(B, d, seed=1, like=like).round(), normal(M, d, seed=2, like=like).round().t()
    vectors = [normal(n, seed=seed, like=like).round() for n, seed in ((M, 3), (d, 4), (M, 5))]
    vectors[2] = vectors[2][None] / 512
    single = [t.clone().requires_grad_() for t in (matrix, *vectors, like[None] + 0.25)]
    exact = [t.detach().cpu().double().requires_grad_() for t in single]
    lower = None if dtype == torch.float32 else matrix.to(dtype)
    found = dense.perceptron(x, *single, (80.0, 46.5, 49), lower)
    W, b, centre, weights, shift = exact
    dots = ((x.cpu().double() - centre) @ W + b).relu() @ weights[0] + shift
    expected = (80 * dots.sigmoid()).clamp(46.5, 49)
    assert 1 < int(((expected > 46.5) & (expected < 49)).sum()) < B - 2
    of_rows = normal(B, seed=6, like=like)
    (found * of_rows).sum().backward()
    (expected * of_rows.cpu().double()).sum().backward()
    close(found.detach(), expected.detach(), PRECISIONS[dtype])
    for got, wanted in zip(single, exact, strict=True):
        assert got.grad is not None
        close(got.grad, wanted.grad, 2 * PRECISIONS[dtype])


def test_errors_of_dense_latents(scores: Tensor) -> None:
    d = 20
    shapes = enumerate(((M, d), (d,), (B, d)), 7)
    leaves = [scores, *(normal(*shape, seed=seed, like=scores) for seed, shape in shapes)]
    single = [t.clone().requires_grad_() for t in leaves]
    exact = [t.detach().cpu().double().requires_grad_() for t in leaves]
    lower = None if scores.dtype == torch.float32 else leaves[1].to(scores.dtype)
    squares, error = squared_errors(*single, lower)
    expected = exact[0] @ exact[1] + exact[2] - exact[3]
    of_rows = normal(B, seed=6, like=scores)
    (squares * of_rows).sum().backward()
    (expected.square().sum(1) * of_rows.cpu().double()).sum().backward()
    assert not error.requires_grad
    tolerance = PRECISIONS[scores.dtype]
    close(error, expected.detach(), tolerance)
    close(squares.detach(), expected.detach().square().sum(1), 2 * tolerance)
    for got, wanted in zip(single, exact, strict=True):
        assert got.grad is not None
        assert got.grad.dtype == got.dtype
        close(got.grad, wanted.grad, 2 * tolerance)


def test_soft_latents_and_their_sum(scores: Tensor) -> None:
    if not gpu.serves_scores(scores):
        pytest.skip("Triton's alone: without a GPU plain torch takes the soft top-k itself")
    k = torch.linspace(0.5, 40, B, device=scores.device)
    heat = torch.tensor(0.3, device=scores.device)

    def reference(a: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        z = a.relu() * soft_topk(a.relu(), k, 0.3)
        return z, z.sum()

    compare(lambda a, k: dense.soft(a, k, heat, 30.0), reference, scores, [k])


def test_a_row_without_a_soft_mask_is_nan(scores: Tensor) -> None:
    if not gpu.serves_scores(scores):
        pytest.skip("Triton's alone: without a GPU plain torch takes the soft top-k itself")
    k = torch.full((B,), 3.0, device=scores.device)
    k[0], k[4] = -1, M + 1
    scores[5, 7], scores[6, 8] = torch.nan, torch.inf
    latents, total = dense.soft(scores, k, torch.tensor(0.3, device=scores.device), 30.0)
    assert latents.isnan().all(1).nonzero()[:, 0].tolist() == [0, 4, 5, 6]
    assert total.isnan()


def test_what_is_active_is_counted(scores: Tensor) -> None:
    latents = scores.clamp(min=0) - scores.clamp(max=-1).where(scores < -1.5, 0)
    latents[:, 17] = 0
    counts, fired = dense.count(latents)
    assert counts.tolist() == [int((row != 0).sum()) for row in latents.cpu()]
    assert fired.tolist() == [bool((column != 0).any()) for column in latents.cpu().T]


@pytest.mark.parametrize(
    "function",
    [
        lambda a: dense.relu(a, 0.5),
        lambda a: dense.jumprelu(a, a[0].float() * 0, 1.0, of_latents=False),
    ],
)
def test_nan_stays_nan(function: Callable[[Tensor], tuple[Tensor, Tensor]], scores: Tensor) -> None:
    scores[4, 9] = torch.nan
    latents, _ = function(scores)
    assert latents.isnan().nonzero().tolist() == [[4, 9]]


@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16])
def test_centred_rows_are_within_a_rounding(scores: Tensor, to: torch.dtype) -> None:
    centre = normal(M, seed=1, like=scores)
    found, expected = dense.centred(scores, centre, to), scores.double() - centre.double()
    assert found.dtype == to
    rtol = 2**-7 if to == torch.bfloat16 else 1e-6  # Triton's interpreter cuts off
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=1e-6)
