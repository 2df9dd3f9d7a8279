"""The trainer: its updates, schedules, checkpoints, and what a kill leaves."""

import csv
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import r2_score
from torch import Tensor

from saeflow.batch import Batch
from saeflow.errors import UserError
from saeflow.files import file_digest
from saeflow.operators import native, sparse
from saeflow.saes import VARIANTS, Forward, build, load, read_config
from saeflow.saes.input_scale import KINDS
from saeflow.saes.topk import TopK
from saeflow.training import train
from saeflow.training.checkpoints import checkpoints, read_checkpoint, write_checkpoint
from saeflow.training.optimizer import Optimizer
from saeflow.training.rates import lr_factor, peak_lr
from saeflow.training.run import Run
from saeflow.training.steps import write_steps
from saeflow.training.trainer import advance

from .conftest import D_IN, OPTIONS, RUNTIME, Samples, config

QUIET = {**RUNTIME, "checkpoint_every_s": 1e9}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "steps.csv").open() as file:
        return [
            {k: v for k, v in row.items() if k != "tokens_per_s"} for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_finds_the_features(variant: str, tmp_path: Path) -> None:
    store = Samples()
    steps = 1200 if variant == "soft_topk" else 800  # its k settles first
    train(store, config(variant, steps=steps), QUIET, tmp_path)
    sae = load(tmp_path)
    directions = sae.directions().detach()
    cosines = (store.features @ directions.T / directions.norm(dim=1)).numpy()
    cosines = np.abs(cosines) if sae.is_signed else cosines
    matched = cosines[linear_sum_assignment(-cosines)].mean()
    if (
        variant != "top_afa"
    ):  # it takes a dozen latents where three are right: it follows the norm, whatever is there
        assert matched > 0.9
    x = store.batch(512, 10_000_000)
    error = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert float(error.detach()) < 0.2


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_logged_fvu_is_that_of_the_batch_before_its_update(
    variant: str, tmp_path: Path
) -> None:
    setting = config(variant, steps=4, log_every_steps=1)
    runs = [Run(Samples(), setting, QUIET, tmp_path / name) for name in ("a", "b")]
    raw, batch = next(runs[0].raw_batches()), next(runs[0].batches())
    runs[0].begin()
    x_hat = runs[0].sae.run(batch).x_hat.detach()
    runs[1].take(raw, 0.0)
    explained = r2_score(batch.x, x_hat, multioutput="variance_weighted")
    assert runs[1].rows[0]["batch_fvu"] == pytest.approx(1 - explained, rel=1e-4)
    assert runs[1].rows[0]["batch_fvu"] > 0.01


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_is_adam_on_the_projected_clipped_gradient(variant: str, tmp_path: Path) -> None:
    """Two steps against a plain float64 Adam written out here, on the dense path."""
    store, setting = (
        Samples(scale=1.0),
        config(variant, steps=20, grad_clip=0.05, lr_warmup_steps=4),
    )
    run = Run(store, setting, QUIET, tmp_path)
    plain = build(variant, D_IN, 32, OPTIONS[variant]).double()
    plain.load_state_dict(run.sae.state_dict())
    b1, b2 = plain.betas or (0.9, 0.999)
    moments = {name: (0.0, 0.0) for name, _ in plain.named_parameters()}
    for step in range(2):
        x = store.batch(128, step)
        run.one_step(Batch.of(x))
        run.step += 1
        plain.begin_step(step, 20)
        plain.zero_grad()
        losses = plain.losses(
            plain.run(Batch.of(x.double()), is_sparse=False), torch.zeros(32, dtype=torch.bool)
        )
        sum(losses.values()).backward()
        gradients = {
            name: p.grad.numpy().copy()
            for name, p in plain.named_parameters()
            if p.grad is not None
        }
        if plain.has_unit_norm:
            W = plain.W_dec.detach().numpy()
            gradients["W_dec"] -= (gradients["W_dec"] * W).sum(1, keepdims=True) * W
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        assert norm > 0.05
        lr = 3e-3 * (step + 1) / 4
        with torch.no_grad():
            for name, p in plain.named_parameters():
                if name not in gradients:
                    continue
                g = gradients[name] * 0.05 / norm
                first = b1 * moments[name][0] + (1 - b1) * g
                second = b2 * moments[name][1] + (1 - b2) * g**2
                moments[name] = first, second
                unbiased = first / (1 - b1 ** (step + 1)), second / (1 - b2 ** (step + 1))
                p -= torch.as_tensor(lr * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8))
            if plain.has_unit_norm:
                plain.W_dec /= plain.W_dec.norm(dim=1, keepdim=True)
        plain.end_step(plain.run(Batch.of(x.double())))
    for name, p in plain.named_parameters():
        found = dict(run.sae.named_parameters())[name]
        np.testing.assert_allclose(found.detach().numpy(), p.detach().numpy(), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_saved_sae_does_to_raw_rows_what_training_did_to_scaled_ones(
    variant: str, kind: str, tmp_path: Path
) -> None:
    store = Samples(scale=7.0)
    run = Run(store, config(variant, steps=12, input_scale=kind), QUIET, tmp_path)
    advance([run])
    x, trained = store.batch(256, 10_000_000), run.sae.eval()
    rms = store.scale * D_IN**0.5
    shift = store.mean.float() if kind == "centred" else torch.zeros(D_IN)
    scale = {"raw": 1.0, "dimension": store.scale}.get(kind, rms)
    latents, x_hat = trained.encode((x - shift) / scale), trained((x - shift) / scale)
    run.finish()
    saved = load(tmp_path)
    same = torch.isclose(saved.encode(x), scale * latents, rtol=1e-3, atol=1e-4 * scale)
    assert (
        float(same.all(1).double().mean()) > 0.98
    )  # rounding may move a latent across a threshold
    torch.testing.assert_close(
        saved(x)[same.all(1)], (scale * x_hat + shift)[same.all(1)], rtol=1e-3, atol=1e-3 * scale
    )
    assert read_config(tmp_path)["training"]["input_scale"] == kind


@pytest.mark.parametrize("variant", ["sparsemax", "entmax"])
def test_a_shift_that_no_bias_can_give_back_is_refused(variant: str, tmp_path: Path) -> None:
    setting = config(variant, input_scale="centred")
    shared = dataclasses.replace(setting, options={**setting.options, "architecture": "shared"})
    with pytest.raises(UserError, match=rf"saes.{variant}.input_scale: .*no b_dec"):
        Run(Samples(), shared, QUIET, tmp_path)


def test_learning_rate_warms_up_and_decays() -> None:
    setting = config("topk", steps=100, lr_warmup_steps=10, lr_decay_fraction=0.2).training
    factors = [lr_factor(step, 100, setting) for step in (0, 4, 9, 50, 80, 90, 99)]
    assert factors == pytest.approx([0.1, 0.5, 1, 1, 1, 0.5, 0.05])
    assert lr_factor(0, 100, config("topk", lr_warmup_steps=0, lr_decay_fraction=0).training) == 1


def test_automatic_learning_rate_falls_with_the_width() -> None:
    assert peak_lr(config("topk", lr="auto")) == pytest.approx(2e-4 * np.sqrt(2**14 / 32))


def test_steps_say_what_the_schedule_did(tmp_path: Path) -> None:
    train(Samples(), config("topk", steps=100, log_every_steps=10), QUIET, tmp_path)
    found = rows(tmp_path)
    assert [int(row["step"]) for row in found] == list(range(10, 101, 10))
    assert [int(row["k"]) for row in found] == [
        round(12 - 9 * s / 30) if s < 30 else 3 for s in range(9, 100, 10)
    ]
    assert int(found[-1]["tokens_seen"]) == 12800
    for row in found:
        assert float(row["loss"]) == pytest.approx(
            float(row["reconstruction"]) + float(row["auxk"]), rel=1e-5
        )
        assert float(row["l0"]) <= int(row["k"])


def test_a_frozen_decoder_stays_random(tmp_path: Path) -> None:
    setting = config("topk", steps=30, train_decoder=False)
    before = Run(Samples(), setting, QUIET, tmp_path).sae.W_dec.detach().clone()
    train(Samples(), setting, QUIET, tmp_path)
    assert torch.equal(load(tmp_path).W_dec, before)


def test_dead_latents_are_counted_in_tokens(tmp_path: Path) -> None:
    run = Run(Samples(), config("topk", dead_after_tokens=256), QUIET, tmp_path)
    with torch.no_grad():
        run.sae.b_enc[7] = -100.0
        run.sae.W_enc[:, 7] = 0
    for step in range(3):
        run.one_step(next(run.batches(step)))
        run.step += 1
        assert int(run.silent[7]) == 128 * (step + 1)
    assert bool((run.silent[:7] % 128 == 0).all())
    assert int((run.silent == 0).sum()) > 20


def test_a_latent_that_fires_in_a_batch_is_alive_in_it(tmp_path: Path) -> None:
    run = Run(Samples(), config("topk", dead_after_tokens=256), QUIET, tmp_path)
    with torch.no_grad():
        run.sae.b_enc[:8] = -100.0
    run.silent += 10_000
    seen: list[Tensor] = []
    losses = run.sae.losses
    run.sae.losses = lambda fwd, dead: seen.append(dead) or losses(fwd, dead)
    fwd, _ = run.one_step(next(run.batches()))
    assert torch.equal(seen[0], ~fwd.fired())
    assert bool(seen[0][:8].all())
    assert not bool(seen[0].all())


def test_without_a_clip_the_whole_gradient_counts(tmp_path: Path) -> None:
    """Adam's first moment is 0.1 of the gradient, whatever its norm."""
    store = Samples(scale=1.0)
    clipped, free = (
        Run(store, config("relu", grad_clip=clip), QUIET, tmp_path) for clip in (0.01, None)
    )
    norms = []
    for run in (clipped, free):
        run.one_step(next(run.batches()))
        moments = [run.optimizer.state[p]["exp_avg"] for p in run.sae.parameters()]
        norms.append(float(torch.cat([10 * part.flatten() for part in moments]).norm()))
    assert norms[0] == pytest.approx(0.01, rel=1e-3)
    assert norms[1] > 0.1


@pytest.mark.parametrize("update", ["native", "torch", "as on a GPU"])
def test_what_is_set_apart_has_a_clip_and_a_rate_of_its_own(
    update: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam's first moment is 0.1 of the clipped gradient, of b_dec and of the rest."""
    if update != "native":
        monkeypatch.setattr(native, "serves", lambda *arrays: False)
    if update == "as on a GPU":
        monkeypatch.setattr(sparse, "is_padded", True)
    setting = config("relu", steps=20, grad_clip=0.01, lr_warmup_steps=4, lr_decay_fraction=0)
    run = Run(Samples(scale=1.0), setting, QUIET, tmp_path)
    run.sae.apart = ("b_dec",)
    run.sae.apart_from = lambda total: 2
    run.optimizer = Optimizer(run.sae, setting.training)
    before = run.sae.b_dec.detach().clone()
    run.one_step(next(run.batches()))
    together, apart = run.optimizer.param_groups
    moments = {
        name: 10 * run.optimizer.state[p]["exp_avg"].flatten()
        for name, p in run.sae.named_parameters()
    }
    assert float(moments.pop("b_dec").norm()) == pytest.approx(0.01, rel=1e-3)
    assert float(torch.cat(list(moments.values())).norm()) == pytest.approx(0.01, rel=1e-3)
    assert torch.equal(run.sae.b_dec, before)  # its rate is 0 before step 2
    rates = []
    for step in range(1, 8):
        run.step = step
        run.set_lr()
        rates.append((together["lr"] / 3e-3, apart["lr"] / 3e-3))
    expected = [(0.5, 0), (0.75, 0.25), (1, 0.5), (1, 0.75), (1, 1), (1, 1), (1, 1)]
    assert rates == [pytest.approx(pair) for pair in expected]


EVERY_STEP = {**RUNTIME, "checkpoint_every_s": -1.0}


def broken_from(number: int) -> Callable[[int], None]:
    """Something that fails when a batch is asked for."""

    def fail(asked: int) -> None:
        if asked == number:
            raise OSError("the disk is gone")

    return fail


class NotFinite(Samples):
    """One value of batch 25 is infinite."""

    def batch(self, batch_size: int, number: int) -> Tensor:
        x = super().batch(batch_size, number)
        if number == 25:
            x[3, 2] = float("inf")
        return x


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_that_is_not_finite_names_step_batch_and_checkpoint(
    variant: str, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError,
        match=r"not finite at step 25 \(batch 25 .*; the batch is .*checkpoint-000000025-",
    ):
        train(NotFinite(), config(variant), EVERY_STEP, tmp_path)
    assert not (tmp_path / "weights.safetensors").exists()


class Steep(TopK):
    """From step 7 on, a loss that is finite with a gradient that is not."""

    def losses(self, fwd: Forward, dead: Tensor) -> dict[str, Tensor]:
        steep = (fwd.x_hat * 0).sum().abs().sqrt() if self.is_steep else fwd.x_hat.sum() * 0
        return super().losses(fwd, dead) | {"steep": steep}

    def begin_step(self, step: int, total: int) -> None:
        super().begin_step(step, total)
        self.is_steep = step >= 7


def test_weights_never_see_a_gradient_that_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VARIANTS, "topk", Steep)
    with pytest.raises(
        UserError, match=r"step 7 .*steep 0, gradient norm nan.*checkpoint-000000007"
    ):
        train(Samples(), config("topk"), EVERY_STEP, tmp_path)
    tensors, facts = read_checkpoint(checkpoints(tmp_path)[-1])
    assert facts["step"] == 7
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


@pytest.mark.parametrize("lr", [1e18, 1e30])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_enormous_learning_rate_is_stopped_not_saved(
    variant: str, lr: float, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="not finite at step"):
        train(Samples(), config(variant, lr=lr, lr_warmup_steps=0), QUIET, tmp_path)
    assert not (tmp_path / "weights.safetensors").exists()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupted_twice_it_ends_with_the_same_bits(
    variant: str, threads: int, tmp_path: Path
) -> None:
    torch.set_num_threads(threads)
    setting = config(variant, steps=40, d_sae=640, dead_after_tokens=500)
    expected = train(Samples(), setting, QUIET, make(tmp_path / "undisturbed"))
    folder = make(tmp_path / "interrupted")
    for number in (7, 29):
        with pytest.raises(OSError, match="the disk is gone"):
            train(Samples(on_batch=broken_from(number)), setting, EVERY_STEP, folder)
        [left] = checkpoints(folder)
        assert read_checkpoint(left)[1]["step"] == number
    assert [int(row["step"]) for row in rows(folder)] == [10, 20]  # steps.csv can be watched
    assert train(Samples(), setting, QUIET, folder) == expected
    assert rows(folder) == rows(tmp_path / "undisturbed")


def start(variant: str, folder: Path) -> "subprocess.Popen[bytes]":
    folder.mkdir(exist_ok=True)
    script = Path(__file__).parent / "kill_me.py"
    return subprocess.Popen(
        [sys.executable, str(script), variant, str(folder)], stderr=subprocess.DEVNULL
    )


def wait_for_new_checkpoint(
    process: "subprocess.Popen[bytes]", folder: Path, seen: set[Path]
) -> set[Path]:
    end = time.monotonic() + 60
    while not (new := set(checkpoints(folder)) - seen):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)
    return new | seen


def test_killed_twice_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    seen: set[Path] = set()
    for _ in range(2):
        process = start("batch_topk", folder)
        seen = wait_for_new_checkpoint(process, folder, seen)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    (folder / ".checkpoint.safetensors.77.partial").write_bytes(b"half")
    found = train(Samples(), config("batch_topk"), QUIET, folder)
    expected = train(Samples(), config("batch_topk"), QUIET, make(tmp_path / "undisturbed"))
    assert found == expected
    assert rows(folder) == rows(tmp_path / "undisturbed")
    names = {path.name for path in folder.iterdir()}
    assert names == {"weights.safetensors", "config.json", "steps.csv"}


def test_sigterm_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    process = start("topk", tmp_path / "run")
    wait_for_new_checkpoint(process, tmp_path / "run", set())
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    [left] = checkpoints(tmp_path / "run")
    assert 0 < read_checkpoint(left)[1]["step"] < 300
    found = train(Samples(), config("topk"), QUIET, tmp_path / "run")
    assert found == train(Samples(), config("topk"), QUIET, make(tmp_path / "undisturbed"))


def test_ctrl_c_ends_after_the_step_with_a_checkpoint(tmp_path: Path) -> None:
    def press(number: int) -> None:
        if number == 12:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        train(Samples(on_batch=press), config("topk"), QUIET, tmp_path)
    assert stopped.value.code == 128 + signal.SIGINT
    [left] = checkpoints(tmp_path)
    assert read_checkpoint(left)[1]["step"] == 13
    assert signal.getsignal(signal.SIGINT) is before


def test_training_works_on_a_thread_that_cannot_be_told_of_signals(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        digests = pool.submit(train, Samples(), config("relu", steps=3), QUIET, tmp_path).result()
    assert digests["weights"] == file_digest(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("change", [{"lr": 1e-3}, {"steps": 301}, {"input_scale": "unit"}])
def test_a_checkpoint_of_another_run_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk"):
        train(Samples(on_batch=broken_from(3)), config("topk"), EVERY_STEP, tmp_path)
    with pytest.raises(UserError, match="another run"):
        train(Samples(), config("topk", **change), QUIET, tmp_path)
    with pytest.raises(UserError, match="another run"):
        train(Samples(scale=2.0), config("topk"), QUIET, tmp_path)


def test_steps_of_different_phases_share_a_table(tmp_path: Path) -> None:
    write_steps(tmp_path / "steps.csv", [{"step": 1, "l0": 2.5}, {"step": 2, "budget": 0.5}])
    assert (tmp_path / "steps.csv").read_text() == "step,l0,budget\n1,2.5,\n2,,0.5\n"


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("at", [0, 0.3, 0.99])
def test_a_damaged_checkpoint_is_named(at: float, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 7, {"a": torch.arange(50.0)}, {"run": "a"})
    tensors, facts = read_checkpoint(path)
    assert torch.equal(tensors["a"], torch.arange(50.0))
    assert facts == {"step": 7, "run": "a"}
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=path.name):
        read_checkpoint(path)
    with pytest.raises(UserError, match=path.name):
        train(Samples(), config("topk"), QUIET, tmp_path)


def test_only_the_latest_checkpoint_is_kept(tmp_path: Path) -> None:
    for step in (1, 20, 3000):
        write_checkpoint(tmp_path, step, {"a": torch.ones(2)}, {})
    assert [read_checkpoint(path)[1]["step"] for path in checkpoints(tmp_path)] == [3000]


def test_bf16_products_stay_near_fp32(tmp_path: Path) -> None:
    errors = {}
    x = Samples().batch(512, 10_000_000)
    for precision in ("fp32", "bf16"):
        train(
            Samples(),
            config("topk", steps=300),
            {**QUIET, "precision": precision},
            make(tmp_path / precision),
        )
        sae = load(tmp_path / precision)
        assert sae.W_dec.dtype == torch.float32
        errors[precision] = float(((x - sae(x)).square().sum() / x.square().sum()).detach())
    assert errors["bf16"] == pytest.approx(errors["fp32"], rel=0.25)
