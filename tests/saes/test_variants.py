"""Every variant: both paths agree with plain autograd, saving keeps what it does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
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


def plain_relu(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, dead: Tensor
) -> Tensor:
    latents = F.relu((x - b_dec) @ W_enc + b_enc)
    error = (x - latents @ W_dec - b_dec).square().sum(1).mean()
    return error + 0.3 * latents.sum(1).mean()


def plain_topk_loss(
    pre_acts: Tensor, mask: Tensor, x: Tensor, W_dec: Tensor, b_dec: Tensor, dead: Tensor
) -> Tensor:
    residual = x - F.relu(pre_acts) * mask @ W_dec - b_dec
    of_dead = F.relu(pre_acts[:, dead])
    chosen = of_dead.topk(D_IN // 2, dim=1)
    rebuilt = torch.zeros_like(of_dead).scatter(1, chosen.indices, chosen.values) @ W_dec[dead]
    fixed = residual.detach()
    aux = (fixed - rebuilt).square().sum() / (fixed - fixed.mean(0)).square().sum()
    return residual.square().sum(1).mean() + aux / 32


def plain_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, dead: Tensor
) -> Tensor:
    pre_acts = (x - b_dec) @ W_enc + b_enc
    mask = torch.zeros_like(pre_acts).scatter(1, pre_acts.topk(5, dim=1).indices, 1)
    return plain_topk_loss(pre_acts, mask, x, W_dec, b_dec, dead)


def plain_batch_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, dead: Tensor
) -> Tensor:
    pre_acts = (x - b_dec) @ W_enc + b_enc
    mask = (pre_acts >= pre_acts.flatten().sort().values[-5 * BATCH]).double()
    return plain_topk_loss(pre_acts, mask, x, W_dec, b_dec, dead)


PLAIN_LOSS = {"relu": plain_relu, "topk": plain_topk, "batch_topk": plain_batch_topk}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


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
        for is_sparse in (False, True):
            sae = make(variant, x)
            fwd = sae.run(x, is_sparse=is_sparse)
            assert fwd.is_sparse == is_sparse
            losses = sae.losses(fwd, dead)
            sum(losses.values()).backward()
            found.append((fwd, losses, {n: p.grad for n, p in sae.named_parameters()}))
        (dense, *of_dense), (sparse, *of_sparse) = found
        torch.testing.assert_close(sparse.x_hat, dense.x_hat)
        assert torch.equal(sparse.l0(), dense.l0())
        assert torch.equal(sparse.fired(), dense.fired())
        assert not sparse.pre_acts.requires_grad
        torch.testing.assert_close(of_sparse, of_dense, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("is_sparse", [False, True])
    def test_gradients_are_those_of_plain_autograd(
        self, variant: str, is_sparse: bool, x: Tensor
    ) -> None:
        """Against the formulas written out below, in float64, every loss term included."""
        dead = torch.zeros(D_SAE, dtype=torch.bool)
        dead[::3] = True
        sae = make(variant, x)
        losses = sae.losses(sae.run(x, is_sparse=is_sparse), dead)
        sum(losses.values()).backward()
        plain = {n: p.detach().double().requires_grad_() for n, p in sae.named_parameters()}
        expected = PLAIN_LOSS[variant](x.double(), **plain, dead=dead)
        expected.backward()
        torch.testing.assert_close(sum(losses.values()), expected.float())
        for name, parameter in sae.named_parameters():
            torch.testing.assert_close(
                parameter.grad, plain[name].grad.float(), rtol=1e-4, atol=1e-5, msg=name
            )

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
            along = (sae.W_dec.grad * sae.W_dec.detach()).sum(1)
            assert float(along.abs().max()) < 1e-4
            optimizer.step()
            sae.project_weights()
            sae.end_step(fwd)
            errors.append(float(sum(losses.values()).detach()))
        assert errors[-1] < 0.7 * errors[0]
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))

    def test_a_trained_sae_is_the_same_on_both_paths(self, variant: str, x: Tensor) -> None:
        sae = make(variant, x)
        sae.begin_step(0, 1)
        sae.end_step(sae.run(x))
        sae.eval()
        torch.testing.assert_close(sae.run(x, is_sparse=True).x_hat, sae(x))

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
        assert loaded.decode(loaded.encode(x[None])).shape == (1, BATCH, D_IN)
        assert loaded.W_enc.t().is_contiguous()
        assert not loaded.training
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


def test_batch_topk_threshold_starts_afresh_when_k_changes(x: Tensor) -> None:
    """Also with a schedule that ends with the run, and so is never at its target."""
    schedule = {"kind": "linear", "from": 20, "until": 1.0}
    sae = build("batch_topk", D_IN, D_SAE, {**OPTIONS["batch_topk"], "k_schedule": schedule})
    sae.initialise(x, torch.Generator().manual_seed(0))
    for step in range(3):
        sae.begin_step(step, 3)
        sae.end_step(sae.run(x))
    positive = encode_by_hand(sae, x)
    assert float(sae.get_buffer("threshold")) == pytest.approx(
        np.sort(positive.ravel())[-BATCH * 10], rel=1e-4
    )


def test_relu_loss_is_error_plus_l1(x: Tensor) -> None:
    sae = make("relu", x)
    losses = sae.losses(sae.run(x), torch.zeros(D_SAE, dtype=torch.bool))
    latents = encode_by_hand(sae, x)
    x_hat = latents @ sae.W_dec.detach().numpy() + sae.b_dec.detach().numpy()
    error = ((x.numpy() - x_hat) ** 2).sum(1).mean()
    assert float(losses["reconstruction"].detach()) == pytest.approx(error, rel=1e-5)
    assert float(losses["l1"].detach()) == pytest.approx(0.3 * latents.sum(1).mean(), rel=1e-5)


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
    assert float(loss.detach()) == pytest.approx(error / spread / 32, rel=1e-4)


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
        ({"d_in": "12"}, "d_in: expected a whole number"),
        ({"d_sae": 10**12}, r"expected float32 \[1000000000000\], found float32 \[40\]"),
        ({"options": {"k": 50, "k_schedule": CONSTANT, "auxk_weight": 0}}, r"config\.json: k: "),
        ({"options": [1]}, "expected the options k, k_schedule, auxk_weight"),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("b_dec"), r"b_dec \(expected float32 \[12\], found nothing"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), r"extra \(expected nothing"),
        (lambda tensors: tensors.update(b_dec=torch.ones(12).half()), r"found float16 \[12\]"),
        (lambda tensors: tensors.update(W_enc=torch.ones(40, 12)), r"found float32 \[40, 12\]"),
    ],
)
def test_weights_of_another_sae_are_refused(
    saved: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    tensors = load_file(saved / "weights.safetensors")
    change(tensors)
    save_file(tensors, saved / "weights.safetensors")
    with pytest.raises(UserError, match=message):
        load(saved)


def test_weights_that_are_not_finite_are_refused(saved: Path, x: Tensor) -> None:
    sae = load(saved)
    with torch.no_grad():
        sae.b_dec[3] = float("nan")
    save(sae, saved, read_config(saved))
    with pytest.raises(UserError, match="b_dec is not finite"):
        load(saved)
