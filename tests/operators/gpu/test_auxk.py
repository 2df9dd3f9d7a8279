"""AuxK's pieces, for which the host does not wait: dead columns, the largest of each row, products with copied rows."""

import pytest
import torch
from torch import Tensor

from saeflow.operators import (
    gather_pre_acts,
    keep_topk,
    rebuild,
    residual_share,
    share_left,
    sparse,
    squared_errors,
    topk_sparse,
)
from saeflow.operators.gpu.dead import columns_of, largest

DEAD = [3, 4, 17, 30, 49]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("wide", [16, 4096])  # several reads of the flags, and one
@pytest.mark.parametrize("count", [3, 16, 50])
def test_dead_columns_come_first_and_none_twice(
    count: int, wide: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saeflow.operators.gpu.dead.WIDE", wide)
    flags = torch.zeros(50, dtype=torch.bool, device=path)
    flags[DEAD] = True
    columns, number, lacking = columns_of(flags, count)
    found = columns.tolist()
    assert found[:5] == DEAD[:count]
    assert len(set(found)) == count
    assert sorted(found[5:]) == found[5:]
    assert (int(number), int(lacking)) == (5, 5 if count < 5 else 0)
    of_none = columns_of(torch.zeros_like(flags), count)
    assert (of_none[0].tolist(), int(of_none[1])) == (list(range(count)), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "is_signed"), [(1, False), (30, True), (30, False), (200, True)])
def test_the_largest_are_those_of_keep_topk(
    k: int, dtype: torch.dtype, is_signed: bool, path: str
) -> None:
    """Rows are ordinary ones, equal ones, ties, one with fewer positive entries than k, one with none, zeros."""
    scores = drawn(8, 70).to(path, dtype)
    scores[1], scores[2] = scores[0], scores[2].round()
    scores[3], scores[4, 2:], scores[5], scores[6], scores[7, 4] = 1.0, -1.0, -1.0, 0.0, torch.nan
    columns = torch.cat((torch.arange(0, 70, 2), torch.arange(1, 50, 2))).to(path)
    number = torch.tensor(57, device=path)
    found = largest(scores, columns, number, k, is_signed=is_signed)
    taken = scores[:, columns].float().nan_to_num(-1.0 if not is_signed else 0.0)
    taken[:, 57:] = 0
    kept = keep_topk(taken.abs() if is_signed else taken.relu(), k) > 0
    assert found.dtype == dtype
    assert torch.equal(found.float(), taken.where(kept, 0))


def auxk_by_definition(
    x: Tensor, weights: list[Tensor], columns: Tensor, active: Tensor, error: Tensor
) -> Tensor:
    """AuxK's loss of given places, by autograd in float64."""
    W_enc, b_enc, b_dec, W_dec = weights
    a = ((x - b_dec) @ W_enc + b_enc)[:, columns].where(active != 0, 0)
    spread = (error - error.mean(0)).square().sum()
    return (error + a @ W_dec[columns]).square().sum() / spread


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_walk", [False, True])
def test_loss_and_gradients_are_those_of_the_definition(
    has_walk: bool, dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tolerances are what rounding latents, rows and gradients to bfloat16 (8 bits) leaves, given the same choice."""
    monkeypatch.setattr(sparse, "is_padded", True)
    shapes = (12, 20), (20, 60), (60,), (20,), (60, 20), (12, 20)
    x, *tensors, error = (drawn(*s, seed=i).to(path) for i, s in enumerate(shapes))
    x[5], error[6] = 0.0, 0.0
    weights = [t.requires_grad_() for t in tensors]
    W_enc, b_enc, b_dec, W_dec = weights
    scores = ((x - b_dec) @ W_enc + b_enc).detach().to(dtype)
    scores[3] = -1.0  # no dead latent fires
    flags = torch.zeros(60, dtype=torch.bool, device=path)
    flags[[*DEAD, 50, 51, 52]] = True
    columns, number, _ = columns_of(flags, 20)  # 12 live ones take no part
    active = largest(scores, columns, number, 4)
    walk, main, of_main = None, torch.zeros((), device=path), [torch.zeros(())] * 4
    if has_walk:  # the same weights have a part of the gradient from the chosen latents of the step
        chosen = topk_sparse(scores.float(), 3, 4)
        latents = gather_pre_acts(x, W_enc, b_enc, b_dec, chosen, is_rounded=True, W_dec=W_dec)
        walk, main = latents.walk, squared_errors(latents, W_dec, b_dec, x)[0].sum()
        of_main = list(torch.autograd.grad(main, weights, retain_graph=True))
    e_hat = rebuild(x, W_enc, b_enc, b_dec, W_dec, active, columns, walk)
    loss = share_left(error, e_hat, number, lambda part: part, len(x))
    found = torch.autograd.grad(3 * loss + main, weights)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = auxk_by_definition(x.double(), exact, columns, active, error.double())
    gradients = torch.autograd.grad(3 * expected, exact)
    assert e_hat.dtype == dtype
    share = 1e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=share / 4, atol=0)
    for ours, of_auxk, more in zip(found, gradients, of_main, strict=True):
        allowed = share * float(of_auxk.abs().max()) + 1e-5 * float(more.abs().max())
        reference = of_auxk + more.to(path).double()
        torch.testing.assert_close(ours.double(), reference, rtol=0, atol=allowed)


@pytest.mark.parametrize("case", ["none dead", "equal errors", "nan error", "one row"])
def test_an_undefined_share_is_zero_with_zero_gradient(case: str, path: str) -> None:
    error, e_hat = drawn(6, 20).to(path), drawn(6, 20, seed=1).to(path)
    number = torch.tensor(0 if case == "none dead" else 2, device=path)
    if case == "equal errors":
        error = torch.ones_like(error)
    if case == "nan error":
        error[2, 3] = torch.nan
    if case == "one row":
        error, e_hat = error[:1], e_hat[:1]
    given = e_hat.requires_grad_()
    share = share_left(error, given, number, lambda part: part, len(error))
    (grad,) = torch.autograd.grad(share, given)
    assert share == 0
    assert torch.equal(grad, torch.zeros_like(grad))


def test_a_share_is_that_of_all_rows_of_a_batch(path: str) -> None:
    """The other half of the batch, on another process, has the same rows."""
    error, e_hat = drawn(10, 20).to(path), drawn(10, 20, seed=1).to(path)
    number, given = torch.tensor(1, device=path), e_hat.clone().requires_grad_()
    share = share_left(error, given, number, lambda part: 2 * part, 20)
    both, exact = error.double().repeat(2, 1), e_hat.double().requires_grad_()
    expected = residual_share(-both, exact.repeat(2, 1))
    torch.testing.assert_close(share.double(), expected)
    for ours, reference in zip(
        torch.autograd.grad(share, given), torch.autograd.grad(expected, exact), strict=True
    ):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-8)
