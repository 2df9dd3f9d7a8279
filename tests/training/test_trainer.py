"""The trainer: its updates, schedules, checkpoints, and what a kill leaves."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from saeflow.errors import UserError
from saeflow.saes import VARIANTS, build, load
from saeflow.training import train
from saeflow.training.checkpoints import checkpoints, read_checkpoint, write_checkpoint
from saeflow.training.trainer import Run, lr_factor, peak_lr

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
    train(store, config(variant, steps=800), QUIET, tmp_path)
    sae = load(tmp_path)
    cosines = store.features @ sae.W_dec.detach().T
    cosines = (cosines / sae.W_dec.detach().norm(dim=1)).numpy()
    matched = cosines[linear_sum_assignment(-cosines)].mean()
    assert matched > 0.9
    x = store.batch(512, 10_000_000)
    error = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert float(error) < 0.2


def test_a_step_is_adam_on_the_projected_clipped_gradient(tmp_path: Path) -> None:
    """Two steps against a plain float64 Adam written out here, on the dense path."""
    store, setting = Samples(scale=1.0), config("topk", steps=20, grad_clip=0.05, lr_warmup_steps=4)
    run = Run(store, setting, QUIET, tmp_path)
    plain = build("topk", D_IN, 32, OPTIONS["topk"]).double()
    plain.load_state_dict(run.sae.state_dict())
    moments = {name: (0.0, 0.0) for name, _ in plain.named_parameters()}
    for step in range(2):
        x = store.batch(128, step)
        run.one_step(x)
        run.step += 1
        plain.begin_step(step, 20)
        plain.zero_grad()
        losses = plain.losses(
            plain.run(x.double(), is_sparse=False), torch.zeros(32, dtype=torch.bool)
        )
        sum(losses.values()).backward()
        gradients = {name: p.grad.numpy().copy() for name, p in plain.named_parameters()}
        W = plain.W_dec.detach().numpy()
        gradients["W_dec"] -= (gradients["W_dec"] * W).sum(1, keepdims=True) * W
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        assert norm > 0.05
        lr = 3e-3 * (step + 1) / 4
        with torch.no_grad():
            for name, p in plain.named_parameters():
                g = gradients[name] * 0.05 / norm
                first = 0.9 * moments[name][0] + 0.1 * g
                second = 0.999 * moments[name][1] + 0.001 * g**2
                moments[name] = first, second
                unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
                p -= torch.as_tensor(lr * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8))
            plain.W_dec /= plain.W_dec.norm(dim=1, keepdim=True)
    for name, p in plain.named_parameters():
        found = dict(run.sae.named_parameters())[name]
        np.testing.assert_allclose(found.detach().numpy(), p.detach().numpy(), rtol=1e-3, atol=2e-5)


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
        run.one_step(run.scaled(run.store.batch(128, step)))  # type: ignore[attr-defined]
        run.step += 1
        assert int(run.silent[7]) == 128 * (step + 1)
    assert bool((run.silent[:7] % 128 == 0).all())
    assert int((run.silent == 0).sum()) > 20


def test_a_loss_that_is_not_finite_names_step_batch_and_checkpoint(tmp_path: Path) -> None:
    store = Samples(bad_batch=25)
    with pytest.raises(
        UserError, match=r"not finite at step 25 \(batch 25 .*checkpoint-0000000\d\d-"
    ):
        train(store, config("topk"), {**RUNTIME, "checkpoint_every_s": 0.0}, tmp_path)
    assert not (tmp_path / "weights.safetensors").exists()


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_twice_it_ends_with_the_same_weights(variant: str, tmp_path: Path) -> None:
    expected = train(Samples(), config(variant), QUIET, make(tmp_path / "undisturbed"))
    seen: set[Path] = set()
    for _ in range(2):
        process = start(variant, tmp_path / "killed")
        seen = wait_for_new_checkpoint(process, tmp_path / "killed", seen)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert start(variant, tmp_path / "killed").wait() == 0
    found = train_digests(tmp_path / "killed")
    assert found == expected["weights"]
    assert rows(tmp_path / "killed") == rows(tmp_path / "undisturbed")
    assert not checkpoints(tmp_path / "killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_to_go_on_from(number: signal.Signals, tmp_path: Path) -> None:
    process = start("topk", tmp_path / "run")
    wait_for_new_checkpoint(process, tmp_path / "run", set())
    time.sleep(0.1)
    os.kill(process.pid, number)
    assert process.wait(30) == 128 + number
    [left] = checkpoints(tmp_path / "run")
    _, counters = read_checkpoint(left)
    assert 0 < counters["step"] < 300
    assert start("topk", tmp_path / "run").wait() == 0
    expected = train(Samples(), config("topk"), QUIET, make(tmp_path / "undisturbed"))
    assert train_digests(tmp_path / "run") == expected["weights"]


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def train_digests(folder: Path) -> str:
    from hashlib import sha256

    return sha256((folder / "weights.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("at", [0, 0.3, 0.99])
def test_a_damaged_checkpoint_is_named(at: float, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 7, {"a": torch.arange(50.0)}, {"rows": []})
    tensors, counters = read_checkpoint(path)
    assert torch.equal(tensors["a"], torch.arange(50.0))
    assert counters == {"step": 7, "rows": []}
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=path.name):
        read_checkpoint(path)


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
