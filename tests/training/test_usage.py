"""AuxK of underused latents: which ones they are, that they are trained, and that a run goes on with them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from saeflow.batch import Batch
from saeflow.config import SAEConfig
from saeflow.errors import UserError
from saeflow.operators import auxk_loss, native, sparse, zipf
from saeflow.saes import build
from saeflow.training import train
from saeflow.training.run import Run
from saeflow.training.usage import SHARE, WINDOW, Usage, underused

from .conftest import D_IN, OPTIONS, RUNTIME, Samples, config

QUIET = {**RUNTIME, "checkpoint_every_s": 1e9}
WITH_AUXK = [n for n, told in OPTIONS.items() if "auxk_weight" in told and n != "adaptive_k"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def asked(variant: str, steps: int = 300) -> SAEConfig:
    plain = config(variant, steps)
    return dataclasses.replace(plain, options={**plain.options, "auxk_latents": "underused"})


def test_the_latents_that_fall_below_the_law_of_the_others_are_underused() -> None:
    counts = (1e6 * zipf(400, 1.0, 3.0)).round().long()
    assert not underused(counts).any()
    counts[380:390] //= 5
    counts[390:] = 0
    shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    found = underused(counts[shuffled])
    assert sorted(shuffled[found].tolist()) == list(range(380, 400))
    assert not underused(torch.zeros(5, dtype=torch.int64)).any()


def test_a_latent_at_half_of_what_is_expected_is_not_underused() -> None:
    """Counts of a flat law: what is expected is their mean."""
    assert SHARE == 0.5
    counts = torch.full((1000,), 1000)
    counts[7], counts[8] = 520, 480
    assert underused(counts).nonzero().tolist() == [[8]]


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("variant", WITH_AUXK)
def test_auxk_of_underused_latents_is_that_of_dead_ones(
    variant: str, is_padded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "is_on", not is_padded)
    monkeypatch.setattr(sparse, "is_padded", is_padded)
    run = Run(Samples(), asked(variant), QUIET, tmp_path)
    run.usage.underused[::5] = True
    run.silent[3] = 10**6
    run.sae.settle_dead(run.usage.most(run.dead))
    assert run.sae.dead_room >= 8
    run.begin()
    fwd = run.sae.run(run.scaled(next(run.raw_batches())))
    found = run.judge(fwd)["auxk"]
    mask = run.usage.underused.clone()
    mask[3] = run.silent[3] > 0  # unless it fired
    acts = run.sae.pre_activations(fwd.x).detach()
    acts = acts * mask
    if run.sae.is_signed:
        keep = acts.abs().topk(D_IN // 2, dim=1).indices
        e_hat = torch.zeros_like(acts).scatter(1, keep, acts.gather(1, keep)) @ run.sae.W_dec
        residual = fwd.residual
        expected = (residual - e_hat).square().sum() / (residual - residual.mean(0)).square().sum()
    else:
        expected = auxk_loss(fwd.residual, acts, run.sae.W_dec, mask)
    assert float(found.detach()) == pytest.approx(float(expected.detach()) / 32, rel=1e-4)


def test_windows_count_every_firing_and_close_on_time(tmp_path: Path) -> None:
    run = Run(Samples(), asked("batch_topk"), QUIET, tmp_path)
    batches, counts = run.raw_batches(), np.zeros(32)
    for step in range(WINDOW):
        assert not run.usage.underused.any()
        run.begin()
        batch = run.scaled(next(batches))
        counts += (run.sae.run(batch, is_sparse=False).latents != 0).sum(0).numpy()
        run.work(batch)
        run.step = step + 1
        np.testing.assert_array_equal(run.usage.fired, counts)
    run.begin()
    assert torch.equal(run.usage.underused, underused(torch.tensor(counts).long()))
    assert not run.usage.fired.any()


def test_a_run_goes_on_from_its_checkpoint_with_the_underused_of_its_window(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        folder.mkdir()
    told = asked("batch_topk", steps=WINDOW + 60)
    expected = train(Samples(), told, QUIET, whole)

    def breaks(number: int) -> None:
        if number == WINDOW + 33:
            raise OSError("the disk is gone")

    every_step = {**QUIET, "checkpoint_every_s": 0}
    with pytest.raises(OSError, match="gone"):
        train(Samples(on_batch=breaks), told, every_step, resumed)
    assert train(Samples(), told, every_step, resumed) == expected


def test_by_default_the_dead_alone_are_trained() -> None:
    usage = Usage(build("topk", D_IN, 32, OPTIONS["topk"]))
    dead = torch.arange(32) < 5
    fwd = usage.sae.run(Batch.of(torch.ones(4, D_IN)))
    assert usage.trained_by_auxk(fwd, dead) is dead
    assert usage.state == []
    assert not usage.fired.any()


def test_a_variant_without_auxk_has_no_such_option() -> None:
    with pytest.raises(UserError, match="relu: expected the options"):
        build("relu", D_IN, 32, {**OPTIONS["relu"], "auxk_latents": "underused"})
