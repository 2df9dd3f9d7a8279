"""Products with lists, against dense matrices and autograd."""

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor

from saeflow.operators.gpu import sparse
from saeflow.operators.gpu.lists import Lists

B, M, D, C = 6, 24, 20, 16  # D is no power of two
ROUNDED = 2.0**-7  # of bfloat16, which the interpreter rounds towards 0


def normal(*shape: int, seed: int, path: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(path)


@pytest.fixture(params=[(C, 0), (4, 14)], ids=["of one length", "with spare ones"])
def lists(path: str, request: pytest.FixtureRequest) -> Lists:
    """Rows of 0 to C entries, columns of 0 to B."""
    capacity, spare = request.param
    mask = torch.rand(B, M, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[1], mask[2, :C], mask[:, 5] = False, True, False
    mask[2, C:] = False
    lists = Lists.from_mask(normal(B, M, seed=1, path=path), mask.to(path), capacity, spare)
    assert not lists.status.any()
    return lists


def at(dense: Tensor, lists: Lists) -> Tensor:
    """Take each entry of a matrix (B, M), 0 where there is none."""
    return lists.of_lists(dense).gather(1, lists.columns.long()).where(lists.real, 0)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_matches_scipy(lists: Lists, dtype: torch.dtype, path: str) -> None:
    W_dec, b_dec = normal(M, D, seed=2, path=path).to(dtype), normal(D, seed=3, path=path)
    rows = scipy.sparse.csr_matrix(lists.dense().cpu().numpy())
    expected = rows @ W_dec.float().cpu().numpy()
    np.testing.assert_allclose(sparse.decode(lists, W_dec).cpu(), expected, rtol=1e-5, atol=1e-5)
    with_bias = sparse.decode(lists, W_dec, b_dec).cpu().numpy()
    np.testing.assert_allclose(with_bias, expected + b_dec.cpu().numpy(), rtol=1e-5, atol=1e-5)


def test_chosen_scores_are_those_of_the_dense_product(lists: Lists, path: str) -> None:
    x, W_enc = normal(B, D, seed=4, path=path), normal(M, D, seed=5, path=path)
    b_enc, b_dec = normal(M, seed=6, path=path), normal(D, seed=7, path=path)
    scores, centred = sparse.rescore(x, W_enc, b_enc, b_dec, lists)
    close(centred, x - b_dec)
    dense = (x - b_dec) @ W_enc.t() + b_enc
    close(scores, at(dense, lists))
    products = sparse.row_products(x, W_enc, lists)
    close(products, at(x @ W_enc.t(), lists))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_and_all_its_gradients(lists: Lists, dtype: torch.dtype, path: str) -> None:
    W_dec = normal(M, D, seed=8, path=path).to(dtype)
    x, b_dec = normal(B, D, seed=9, path=path), normal(D, seed=10, path=path)
    dense = lists.dense().requires_grad_()
    x_hat = dense @ W_dec.float() + b_dec
    x_hat.retain_grad()
    squares = (x_hat - x).square().sum(1)
    squares.sum().backward()
    got = sparse.decode_error(lists, W_dec, b_dec, x, dtype)
    assert got.kept.dtype == dtype
    torch.testing.assert_close(got.kept.float(), got.error, rtol=ROUNDED, atol=0)
    close(got.squares, squares.detach())
    close(2 * got.error, x_hat.grad)
    expected = at(dense.grad, lists)
    close(2 * got.products, expected)


@pytest.mark.parametrize("n_blocks", [1, 2, 6])
def test_blocks_of_rows_have_biases_of_their_own(lists: Lists, n_blocks: int, path: str) -> None:
    W_dec, x = normal(M, D, seed=8, path=path), normal(B, D, seed=9, path=path)
    b_dec = normal(n_blocks, D, seed=10, path=path)
    got = sparse.decode_error(lists, W_dec, b_dec, x)
    expected = lists.dense() @ W_dec + b_dec.repeat_interleave(B // n_blocks, 0) - x
    close(got.error, expected)
    close(got.squares, expected.square().sum(1))
    close(got.products, at(expected @ W_dec.t(), lists))


def test_the_errors_of_prefixes_of_groups(lists: Lists, path: str) -> None:
    """Compare 5 groups, one of one latent, with autograd through each prefix's dense product."""
    boundaries = torch.tensor([4, 5, 11, 20], device=path)
    ends = [*boundaries.tolist(), M]
    W_dec, b_dec = normal(M, D, seed=8, path=path), normal(D, seed=10, path=path)
    x, dense = normal(B, D, seed=9, path=path), lists.dense().requires_grad_()
    leaves = [W_dec.requires_grad_(), b_dec.requires_grad_(), dense]
    errors = [dense[:, :end] @ W_dec[:end] + b_dec - x for end in ends]
    squares = torch.stack([error.square().sum(1) for error in errors]).sum(0)
    of_W, of_b, of_latents = torch.autograd.grad(squares.sum(), leaves)
    got = sparse.nested_errors(lists, W_dec.detach(), b_dec.detach(), x, boundaries)
    close(got.squares, squares.detach())
    rounded = sparse.nested_errors(
        lists, W_dec.detach(), b_dec.detach(), x, boundaries, torch.bfloat16
    )
    assert rounded.kept.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.kept.float(), got.kept, rtol=ROUNDED, atol=0)
    assert torch.equal(rounded.of_all, got.kept[:, 0])
    close(got.error, errors[-1].detach())
    for place in range(5):
        close(got.kept[:, place], torch.stack(errors[place:]).sum(0).detach())
    expected = at(of_latents, lists)
    close(2 * got.products, expected)
    close(2 * got.kept[:, 0].sum(0), of_b)
    found, _ = sparse.column_sums(2 * got.kept, lists, lists.values, boundaries)
    close(found, of_W)
    nothing = torch.zeros_like(lists.values)
    both = sparse.weight_gradients(x, 2 * got.kept, lists, nothing, boundaries=boundaries)
    close(both.W_dec, of_W)
    assert not both.W_enc.any()


def test_one_group_is_the_whole(lists: Lists, path: str) -> None:
    W_dec, b_dec = normal(M, D, seed=8, path=path), normal(D, seed=10, path=path)
    x, nowhere = normal(B, D, seed=9, path=path), torch.zeros(0, dtype=torch.int64, device=path)
    got = sparse.nested_errors(lists, W_dec, b_dec, x, nowhere)
    expected = sparse.decode_error(lists, W_dec, b_dec, x)
    close(got.kept[:, 0], expected.error)
    close(got.squares, expected.squares)
    close(got.products, expected.products)


def test_weight_gradients_are_autograds(lists: Lists, path: str) -> None:
    """The gradients of a loss whose gradients at the latents and at x_hat are given."""
    start = normal(M, D, seed=11, path=path)
    centred, grad = normal(B, D, seed=12, path=path), normal(B, D, seed=13, path=path)
    value_grads = normal(*lists.values.shape, seed=14, path=path).where(lists.real, 0)
    W_enc, b_enc, W_dec = (
        t.clone().requires_grad_() for t in (start, torch.zeros(M, device=path), start)
    )
    pre_acts = centred @ W_enc.t() + b_enc
    loss = (pre_acts * lists.with_values(value_grads).dense()).sum()
    loss = loss + ((lists.dense() @ W_dec) * grad).sum()
    expected = torch.autograd.grad(loss, (W_enc, b_enc, W_dec))
    got = sparse.weight_gradients(centred, grad, lists, value_grads)
    for ours, reference in zip(got, expected, strict=True):
        close(ours, reference)
    first = [part.clone() for part in got]
    again = sparse.weight_gradients(centred, grad, lists, value_grads)
    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    twice = sparse.weight_gradients(centred, grad, lists, value_grads, into=got)
    for ours, reference in zip(twice, expected, strict=True):
        close(ours, 2 * reference)
    nobody = torch.zeros(B, M, dtype=torch.bool, device=path)
    spare = len(lists.columns) - B
    nothing = Lists.from_mask(lists.dense(), nobody, lists.capacity, spare)
    same = sparse.weight_gradients(centred, grad, nothing, torch.zeros_like(value_grads), into=got)
    for ours, reference in zip(same, expected, strict=True):
        close(ours, 2 * reference)


def test_sums_by_column_are_a_product_with_the_transpose(lists: Lists, path: str) -> None:
    matrix = normal(B, D, seed=15, path=path)
    weights = normal(*lists.values.shape, seed=16, path=path)
    weights = weights.where(lists.real, 0)
    sums, totals = sparse.column_sums(matrix, lists, weights)
    dense = lists.with_values(weights).dense()
    close(sums, dense.t() @ matrix)
    close(totals, dense.sum(0))


@pytest.mark.parametrize("is_one", [True, False])
def test_products_are_scaled_by_twice_the_number_of_their_row(
    lists: Lists, is_one: bool, path: str
) -> None:
    """A number for each row, or one that is expanded, as the gradient of a mean is."""
    of_rows = normal(1 if is_one else B, seed=8, path=path).expand(B)
    products = normal(*lists.values.shape, seed=9, path=path).where(lists.real, 0)
    twice, scaled = sparse.twice_scaled(lists, products, of_rows)
    assert twice.tolist() == [2 * number for number in of_rows.tolist()]
    owners = range(B) if lists.spill is None else lists.spill.owners.tolist()
    expected = products.cpu() * torch.tensor([2 * of_rows[row].item() for row in owners])[:, None]
    close(scaled.cpu(), expected)
