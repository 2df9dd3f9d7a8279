"""Every variant: both paths agree with plain autograd, saving keeps what it does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from saeflow.config import ROOT
from saeflow.errors import UserError
from saeflow.saes import SAE, VARIANTS, build, load, read_config, save

D_IN, D_SAE, BATCH = 12, 40, 32
CONSTANT = {"kind": "constant"}
OPTIONS: dict[str, dict[str, Any]] = {
    "relu": {"l1": 0.3, "l1_schedule": CONSTANT},
    "topk": {"k": 5, "k_schedule": CONSTANT, "auxk_weight": 1 / 32},
    "batch_topk": {"k": 5, "k_schedule": CONSTANT, "auxk_weight": 1 / 32},
}


@pytest.fixture
def x() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(20, D_IN, generator=generator)
    active = torch.rand(BATCH, 20, generator=generator) * (
        torch.rand(BATCH, 20, generator=generator) < 0.2
    )
    return active @ features + 0.5


def make(variant: str, x: Tensor) -> SAE:
    sae = build(variant, D_IN, D_SAE, OPTIONS[variant])
    sae.initialise(x, torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_enc.add_(0.1 * torch.randn(D_SAE, generator=torch.Generator().manual_seed(2)))
    return sae.train()


def test_the_options_of_every_variant_are_here_and_in_the_schema() -> None:
    schema = yaml.safe_load((ROOT / "workflow/schemas/params.schema.yaml").read_text())
    assert set(OPTIONS) == set(VARIANTS)
    assert set(
        schema["properties"]["saes"]["additionalProperties"]["properties"]["variant"]["enum"]
    ) == set(VARIANTS)
    for variant, options in OPTIONS.items():
        assert set(schema["$defs"][variant]["properties"]) == set(options)


@pytest.mark.parametrize("variant", VARIANTS)
class TestEveryVariant:
    def test_initialisation(self, variant: str, x: Tensor) -> None:
        sae = build(variant, D_IN, D_SAE, OPTIONS[variant])
        sae.initialise(x, torch.Generator().manual_seed(0))
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
        assert torch.equal(sae.W_enc, sae.W_dec.t())
        assert not sae.b_enc.any()
        # The geometric median is where the unit vectors to the points cancel.
        away = x - sae.b_dec
        pull = (away / away.norm(dim=1, keepdim=True)).mean(0).norm().detach()
        assert float(pull) < 1e-3

    def test_both_paths_give_equal_losses_and_gradients(self, variant: str, x: Tensor) -> None:
        dead = torch.zeros(D_SAE, dtype=torch.bool)
        dead[::3] = True
        found = []
        for is_sparse in {False, VARIANTS[variant].is_sparse}:
            sae = make(variant, x)
            fwd = sae.run(x, is_sparse=is_sparse)
            losses = sae.losses(fwd, dead)
            sum(losses.values()).backward()
            found.append((fwd, losses, {n: p.grad for n, p in sae.named_parameters()}))
        for fwd, losses, gradients in found[1:]:
            torch.testing.assert_close(fwd.x_hat, found[0][0].x_hat)
            torch.testing.assert_close(fwd.l0(), found[0][0].l0())
            assert torch.equal(fwd.fired(), found[0][0].fired())
            torch.testing.assert_close(losses, found[0][1])
            torch.testing.assert_close(gradients, found[0][2], rtol=1e-4, atol=1e-5)

    def test_training_lowers_the_loss_and_keeps_unit_rows(self, variant: str, x: Tensor) -> None:
        sae = make(variant, x)
        optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
        errors = []
        for step in range(60):
            sae.begin_step(step, 60)
            fwd = sae.run(x)
            losses = sae.losses(fwd, torch.zeros(D_SAE, dtype=torch.bool))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            sae.project_grad()
            along = (sae.W_dec.grad * sae.W_dec).sum(1)
            assert float(along.abs().max()) < 1e-4
            optimizer.step()
            sae.project_weights()
            sae.end_step(fwd)
            errors.append(float(sum(losses.values())))
        assert errors[-1] < 0.7 * errors[0]
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))

    def test_a_saved_sae_is_the_same_sae(self, variant: str, x: Tensor, tmp_path: Path) -> None:
        sae = make(variant, x)
        sae.end_step(sae.run(x))
        config = {"variant": variant, "options": OPTIONS[variant], "d_in": D_IN, "d_sae": D_SAE}
        save(sae, tmp_path, config)
        loaded = load(tmp_path)
        sae.eval()
        assert torch.equal(loaded.encode(x), sae.encode(x))
        assert torch.equal(loaded(x), sae(x))
        assert loaded.encode(x[None]).shape == (1, BATCH, D_SAE)
        assert read_config(tmp_path)["variant"] == variant

    def test_folding_the_scale_gives_the_raw_sae(self, variant: str, x: Tensor) -> None:
        scale = 8.0  # a power of two: no rounding moves a latent across its threshold
        sae = make(variant, x)
        sae.end_step(sae.run(x))
        sae.eval()
        latents, x_hat = sae.encode(x), sae(x)
        sae.fold_scale(scale)
        torch.testing.assert_close(sae.encode(scale * x), scale * latents)
        torch.testing.assert_close(sae(scale * x), scale * x_hat, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))

    @pytest.mark.parametrize("change", [{"unknown": 1}, {"missing": None}])
    def test_options_that_do_not_fit_are_refused(
        self, variant: str, change: dict[str, Any]
    ) -> None:
        options = {**OPTIONS[variant], **change}
        if "missing" in change:
            options = dict(list(OPTIONS[variant].items())[1:])
        with pytest.raises(UserError, match=variant):
            build(variant, D_IN, D_SAE, options)


@pytest.mark.parametrize("variant", ["topk", "batch_topk"])
@pytest.mark.parametrize("k", [0, D_SAE + 1, 2.5])
def test_a_k_out_of_range_is_refused(variant: str, k: float) -> None:
    with pytest.raises(UserError, match=f"1..{D_SAE}"):
        build(variant, D_IN, D_SAE, {**OPTIONS[variant], "k": k})


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(UserError, match="topq"):
        build("topq", D_IN, D_SAE, {})


def encode_by_hand(sae: SAE, x: Tensor) -> np.ndarray:
    """relu of (x - b_dec) W_enc + b_enc in float64."""
    arrays = {name: p.detach().numpy().astype(np.float64) for name, p in sae.named_parameters()}
    pre_acts = (x.numpy() - arrays["b_dec"]) @ arrays["W_enc"] + arrays["b_enc"]
    return np.maximum(pre_acts, 0)


def test_topk_keeps_the_k_largest_of_each_row(x: Tensor) -> None:
    sae = make("topk", x)
    positive = encode_by_hand(sae, x)
    for row, latents in zip(positive, sae.encode(x).detach().numpy(), strict=True):
        order = np.argsort(-row, kind="stable")[:5]
        assert set(np.flatnonzero(latents)) == {i for i in order if row[i] > 0}
        np.testing.assert_allclose(latents[order], row[order], rtol=1e-4, atol=1e-5)


def test_batch_topk_keeps_the_largest_of_the_batch_in_training(x: Tensor) -> None:
    sae = make("batch_topk", x)
    positive = encode_by_hand(sae, x)
    smallest = np.sort(positive.ravel())[-BATCH * 5]
    latents = sae.run(x, is_sparse=False).latents
    assert isinstance(latents, Tensor)
    np.testing.assert_allclose(
        latents.detach().numpy(), np.where(positive >= smallest, positive, 0), rtol=1e-4, atol=1e-5
    )


def test_batch_topk_threshold_is_the_running_mean_of_the_smallest_kept(x: Tensor) -> None:
    sae = make("batch_topk", x)
    smallest = []
    for scale in (1.0, 2.0, 0.5):
        sae.begin_step(0, 1)
        fwd = sae.run(x * scale)
        sae.end_step(fwd)
        positive = encode_by_hand(sae, x * scale)
        smallest.append(np.sort(positive.ravel())[-BATCH * 5])
    weights = 0.999 ** np.arange(3)[::-1]
    expected = np.average(smallest, weights=weights)
    assert float(sae.get_buffer("threshold")) == pytest.approx(expected, rel=1e-4)
    sae.eval()
    positive = encode_by_hand(sae, x)
    np.testing.assert_array_equal(sae.encode(x).detach().numpy() > 0, positive > expected)


def test_relu_loss_is_error_plus_l1(x: Tensor) -> None:
    sae = make("relu", x)
    losses = sae.losses(sae.run(x), torch.zeros(D_SAE, dtype=torch.bool))
    latents = encode_by_hand(sae, x)
    x_hat = latents @ sae.W_dec.detach().numpy() + sae.b_dec.detach().numpy()
    error = ((x.numpy() - x_hat) ** 2).sum(1).mean()
    assert float(losses["reconstruction"]) == pytest.approx(error, rel=1e-5)
    assert float(losses["l1"]) == pytest.approx(0.3 * latents.sum(1).mean(), rel=1e-5)


def test_auxk_rebuilds_the_residual_from_dead_latents(x: Tensor) -> None:
    sae = make("topk", x)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[10:30] = True
    fwd = sae.run(x)
    loss = sae.losses(fwd, dead)["auxk"]
    residual = (x - fwd.x_hat.detach()).numpy()
    candidates = np.where(dead.numpy(), encode_by_hand(sae, x), 0)
    chosen = np.zeros_like(candidates)
    for row, kept in zip(candidates, chosen, strict=True):
        top = np.argsort(-row, kind="stable")[: D_IN // 2]
        kept[top] = row[top]
    error = ((residual - chosen @ sae.W_dec.detach().numpy()) ** 2).sum()
    spread = ((residual - residual.mean(0)) ** 2).sum()
    assert float(loss) == pytest.approx(error / spread / 32, rel=1e-4)


def test_weights_that_are_not_trained_stay_as_they_were(x: Tensor) -> None:
    sae = make("topk", x)
    sae.W_dec.requires_grad_(False)
    before = sae.W_dec.clone()
    loss = F.mse_loss(sae.run(x).x_hat, x)
    loss.backward()
    sae.project_grad()
    sae.project_weights()
    assert torch.equal(sae.W_dec, before)
    assert sae.W_dec.grad is None
    assert float(sae.W_enc.grad.abs().sum()) > 0


@pytest.fixture
def saved(x: Tensor, tmp_path: Path) -> Path:
    config = {"variant": "topk", "options": OPTIONS["topk"], "d_in": D_IN, "d_sae": D_SAE}
    save(make("topk", x), tmp_path, config)
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_sae": 41}, "b_enc"),
        ({"variant": "batch_topk"}, "threshold"),
        ({"variant": "topq"}, "topq"),
        ({"format": "other"}, r"config\.json"),
        ({"format_version": 99}, "99"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    saved: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(saved, **changes)
    with pytest.raises(UserError, match=message):
        load(saved)


def test_damaged_weights_are_refused(saved: Path) -> None:
    path = saved / "weights.safetensors"
    whole = path.read_bytes()
    for data in (whole[:-7], whole[:5], b""):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"weights\.safetensors"):
            load(saved)
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        load(saved)


def test_weights_that_are_not_finite_are_refused(saved: Path, x: Tensor) -> None:
    sae = load(saved)
    with torch.no_grad():
        sae.b_dec[3] = float("nan")
    save(sae, saved, read_config(saved))
    with pytest.raises(UserError, match="b_dec is not finite"):
        load(saved)
