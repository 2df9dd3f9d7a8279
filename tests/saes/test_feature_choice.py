"""Feature Choice: how a budget is divided, which threshold serves in use, and how long Mutual Choice lasts."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saeflow.batch import Batch
from saeflow.errors import UserError
from saeflow.operators import zipf
from saeflow.saes import build
from saeflow.saes.feature_choice import NEVER, FeatureChoice

D_IN, D_SAE, ROWS = 8, 12, 64


def made(d_sae: int = D_SAE, **options: Any) -> FeatureChoice:
    sae = build("feature_choice", D_IN, d_sae, {"k": 3, "threshold_start_step": 0, **options})
    sae.initialise(batch(0).x, torch.Generator().manual_seed(0))
    assert isinstance(sae, FeatureChoice)
    return sae.train()


def batch(seed: int, rows: int = ROWS) -> Batch:
    return Batch.of(torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(seed)))


def counts_of(sae: FeatureChoice, x: Batch) -> Tensor:
    return (sae.run(x, is_sparse=False).latents != 0).sum(0)


def test_mutual_choice_comes_first_and_decides_the_ranks() -> None:
    sae = made(mutual_fraction=0.5, zipf_exponent=1.0, zipf_shift=0.5)
    fired = torch.zeros(D_SAE)
    for step in range(10):
        sae.begin_step(step, 20)
        fwd = sae.run(batch(step))
        assert int(fwd.l0().sum()) == 3 * ROWS  # the largest of the batch, whose ever they are
        fired += fwd.latents.count() if step >= 5 else 0
        sae.end_step(fwd)
    assert torch.equal(sae.fired, fired)
    sae.begin_step(10, 20)
    order = fired.argsort(descending=True, stable=True)
    law = zipf(D_SAE, 1.0, 0.5)
    np.testing.assert_allclose(sae.shares[order], law / law[0], rtol=1e-6)
    allotted = sae.allotted(ROWS)
    assert int(allotted.sum()) == 3 * ROWS
    assert (allotted[order].diff() <= 0).all()
    assert (counts_of(sae, batch(10)) <= allotted).all()


def test_a_uniform_allocation_needs_no_ranks() -> None:
    sae = made(allocation="uniform", mutual_fraction=0)
    sae.begin_step(0, 20)
    assert sae.allotted(ROWS).tolist() == [3 * ROWS // D_SAE] * D_SAE


@pytest.mark.parametrize("is_sparse", [False, True])
def test_a_latent_takes_the_rows_on_which_it_is_largest(is_sparse: bool) -> None:
    sae = made(allocation="uniform", mutual_fraction=0)
    sae.begin_step(0, 20)
    x = batch(3)
    latents = sae.run(x, is_sparse=is_sparse).latents
    latents = latents if isinstance(latents, Tensor) else latents.dense()
    pre_acts = sae.pre_activations(x.x).detach()
    for i in range(D_SAE):
        best = pre_acts[:, i].argsort(descending=True)[: 3 * ROWS // D_SAE]
        expected = torch.zeros(ROWS)
        expected[best] = pre_acts[best, i].relu()
        torch.testing.assert_close(latents[:, i].detach(), expected)


def test_a_latent_that_is_given_no_row_is_silent_in_use_too() -> None:
    sae = made(d_sae=100, k=1, mutual_fraction=0.1)  # 64 entries for 100 latents
    sae.shares.copy_(torch.arange(100, 0, -1))
    sae.begin_step(5, 20)
    allotted = sae.allotted(ROWS)
    assert (allotted == 0).any()
    for step in range(5, 8):
        fwd = sae.run(batch(step))
        assert not fwd.fired()[allotted == 0].any()
        sae.end_step(fwd)
    assert (sae.threshold[allotted == 0] == NEVER).all()
    sae.fold_scale(1e8)
    assert sae.threshold.isfinite().all()
    sae.eval()
    assert not (sae.encode(100 * batch(50, 1000).x)[:, allotted == 0] != 0).any()


def test_a_latent_that_is_given_more_rows_than_it_is_positive_on_takes_all_of_these() -> None:
    sae = made(allocation="uniform", mutual_fraction=0, k=D_SAE)
    with torch.no_grad():
        sae.b_enc.sub_(0.3)
    sae.begin_step(0, 20)
    x = batch(4)
    fwd = sae.run(x)
    assert torch.equal(fwd.latents.dense() > 0, sae.pre_activations(x.x) > 0)
    sae.end_step(fwd)
    assert (sae.threshold == 0).all()


@pytest.mark.parametrize("k", [0.25, 1.0, 3.0])
def test_in_use_a_latent_is_active_as_often_as_in_training(k: float) -> None:
    """For 0.25 each latent takes 1 or 2 rows, where the least that it takes would let through two thirds of k."""
    sae = made(allocation="uniform", mutual_fraction=0, k=4, k_schedule={"kind": "constant"})
    sae.schedule = lambda step, total: k
    for step in range(400):
        sae.begin_step(step, 400)
        sae.end_step(sae.run(batch(step)))
    sae.eval()
    rate = (sae.encode(batch(9999, 100_000).x) > 0).double().mean(0)
    assert float(rate.sum()) == pytest.approx(k, rel=0.05)
    np.testing.assert_allclose(rate, sae.allotted(ROWS) / ROWS, rtol=0.15)


def test_thresholds_start_afresh_after_mutual_choice_and_at_their_step() -> None:
    sae = made(mutual_fraction=0.5, threshold_start_step=15)
    for step in range(20):
        sae.begin_step(step, 20)
        weight = float(sae.threshold_weight)
        assert (weight == 0) == (step <= 10 or step == 15)
        sae.end_step(sae.run(batch(step)))


def test_ranks_of_random_weights_are_refused() -> None:
    with pytest.raises(
        UserError, match="mutual_fraction: expected a number above 0 where allocation is zipf"
    ):
        made(mutual_fraction=0)
