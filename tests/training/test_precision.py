"""Steps in bfloat16 choose latents from rounded scores and compute with exact ones: every variant trains as in float32."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from saeflow.batch import Batch
from saeflow.operators import SparseLatents, auxk_loss
from saeflow.saes import VARIANTS, build
from saeflow.training.run import Run

from .conftest import CONSTANT, OPTIONS, config

D_IN, D_SAE, STEPS, LAST = 64, 256, 60, 20
ANY_K = {"k": 8, "k_schedule": CONSTANT, "auxk_weight": 1 / 32}
CHANGES: dict[str, dict[str, Any]] = {
    "topk": ANY_K,
    "abs_topk": ANY_K,
    "batch_topk": ANY_K,
    "matryoshka": ANY_K,
    # Cold: entries that teach k_hat lie closer to each other than bfloat16 can tell.
    "soft_topk": {
        **ANY_K, "k_max": 16.0, "estimator_width": None, "alpha": 1e-3, "alpha_schedule": CONSTANT,
        "hard_fraction": 0.0,
    },
    "jumprelu": {"target_l0": 8.0, "target_schedule": CONSTANT, "threshold": 1.5, "bandwidth": 0.01},
}  # fmt: skip


DENSE = ("matching_pursuit",)
"""Variants whose choice takes more than a row's scores, so that no step of theirs is sparse."""

COUNTED = ("top_afa", "matching_pursuit")
"""Variants whose scores decide how many latents an input has, beside what they read of it first."""


class Planted:
    """Sums of a few of many directions, frequent ones and rare ones, around a mean."""

    d_in, scale, model, targets = D_IN, 1.0, None, None

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        features = torch.randn(2 * D_SAE, D_IN, generator=generator)
        self.features = features / features.norm(dim=1, keepdim=True)
        self.mean = 0.5 * torch.randn(D_IN, generator=generator)

    def batches(self, batch_size: int, seed: int, start_batch: int = 0) -> Iterator[Batch]:
        frequency = 1 / torch.arange(1, len(self.features) + 1)
        for number in itertools.count(start_batch):
            generator = torch.Generator().manual_seed(1000 + number)
            chosen = torch.multinomial(frequency, batch_size * 8, True, generator=generator)
            values = 1 + torch.rand(batch_size, 8, 1, generator=generator)
            x = (values * self.features[chosen.view(batch_size, 8)]).sum(1) + self.mean
            yield Batch.of(x * D_IN**0.5 / 4.5)


def last_steps(variant: str, precision: str, folder: Path) -> tuple[float, float, bool]:
    """The mean loss of the last steps, their mean k_hat (the mean L0 without one), and the path taken."""
    options = {**OPTIONS[variant], **CHANGES.get(variant, {})}
    batch_size = 1024 if variant == "soft_topk" else 256  # its k_hat is noisier
    setting = config(
        variant, steps=STEPS, d_sae=D_SAE, batch_size=batch_size, tokens=batch_size * STEPS, lr=1e-3,
        lr_decay_fraction=0.0, input_scale="raw", dead_after_tokens=20 * batch_size,
    )  # fmt: skip
    setting = dataclasses.replace(setting, options=options)
    runtime = {"device": "cpu", "precision": precision, "threads": 1, "checkpoint_every_s": 1e9}
    run = Run(Planted(), setting, runtime, folder)
    if variant in ("relu", "gated", "p_anneal"):  # few latents are active, as later in training
        with torch.no_grad():
            run.sae.b_enc.sub_(1.5)
    losses, counts = [], []
    for batch in itertools.islice(run.batches(), STEPS):
        fwd, terms = run.one_step(batch)
        run.step += 1
        losses.append(float(terms["loss"]))
        counts.append(
            float(
                (
                    fwd.l0()
                    if fwd.condition is None or variant in COUNTED
                    else fwd.condition.detach()
                )
                .float()
                .mean()
            )
        )
    return sum(losses[-LAST:]) / LAST, sum(counts[-LAST:]) / LAST, fwd.is_sparse


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_trains_in_bf16_as_in_fp32(variant: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    loss, count, is_sparse = last_steps(variant, "fp32", tmp_path)
    assert is_sparse != (variant in DENSE)
    found_loss, found_count, _ = last_steps(variant, "bf16", tmp_path)
    assert found_loss == pytest.approx(loss, rel=0.005)
    assert found_count == pytest.approx(count, rel=0.02)


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - set(DENSE)))
def test_chosen_pre_activations_are_those_of_fp32_weights(variant: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sae = build(variant, D_IN, D_SAE, {**OPTIONS[variant], **CHANGES.get(variant, {})}).train()
    x = next(Planted().batches(128, 0)).x
    sae.initialise(Batch.of(x), generator)
    with torch.autocast("cpu", torch.bfloat16):
        fwd = sae.run(Batch.of(x), is_sparse=True)
    assert isinstance(fwd.selected, SparseLatents)
    assert fwd.selected.values.dtype == torch.float32
    if variant in ("sparsemax", "entmax"):  # mlp: scores of the unit vector
        inputs = sae.score_scale * torch.nn.functional.normalize(x - sae.b_dec, dim=1)
        bias = sae.score_scale * sae.b_enc
    else:
        inputs, bias = x - sae.b_dec, sae.b_enc
    exact = (inputs.double() @ sae.W_enc.double() + bias.double()).view(-1)[fwd.selected.flat]
    torch.testing.assert_close(fwd.selected.values.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dead", [3, D_SAE // 2])  # fewer, and more, than AuxK takes
def test_auxk_of_a_step_in_bf16_is_that_of_fp32_weights(dead: int, tmp_path: Path) -> None:
    setting = config("topk", d_sae=D_SAE, batch_size=256, input_scale="raw")
    runtime = {"device": "cpu", "precision": "bf16", "threads": 1, "checkpoint_every_s": 1e9}
    run = Run(Planted(), setting, runtime, tmp_path)
    batch = next(run.batches())
    with torch.no_grad():
        run.silent[:dead] = 10**6
        run.sae.W_enc[:, :dead] *= 0.01  # positive for some rows, among the largest of none
        weights = {name: parameter.clone() for name, parameter in run.sae.named_parameters()}
    x = batch.x
    fwd, terms = run.one_step(batch)
    exact = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    expected = auxk_loss((x - fwd.x_hat).detach(), exact, weights["W_dec"], run.dead)
    assert int(run.dead.sum()) == dead
    torch.testing.assert_close(terms["auxk"], expected / 32, rtol=1e-4, atol=0)
    assert run.sae.W_enc.grad is not None
    assert bool(run.sae.W_enc.grad[:, :dead].any())


@pytest.mark.parametrize(
    "variant", ["entmax", "gated", "jumprelu", "p_anneal", "relu", "soft_topk", "sparsemax"]
)
def test_rounded_scores_hide_no_latent_from_a_threshold(variant: str) -> None:
    sae = build(variant, D_IN, D_SAE, {**OPTIONS[variant], **CHANGES.get(variant, {})}).train()
    x = next(Planted().batches(512, 0)).x
    sae.initialise(Batch.of(x), torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        fwd = sae.run(Batch.of(x), is_sparse=True)
    assert isinstance(fwd.latents, SparseLatents)
    with torch.no_grad():
        expected = sae.activate(sae.pre_activations(x), fwd.condition)
    torch.testing.assert_close(fwd.latents.dense(), expected, rtol=1e-4, atol=2e-3)
    assert bool((fwd.latents.dense()[expected > 2e-3] > 0).all())
