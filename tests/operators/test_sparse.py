import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor

from saeflow.operators.batch_topk import batch_topk_sparse
from saeflow.operators.products import decode_sparse, gather_pre_acts
from saeflow.operators.soft_topk import soft_topk
from saeflow.operators.sparse import SparseLatents
from saeflow.operators.sparsemax import sparsemax
from saeflow.operators.topk import keep_topk, topk_sparse

B, D, M = 9, 5, 31


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


CHOICES = {
    "top-k": lambda a: topk_sparse(a, 4),
    "k per row": lambda a: topk_sparse(a, torch.tensor([0, 1, 2, 31, 0, 5, 3, 1, 0])),
    "batch top-k": lambda a: batch_topk_sparse(a, 3.4),
    "everything": lambda a: topk_sparse(a, M),
    "nothing": lambda a: topk_sparse(a, 0),
    "one latent": lambda a: SparseLatents.from_mask(a, torch.arange(M).expand(B, M) == 7),
}
each_choice = pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES.keys())
Choose = Callable[[Tensor], SparseLatents]


@each_choice
def test_decoding_matches_the_dense_product_in_value_and_gradients(choose: Choose) -> None:
    latents = choose(normal(B, M))
    values, W_dec, b_dec = (
        t.detach().clone().requires_grad_() for t in (latents.values, normal(M, D), normal(D))
    )
    grad = normal(B, D, seed=1)
    sparse = latents.with_values(values)
    got = decode_sparse(sparse, W_dec, b_dec)
    expected = sparse.dense() @ W_dec + b_dec
    torch.testing.assert_close(got, expected)
    for ours, reference in zip(
        torch.autograd.grad(got, (values, W_dec, b_dec), grad),
        torch.autograd.grad(expected, (values, W_dec, b_dec), grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, reference)


def test_decoding_matches_scipy() -> None:
    latents = topk_sparse(normal(B, M), 4)
    csr = scipy.sparse.csr_matrix(
        (latents.values.numpy(), latents.columns.numpy(), latents.offsets.numpy()), shape=(B, M)
    )
    W_dec = normal(M, D)
    np.testing.assert_allclose(decode_sparse(latents, W_dec), csr @ W_dec.numpy())
    np.testing.assert_array_equal(latents.dense(), csr.toarray())


@each_choice
@pytest.mark.parametrize("by_columns", [True, False])
def test_encoder_gradients_match_the_dense_ones(choose: Choose, by_columns: bool) -> None:
    W_enc = normal(M, D).t() if by_columns else normal(D, M)
    parameters = [t.requires_grad_() for t in (normal(B, D), W_enc, normal(M), normal(D, seed=2))]
    x, W_enc, b_enc, b_dec = parameters
    dense = (x - b_dec) @ W_enc + b_enc
    pre_acts = dense.detach()
    latents = gather_pre_acts(x, W_enc, b_enc, b_dec, choose(pre_acts))
    chosen = dense.reshape(-1)[latents.rows * M + latents.columns]
    torch.testing.assert_close(latents.values, chosen)
    grad = normal(*chosen.shape, seed=1)
    for ours, reference in zip(
        torch.autograd.grad(latents.values, parameters, grad),
        torch.autograd.grad(chosen, parameters, grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, reference)


def test_a_whole_topk_step_matches_dense_autograd() -> None:
    x = normal(B, D)
    shapes = ((D, M), (M,), (D,), (M, D))
    parameters = [normal(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    W_enc, b_enc, b_dec, W_dec = parameters
    dense = keep_topk(((x - b_dec) @ W_enc + b_enc).relu(), 6) @ W_dec + b_dec
    with torch.no_grad():
        pre_acts = torch.addmm(b_enc, x - b_dec, W_enc)
    latents = gather_pre_acts(x, W_enc, b_enc, b_dec, topk_sparse(pre_acts, 6))
    sparse = decode_sparse(latents.with_values(latents.values.relu()), W_dec, b_dec)
    torch.testing.assert_close(sparse, dense)
    for ours, reference in zip(
        torch.autograd.grad((sparse - x).square().sum(), parameters),
        torch.autograd.grad((dense - x).square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, reference)


def test_gradcheck() -> None:
    latents = batch_topk_sparse(normal(4, 7), 2)
    values, W_dec = latents.values.clone().requires_grad_(), normal(7, 3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, w: decode_sparse(latents.with_values(v), w), (values, W_dec)
    )


@pytest.mark.parametrize(
    "operator", [sparsemax, lambda v: soft_topk(v, 3.5, 0.02)], ids=["sparsemax", "soft top-k"]
)
def test_mapping_rows_equals_the_dense_operator(operator: Callable[[Tensor], Tensor]) -> None:
    dense_in = normal(B, M).requires_grad_()
    expected = operator(dense_in)
    support = SparseLatents.from_mask(dense_in.detach(), expected.detach() != 0)
    values = support.values.clone().requires_grad_()
    got = support.with_values(values).map_rows(operator)
    torch.testing.assert_close(got.dense(), expected)
    grad = normal(B, M, seed=3)
    by_values = torch.autograd.grad(got.dense(), values, grad)[0]
    by_dense = torch.autograd.grad(expected, dense_in, grad)[0]
    torch.testing.assert_close(support.with_values(by_values).dense(), by_dense)


def test_split_columns_gives_the_reconstruction_of_each_group() -> None:
    latents, W_dec = topk_sparse(normal(B, M), 6), normal(M, D)
    boundaries = torch.tensor([3, 10, 10, 30])  # the third group is empty
    parts = decode_sparse(latents.split_columns(boundaries), W_dec).view(B, 5, D)
    edges = [0, 3, 10, 10, 30, M]
    for g in range(5):
        mask = (torch.arange(M) >= edges[g]) & (torch.arange(M) < edges[g + 1])
        torch.testing.assert_close(parts[:, g], (latents.dense() * mask) @ W_dec)


def test_dense_and_back() -> None:
    z = normal(B, M).relu().requires_grad_()
    latents = SparseLatents.from_dense(z)
    assert torch.equal(latents.dense(), z)
    assert torch.equal(latents.l0(), (z > 0).sum(1))
    assert torch.equal(torch.autograd.grad(latents.dense().sum(), z)[0], (z > 0).double())


def test_l0_counts_non_zero_values_not_entries() -> None:
    assert topk_sparse(torch.tensor([[3.0, 0, -1], [0, 0, 0]]), 3).l0().tolist() == [2, 0]


def test_transposed_structure_is_shared_between_values() -> None:
    latents = topk_sparse(normal(B, M), 4)
    structure = latents.by_column
    assert latents.with_values(latents.values.relu()).by_column is structure
    assert torch.equal(structure.rows, latents.rows[structure.order])
    assert (latents.columns[structure.order].diff() >= 0).all()


def test_same_input_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    x, W_dec = torch.randn(64, 200), torch.randn(200, 48)

    def gradients() -> list[Tensor]:
        W_enc, W = W_dec.t().clone().requires_grad_(), W_dec.clone().requires_grad_()
        b_enc, b_dec = torch.zeros(200, requires_grad=True), torch.zeros(48, requires_grad=True)
        a = (x[:, :48] @ W_dec.t()).detach()
        latents = gather_pre_acts(x[:, :48], W_enc, b_enc, b_dec, topk_sparse(a, 9))
        decode_sparse(latents, W, b_dec).square().sum().backward()
        return [W_enc.grad, W.grad, b_enc.grad, b_dec.grad]

    first = gradients()
    for _ in range(3):
        for ours, before in zip(gradients(), first, strict=True):
            assert torch.equal(ours, before)


def test_non_contiguous_weights_and_inputs() -> None:
    latents = topk_sparse(normal(M, B).t(), 4)
    values, W_dec = latents.values.clone().requires_grad_(), normal(D, M).t().requires_grad_()
    x_hat = decode_sparse(latents.with_values(values), W_dec)
    expected = latents.with_values(values).dense() @ W_dec
    torch.testing.assert_close(x_hat, expected)
    grad = normal(D, B).t()
    for ours, reference in zip(
        torch.autograd.grad(x_hat, (values, W_dec), grad),
        torch.autograd.grad(expected, (values, W_dec), grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, reference)


def test_bfloat16_activations_keep_float32_gradients() -> None:
    W_dec = torch.randn(M, D)
    x, W_enc = torch.randn(B, D).bfloat16(), W_dec.t().requires_grad_()
    b_enc, b_dec = torch.zeros(M), torch.zeros(D, dtype=torch.bfloat16)
    pre_acts = x @ W_enc.detach().bfloat16()
    chosen = topk_sparse(pre_acts, 4)
    latents = gather_pre_acts(x, W_enc, b_enc, b_dec, chosen)
    assert torch.equal(latents.values, chosen.values.float())
    got = torch.autograd.grad(decode_sparse(latents, W_dec).sum(), W_enc)[0]
    signal = chosen.with_values(W_dec.sum(1)[chosen.columns]).dense()
    torch.testing.assert_close(got, x.float().t() @ signal)


def test_float32_and_no_rows() -> None:
    latents = topk_sparse(torch.randn(0, 4), 2)
    W_dec = torch.randn(4, 3, requires_grad=True)
    decode_sparse(latents, W_dec, torch.zeros(3)).sum().backward()
    assert latents.dense().shape == (0, 4)
    assert not W_dec.grad.any()


def test_mismatched_shapes_and_dtypes_are_refused() -> None:
    latents = topk_sparse(torch.randn(3, 8), 2)
    with pytest.raises(ValueError, match=r"W_dec must be \(8, d_in\), got \(7, 4\)"):
        decode_sparse(latents, torch.randn(7, 4))
    with pytest.raises(ValueError, match=r"latents are torch\.float32 but W_dec is torch\.float64"):
        decode_sparse(latents, normal(8, 4))
    with pytest.raises(ValueError, match="expected 6 values, got"):
        latents.with_values(torch.zeros(5))
    x, W_enc, b_enc, b_dec = normal(3, 4), normal(4, 8), normal(8), normal(4)
    with pytest.raises(ValueError, match=r"selection is \(3, 8\), but x is \(2, 4\)"):
        gather_pre_acts(x[:2], W_enc, b_enc, b_dec, latents)
    with pytest.raises(ValueError, match="without gradient"):
        gather_pre_acts(x, W_enc, b_enc, b_dec, latents.with_values(torch.ones(6).requires_grad_()))
    with pytest.raises(ValueError, match=r"values must be \(B, n\), got \(2, 3, 4\)"):
        topk_sparse(normal(2, 3, 4), 2)
    with pytest.raises(ValueError, match="bool mask of that shape"):
        SparseLatents.from_mask(normal(2, 3), torch.zeros(2, 3))


def test_importing_the_operators_prints_nothing() -> None:
    code = "import saeflow.operators"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
