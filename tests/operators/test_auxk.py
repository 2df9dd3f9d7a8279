import pytest
import torch
from torch import Tensor

from saeflow.operators.auxk import auxk_loss, residual_share, select_auxk
from saeflow.operators.products import decode_sparse, gather_pre_acts

B, D, M = 7, 6, 40


def by_definition(
    residual: Tensor, pre_acts: Tensor, W_dec: Tensor, dead: Tensor, k_aux: int
) -> Tensor:
    """Independent reference: dense, row by row, with a full sort."""
    e_hat = []
    for row in pre_acts:
        best = sorted(dead.nonzero()[:, 0].tolist(), key=lambda i: -row[i].item())[:k_aux]
        e_hat.append(sum((row[i].clamp(min=0) * W_dec[i] for i in best), torch.zeros(D)))
    numerator = (residual - torch.stack(e_hat)).square().sum(1).mean()
    return numerator / (residual - residual.mean(0)).square().sum(1).mean()


@pytest.fixture
def example() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    residual, pre_acts, W_dec = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((B, D), (B, M), (M, D))
    )
    dead = torch.rand(M, generator=generator) < 0.4
    return residual, pre_acts.requires_grad_(), W_dec.requires_grad_(), dead


@pytest.mark.parametrize("k_aux", [0, 1, 3, 10, 1000])
def test_value_and_gradients_match_the_definition(
    example: tuple[Tensor, Tensor, Tensor, Tensor], k_aux: int
) -> None:
    _, pre_acts, W_dec, _ = example
    got, expected = auxk_loss(*example, k_aux), by_definition(*example, k_aux)
    torch.testing.assert_close(got, expected)
    if k_aux:
        for ours, reference in zip(
            torch.autograd.grad(got, (pre_acts, W_dec)),
            torch.autograd.grad(expected, (pre_acts, W_dec)),
            strict=True,
        ):
            torch.testing.assert_close(ours, reference)


def test_k_aux_defaults_to_half_the_width(example: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    assert auxk_loss(*example) == auxk_loss(*example, D // 2)


def test_residual_is_a_constant(example: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    residual, *rest = example
    residual.requires_grad_()
    auxk_loss(residual, *rest).backward()
    assert residual.grad is None


def test_all_latents_dead(example: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    residual, pre_acts, W_dec, dead = example
    everything = torch.ones_like(dead)
    got = auxk_loss(residual, pre_acts, W_dec, everything)
    torch.testing.assert_close(got, by_definition(residual, pre_acts, W_dec, everything, D // 2))


def test_dead_latents_that_stay_negative_leave_the_whole_residual(
    example: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    residual, pre_acts, W_dec, dead = example
    negative = -pre_acts.detach().abs()
    expected = residual.square().sum() / (residual - residual.mean(0)).square().sum()
    torch.testing.assert_close(auxk_loss(residual, negative, W_dec, dead), expected)


@pytest.mark.parametrize("case", ["none dead", "equal residuals", "one row", "nan residual"])
def test_undefined_loss_is_zero_with_zero_gradient(
    example: tuple[Tensor, Tensor, Tensor, Tensor], case: str
) -> None:
    residual, pre_acts, W_dec, dead = example
    if case == "none dead":
        dead = torch.zeros_like(dead)
    if case == "equal residuals":
        residual = torch.ones_like(residual)
    if case == "one row":
        residual, pre_acts = residual[:1], pre_acts[:1].detach().requires_grad_()
    if case == "nan residual":
        residual[2, 3] = torch.nan
    loss = auxk_loss(residual, pre_acts, W_dec, dead)
    assert loss == 0
    for grad in torch.autograd.grad(loss, (pre_acts, W_dec)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_gradcheck(example: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    residual, pre_acts, W_dec, dead = example
    assert torch.autograd.gradcheck(lambda a, w: auxk_loss(residual, a, w, dead), (pre_acts, W_dec))


def test_sparse_path_gives_the_encoder_the_dense_gradient(
    example: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    residual, _, W_dec, dead = example
    x = torch.randn(B, D, dtype=torch.float64)
    W_enc, b_enc, b_dec = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((D, M), (M,), (D,))
    )
    parameters = W_enc, b_enc, b_dec, W_dec
    dense = auxk_loss(residual, (x - b_dec) @ W_enc + b_enc, W_dec, dead)
    with torch.no_grad():
        pre_acts = (x - b_dec) @ W_enc + b_enc
    chosen = select_auxk(pre_acts, dead, D // 2)
    latents = gather_pre_acts(x, W_enc, b_enc, b_dec, chosen)
    sparse = residual_share(residual, decode_sparse(latents, W_dec))
    torch.testing.assert_close(sparse, dense)
    for ours, reference in zip(
        torch.autograd.grad(sparse, parameters), torch.autograd.grad(dense, parameters), strict=True
    ):
        torch.testing.assert_close(ours, reference)


def test_selection_holds_positive_dead_entries_only(
    example: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    _, pre_acts, _, dead = example
    chosen = select_auxk(pre_acts.detach(), dead, 5)
    assert dead[chosen.columns].all()
    assert (chosen.values > 0).all()
    expected = (pre_acts.where(dead, -1) > 0).sum(1).clamp(max=5)
    assert torch.equal(chosen.offsets.diff(), expected)


def test_wrong_dead_mask_and_nan_are_refused(
    example: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    residual, pre_acts, W_dec, dead = example
    with pytest.raises(ValueError, match=r"dead must be bool \(40,\), got torch.int64 \(40,\)"):
        auxk_loss(residual, pre_acts, W_dec, dead.long())
    with pytest.raises(ValueError, match=r"dead must be bool \(40,\), got torch.bool \(39,\)"):
        auxk_loss(residual, pre_acts, W_dec, dead[1:])
    with pytest.raises(ValueError, match="row 3"):
        auxk_loss(residual, pre_acts.where(torch.arange(B)[:, None] != 3, torch.nan), W_dec, dead)
