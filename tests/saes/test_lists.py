"""Latents in rows of the same room, as on a GPU: every variant gives what it gives with rows as long as they are."""

import pytest
import torch
from torch import Tensor

from saeflow.batch import Batch
from saeflow.operators import sparse
from saeflow.saes import SAE, build

from .test_variants import BATCH, CASES, D_IN, D_SAE, STEP, STEPS


def made(case: str) -> SAE:
    variant, options = CASES[case]
    sae = build(variant, D_IN, D_SAE, options).train()
    generator = torch.Generator().manual_seed(1)
    sae.initialise(Batch.of(torch.randn(64, D_IN, generator=generator)), generator)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    sae.begin_step(STEP, STEPS)
    return sae


def step_of(
    sae: SAE, x: Tensor, dead: Tensor, is_bf16: bool
) -> tuple[dict[str, Tensor], list[Tensor | None], Tensor]:
    """Losses, gradients and L0 of a step on the sparse path."""
    sae.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, is_bf16):
        fwd = sae.run(Batch.of(x), is_sparse=True)
    losses = sae.losses(fwd, dead)
    torch.stack(list(losses.values())).sum().backward()
    sae.end_step(fwd)
    sae.settle()
    return losses, [p.grad for p in sae.parameters()], torch.cat((fwd.l0(), fwd.fired().long()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_rows_of_the_same_room_change_nothing(
    case: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(2))
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[5:25] = precision == "fp32"  # their choice is by rounded scores on one side alone
    expected, found, is_bf16 = made(case), made(case), precision == "bf16"
    losses, gradients, counts = step_of(expected, x, dead, is_bf16)
    monkeypatch.setattr(sparse, "is_padded", True)
    found.dead_room = int(dead.sum())  # the trainer makes it, and takes a step without it again
    padded_losses, padded_gradients, padded_counts = step_of(found, x, dead, is_bf16)
    # In bfloat16 lists read the decoder, and gradients x and the error, in that precision (8 bits).
    rtol, share = (2**-8, 2**-6) if is_bf16 else (1e-4, 0.0)
    torch.testing.assert_close(padded_losses, losses, rtol=rtol, atol=1e-5)
    for (name, _), one, other in zip(
        expected.named_parameters(), padded_gradients, gradients, strict=True
    ):
        if other is None:
            assert one is None or not bool(one.any()), name  # AuxK of no latent
        else:
            torch.testing.assert_close(
                one, other, rtol=1e-3, atol=1e-4 + share * float(other.abs().max()), msg=lambda m, n=name: f"{n}: {m}"
            )  # fmt: skip
    torch.testing.assert_close(padded_counts, counts)
    for (name, one), other in zip(found.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("is_bf16", [False, True])
@pytest.mark.parametrize("case", ["relu", "gated"])
def test_a_dense_reconstruction_has_the_errors_of_its_pass(
    case: str, is_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "is_padded", True)
    x = torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(2))
    sae = made(case)
    with torch.autocast("cpu", torch.bfloat16, is_bf16):
        fwd = sae.run(Batch.of(x), is_sparse=False)
    tolerance = 2**-6 if is_bf16 else 1e-5
    error = fwd.x_hat - x
    torch.testing.assert_close(-fwd.residual, error, rtol=tolerance, atol=tolerance)
    found, expected = (
        torch.autograd.grad(loss, [sae.W_dec, sae.b_dec], retain_graph=True)
        for loss in (fwd.squared_errors.sum(), error.square().sum())
    )
    for got, wanted in zip(found, expected, strict=True):
        assert (got - wanted).norm() <= tolerance * wanted.norm()
