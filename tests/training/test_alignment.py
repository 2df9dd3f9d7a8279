"""Aligned training: encoder and decoder directions keep the inner product 1, on every path and in what is saved."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saeflow.config import SAEConfig
from saeflow.errors import UserError
from saeflow.exchange import plain_of, sae_of, saelens
from saeflow.operators import native, sparse
from saeflow.saes import SAE, build, load
from saeflow.training import train
from saeflow.training.run import Run

from .conftest import D_IN, OPTIONS, RUNTIME, Samples, config
from .test_targets import Pairs

QUIET = {**RUNTIME, "checkpoint_every_s": 1e9}
REFUSED = ("entmax", "matching_pursuit", "sparsemax")
TAKEN = [name for name in OPTIONS if name not in (*REFUSED, "adaptive_k")]
PATHS = {"native": (True, False), "torch": (False, False), "gpu": (False, True)}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    is_native, is_padded = PATHS[request.param]
    monkeypatch.setattr(native, "is_on", is_native)
    monkeypatch.setattr(sparse, "is_padded", is_padded)
    return str(request.param)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def aligned(variant: str, steps: int = 60, **changes: Any) -> SAEConfig:
    plain = config(variant, steps, **changes)
    return dataclasses.replace(plain, options={**plain.options, "aligned": True})


def products(sae: SAE) -> Tensor:
    return (sae.W_enc.detach().T.double() * sae.W_dec.detach().double()).sum(1)


def assert_aligned(sae: SAE) -> None:
    torch.testing.assert_close(
        products(sae), torch.ones(sae.d_sae, dtype=torch.float64), rtol=0, atol=1e-6
    )


def nearest(reader: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Minimise |r - reader|^2 subject to r . row = 1, by the linear system of its Lagrangian."""
    d = len(row)
    system = np.block([[np.eye(d), row[:, None]], [row[None], np.zeros((1, 1))]])
    return np.linalg.solve(system, np.append(reader, 1.0))[:d]


def test_an_update_is_adams_followed_by_the_nearest_aligned_weights(
    path: str, tmp_path: Path
) -> None:
    run = Run(Samples(), aligned("relu", lr=1e-2, lr_warmup_steps=0), QUIET, tmp_path)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # aligned, but not each other's transpose
        run.sae.W_enc.add_(0.3 * torch.randn(run.sae.W_enc.shape, generator=generator))
        run.optimizer.alignment.project()
    assert_aligned(run.sae)
    leaves = {n: p.detach().double().requires_grad_() for n, p in run.sae.named_parameters()}
    twin = copy.deepcopy(run.sae)
    run.begin()
    twin.begin_step(0, run.total)
    batch = run.scaled(next(run.raw_batches()))
    sum(twin.losses(twin.run(batch, is_sparse=False), run.dead).values()).backward()
    for name, parameter in twin.named_parameters():
        leaves[name].grad = parameter.grad.double()
    rows = leaves["W_dec"].detach()
    for gradient in (leaves["W_enc"].grad.T, leaves["W_dec"].grad):
        for i, row in enumerate(rows):
            gradient[i] -= (gradient[i] @ row) * row / (row @ row)
    total = torch.stack([p.grad.square().sum() for p in leaves.values()]).sum().sqrt()
    for parameter in leaves.values():
        parameter.grad *= min(1.0, 1.0 / (float(total) + 1e-6))
    rate = run.optimizer.param_groups[0]["lr"]
    torch.optim.Adam(leaves.values(), lr=rate, betas=(0.9, 0.999)).step()
    run.work(batch)
    expected_rows = leaves["W_dec"].detach().numpy()
    expected_rows /= np.linalg.norm(expected_rows, axis=1, keepdims=True)
    readers = leaves["W_enc"].detach().numpy().T
    expected = np.stack([nearest(*pair) for pair in zip(readers, expected_rows, strict=True)])
    np.testing.assert_allclose(run.sae.W_dec.detach(), expected_rows, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(run.sae.W_enc.detach().T, expected, rtol=1e-5, atol=5e-6)
    assert_aligned(run.sae)


@pytest.mark.parametrize("variant", TAKEN)
def test_every_variant_is_aligned_from_its_first_weights_on(variant: str, tmp_path: Path) -> None:
    run = Run(Samples(), aligned(variant, lr=1e-2, lr_warmup_steps=0), QUIET, tmp_path)
    assert_aligned(run.sae)
    batches = run.raw_batches()
    before = run.sae.W_enc.detach().clone()
    for _ in range(3):
        run.take(next(batches), 0.0)
        assert_aligned(run.sae)
    assert not torch.equal(run.sae.W_enc, before)


@pytest.mark.parametrize("initialisation", ["kaiming", "short"])
def test_first_weights_of_other_lengths_are_aligned(initialisation: str, tmp_path: Path) -> None:
    plain = aligned("relu")
    told = dataclasses.replace(plain, options={**plain.options, "initialisation": initialisation})
    assert_aligned(Run(Samples(), told, QUIET, tmp_path).sae)


def test_a_step_that_is_skipped_moves_nothing(path: str, tmp_path: Path) -> None:
    run = Run(Samples(), aligned("relu"), QUIET, tmp_path)
    with torch.no_grad():
        run.sae.W_enc.add_(0.1)
    run.begin()
    batch = run.scaled(next(run.raw_batches()))
    run.judge(run.sae.run(batch))["loss"].backward()
    before = run.sae.W_enc.detach().clone()
    run.optimizer.update(run.optimizer.measure(), torch.tensor(True))
    assert torch.equal(run.sae.W_enc, before)


@pytest.mark.parametrize("scale", ["unit", "dimension", "raw", "centred"])
def test_what_is_saved_loaded_and_exported_is_aligned(
    scale: str, path: str, tmp_path: Path
) -> None:
    folder = tmp_path / "sae"
    folder.mkdir()
    train(Samples(), aligned("batch_topk", steps=20, input_scale=scale), QUIET, folder)
    sae = load(folder)
    assert sae.aligned
    assert_aligned(sae)
    if scale == "unit" and path == "native":
        (there := tmp_path / "there").mkdir()
        saelens.write(plain_of(sae), there, {})
        assert_aligned(sae_of(saelens.read(there))[2])


def test_a_frozen_decoder_keeps_its_rows(tmp_path: Path) -> None:
    run = Run(Samples(), aligned("topk", train_decoder=False), QUIET, tmp_path)
    rows = run.sae.W_dec.detach().clone()
    batches = run.raw_batches()
    for _ in range(3):
        run.take(next(batches), 0.0)
    assert torch.equal(run.sae.W_dec, rows)
    assert_aligned(run.sae)


def test_the_copy_that_bfloat16_products_read_is_aligned_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "is_on", False)
    monkeypatch.setattr(sparse, "is_padded", True)
    runtime = {**QUIET, "precision": "bf16"}
    run = Run(Samples(), aligned("topk"), runtime, tmp_path)
    batches = run.raw_batches()
    for _ in range(2):
        run.take(next(batches), 0.0)
    held = run.sae.W_enc.bfloat16_copy
    assert held.version == run.sae.W_enc._version
    assert torch.equal(held.copy, run.sae.W_enc.detach().bfloat16())


@pytest.mark.parametrize("variant", REFUSED)
def test_variants_without_an_encoder_direction_of_each_latent_refuse(variant: str) -> None:
    with pytest.raises(
        UserError, match=rf"{variant}: aligned: expected false, since .*, found true\.$"
    ):
        build(variant, D_IN, 32, {**OPTIONS[variant], "aligned": True})


def test_targets_that_are_not_the_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"saes\.topk\.options\.aligned: expected false where targets"
    ):
        Run(Pairs(D_IN), aligned("topk"), QUIET, tmp_path)
