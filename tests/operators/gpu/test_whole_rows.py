"""Operators of whole rows and of entries by rows on Triton's kernels, against float64 on plain torch.

What the plain forms give is tested against independent references beside this folder.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from saeflow.operators import (
    SparseLatents,
    batch_topk_sparse,
    decode_sparse,
    entmax,
    entmax_sparse,
    gather_pre_acts,
    gpu,
    keep_topk,
    soft_topk,
    sparse,
    sparsemax,
    sparsemax_sparse,
    topk_sparse,
)

N = 4603
K = torch.tensor([3, 0, 40, 7])


def rows() -> Tensor:
    """(4, N): any, many ties with -0, none positive, one value throughout."""
    values = torch.randn(4, N, generator=torch.Generator().manual_seed(0))
    values[1] = values[1].round()
    values[2] = -values[2].abs()
    values[3] = 2.0
    return values


OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "keep_topk": lambda v: keep_topk(v, 9),
    "keep_topk, k by row": lambda v: keep_topk(v, K.to(v.device)),
    "sparsemax": lambda v: sparsemax(v[:3]),
    "sparsemax, more than lists hold": lambda v: sparsemax(v[3:]),
    "entmax 1.5": lambda v: entmax(v[:2], 1.5),
    "entmax 1.2": lambda v: entmax(v[:1], 1.2),
    "soft_topk, cold": lambda v: soft_topk(v, K.to(v.device) + 0.5, 1e-3),
    "soft_topk, hot": lambda v: soft_topk(v, K.to(v.device) * 10.0 + 3, 1.0),
    "soft_topk, more columns than are summed at once": lambda v: soft_topk(
        v[:1].repeat(1, 9), 40.5, 0.3
    ),
    "soft_topk, temperature on the device": lambda v: soft_topk(
        v, K.to(v.device) + 3.5, torch.full((), 0.7, dtype=torch.float64, device=v.device)
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_values_and_gradients_are_those_of_float64(name: str, path: str) -> None:
    values = rows()
    weights = torch.randn(4, 9 * N, generator=torch.Generator().manual_seed(1))
    found = []
    for leaf in (values.to(path), values.double()):
        leaf.requires_grad_()
        out = OPERATORS[name](leaf)
        (grad,) = torch.autograd.grad(
            (out * weights[: len(out), : out.shape[1]].to(out)).sum(), leaf
        )
        found.append((out.detach().cpu().double(), grad.cpu().double()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=2e-4, atol=2e-5)


def test_the_gradient_of_a_soft_k_across_a_gap_where_every_slope_underflows(path: str) -> None:
    values = torch.tensor([5.0, 3, 1, 1, 0], device=path)
    k = torch.tensor(2.0, requires_grad=True, device=path)
    mask = soft_topk(values, k, 1e-3)
    assert mask.tolist() == [1, 1, 0, 0, 0]
    (by_k,) = torch.autograd.grad((mask * torch.arange(5.0, device=path)).sum(), k)
    exact = torch.tensor(2.0, requires_grad=True, dtype=torch.float64)
    mask = soft_topk(values.double().cpu(), exact, 1e-3)
    (expected,) = torch.autograd.grad((mask * torch.arange(5.0)).sum(), exact)
    torch.testing.assert_close(by_k.cpu().double(), expected, rtol=1e-3, atol=1e-4)


def test_soft_masks_as_small_as_floats_are(path: str) -> None:
    """b lies log 2 temperatures above the largest, so that F of the others is exp(-distance from it) / 4."""
    far = torch.arange(0.0, 120, 3)
    expected = (0.25 * (-far.double()).exp()).where(far < 102, 0)
    found = soft_topk((-1e-3 * far).to(path)[None], float(expected.sum()), 1e-3, reach=103)
    found = found[0].cpu().double()
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2**-149)


@pytest.mark.parametrize("temperature", [1e-8, 1e-42])
def test_a_temperature_below_the_distances_of_floats_gives_the_hard_choice(
    temperature: float, path: str
) -> None:
    values = rows()[0].to(path)
    mask = soft_topk(values, 7.0, temperature)
    assert torch.equal(mask, (keep_topk(values, 7) != 0).float())


SELECTIONS: dict[str, Callable[[Tensor], SparseLatents]] = {
    "top-k": lambda v: topk_sparse(v, 5),
    "top-k up to -inf": lambda v: topk_sparse(v.masked_fill(v < 4, -torch.inf), 5),
    "batch top-k": lambda v: batch_topk_sparse(v[:3], 6),
    "batch top-k, most in one row": lambda v: batch_topk_sparse(v, 6),
    "sparsemax": lambda v: sparsemax_sparse(v[:3]),
    "entmax": lambda v: entmax_sparse(v[:2], 1.5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_are_those_of_float64(name: str, dtype: torch.dtype, path: str) -> None:
    values = rows().to(dtype)
    got = SELECTIONS[name](values.to(path))
    expected = SELECTIONS[name](values.double())
    assert torch.equal(got.offsets.cpu(), expected.offsets)
    assert torch.equal(got.columns.cpu(), expected.columns)
    assert torch.equal(got.values.cpu().double(), expected.values)


def test_rows_without_an_answer_are_refused_by_name(path: str) -> None:
    values = rows()[:2].to(path)
    values[1, 7] = torch.nan
    absent = torch.tensor([[1.0, -torch.inf]], device=path)
    operators = [lambda v: keep_topk(v, 3), sparsemax]
    if path == "cuda":  # where naming the row would take a wait
        assert soft_topk(values, 3, 0.1).isnan().all(1).tolist() == [False, True]
        assert soft_topk(absent, 2, 0.1).isnan().all()
    else:
        operators.append(lambda v: soft_topk(v, 3, 0.1))
        with pytest.raises(ValueError, match="row 0: k exceeds the number of finite values"):
            soft_topk(absent, 2, 0.1)
    for operator in operators:
        with pytest.raises(ValueError, match=r"row 1: .*hold NaN"):
            operator(values)
    with pytest.raises(ValueError, match="row 0: scores are all -inf"):
        sparsemax(torch.full((1, 40), -torch.inf, device=path))


def test_the_sparse_path_has_the_gradients_of_dense_products(path: str) -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = ((6, 20), (33, 20), (33,), (20,), (33, 20))
    exact = [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    ]
    leaves = [t.detach().float().to(path).requires_grad_() for t in exact]
    x, W, b_enc, b_dec, W_dec = exact
    pre_acts = (x - b_dec) @ W.t() + b_enc
    dense = keep_topk(pre_acts, 7) @ W_dec
    expected = torch.autograd.grad((dense - x.detach()).square().sum(), exact)
    x, W, b_enc, b_dec, W_dec = leaves
    with torch.no_grad():
        chosen = topk_sparse((x - b_dec) @ W.t() + b_enc, 7)
    latents = gather_pre_acts(x, W.t(), b_enc, b_dec, chosen)
    loss = (decode_sparse(latents, W_dec) - x.detach()).square().sum()
    for ours, reference in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        scale = float(reference.abs().max())
        torch.testing.assert_close(ours.cpu().double(), reference, rtol=0, atol=1e-5 * scale)


def test_kernels_mark_a_row_without_a_mask_where_the_host_must_not_wait(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).to(path)
    k = torch.tensor([3.0, 2.5, 60.0, 4.0], device=path)
    expected = soft_topk(values, k.clamp(max=50), 0.1)
    values[1, 7] = torch.inf
    monkeypatch.setattr(sparse, "is_padded", True)
    if not gpu.serves_scores(values):
        with pytest.raises(ValueError, match="row 2: k must be in"):
            soft_topk(values, k, 0.1)
        return
    found = soft_topk(values, k, 0.1)
    assert bool(found[1:3].isnan().all())
    torch.testing.assert_close(found[[0, 3]], expected[[0, 3]])
