"""SAEs of one shape that a GPU steps together get what a step of their own gives each."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from saeflow.batch import Batch
from saeflow.config import SAEConfig
from saeflow.operators import native, sparse
from saeflow.saes import load
from saeflow.training import train, train_group
from saeflow.training.graphs import Replayed
from saeflow.training.run import Run
from saeflow.training.stacked import MOST_LATENTS, Stack, units

from .conftest import CONSTANT, RUNTIME, Samples, config
from .test_graphs import Tape

QUIET = {**RUNTIME, "checkpoint_every_s": 1e9}
KS = (1, 2, 3, 4, 6, 9, 17, 32)  # lists of two sizes
SETTINGS: dict[str, Any] = {"steps": 20, "dead_after_tokens": 600, "log_every_steps": 5}


@pytest.fixture(autouse=True)
def as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(native, "is_on", False)
    monkeypatch.setattr(sparse, "is_padded", True)


def changed(variant: str, number: int, training: dict[str, Any], **options: Any) -> SAEConfig:
    found = config(variant, **{**SETTINGS, **training})
    named = {"name": f"{found.name}-{number}", "options": {**found.options, **options}}
    return dataclasses.replace(found, **named)


def sweep(variant: str, **options: Any) -> list[SAEConfig]:
    """Eight TopK SAEs; of others, three of different rates and penalties, the last in another input scale."""
    if variant == "topk":
        return [changed("topk", k, {}, k=k, k_schedule=CONSTANT) for k in KS]
    weights = {"relu": "l1", "gated": "l1", "adaptive_k": "l1"}
    name = weights.get(variant, "auxk_weight")
    scales = {2: "centred"}
    return [
        changed(variant, n, {"lr": 1e-3 * (n + 1), "input_scale": scales.get(n, "dimension")}, **{name: 0.1 * n + 0.01}, **options)
        for n in range(3)
    ]  # fmt: skip


def steps_of(folder: Path) -> list[dict[str, float]]:
    with (folder / "steps.csv").open() as file:
        rows = [{name: float(v) for name, v in row.items() if v} for row in csv.DictReader(file)]
    return [{name: v for name, v in row.items() if name != "tokens_per_s"} for row in rows]


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("topk", {}), ("batch_topk", {}), ("adaptive_k", {}), ("soft_topk", {}),
        ("soft_topk", {"hard_phase": "decoder"}), ("relu", {}), ("gated", {}),
        ("batch_topk", {"orthogonality_weight": 3.0, "orthogonality_chunk": 10}),
    ],
)  # fmt: skip
def test_a_group_gets_what_runs_of_their_own_get(
    variant: str, options: dict[str, Any], tmp_path: Path
) -> None:
    wanted = sweep(variant, **options)
    together = [(setting, tmp_path / f"together/{n}", None) for n, setting in enumerate(wanted)]
    runs = []
    for setting, folder, _ in together:
        folder.mkdir(parents=True)
        runs.append(Run(Samples(), setting, QUIET, folder))
    (stack,) = units(runs)
    assert isinstance(stack, Stack)
    assert stack.runs == runs
    found = train_group(Samples(), together, QUIET)
    assert [trained.share for trained in found] == pytest.approx([1 / len(wanted)] * len(wanted))
    for number, setting in enumerate(wanted):
        folder = tmp_path / f"alone/{number}"
        folder.mkdir(parents=True)
        train(Samples(), setting, QUIET, folder)
        expected, ours = load(folder).state_dict(), load(together[number][1]).state_dict()
        for name, tensor in expected.items():
            torch.testing.assert_close(
                ours[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        for ours_row, row in zip(steps_of(together[number][1]), steps_of(folder), strict=True):
            assert ours_row == pytest.approx(row, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("variant", ["topk", "batch_topk"])
def test_one_step_has_the_values_and_gradients_of_each(variant: str, tmp_path: Path) -> None:
    wanted = sweep(variant)
    alone, grouped = ([Run(Samples(), one, QUIET, tmp_path) for one in wanted] for _ in "ab")
    for run in (*alone, *grouped):  # some are dead, so that AuxK counts
        run.silent[::3] = 600
        run.sae.settle_dead(11)
        with torch.no_grad():
            run.sae.b_enc[::3] -= 1
    batch = Batch.of(Samples().batch(128, 0))
    found, is_counted = Stack(grouped).work(batch), False
    for run, own, stepped in zip(alone, grouped, found, strict=True):
        expected = run.work(run.scaled(batch))
        active, expected_active = (one.fwd.latents.dense() != 0 for one in (stepped, expected))
        assert torch.equal(active, expected_active)
        torch.testing.assert_close(
            stepped.fwd.residual, expected.fwd.residual, rtol=1e-5, atol=1e-5
        )
        is_counted = is_counted or bool(expected.losses["auxk"] > 0)
        for name, term in expected.losses.items():
            torch.testing.assert_close(stepped.losses[name], term, rtol=1e-5, atol=1e-6)
        for (name, parameter), ours in zip(
            run.sae.named_parameters(), own.sae.parameters(), strict=True
        ):
            assert parameter.grad is not None
            torch.testing.assert_close(
                ours.grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )  # fmt: skip
    assert is_counted


def test_a_recorded_stack_does_what_it_does(tmp_path: Path) -> None:
    plain, recorded = (
        Stack([Run(Samples(), one, QUIET, tmp_path) for one in sweep("topk")]) for _ in "ab"
    )
    taped: list[Tape] = []

    def capture(function: Any) -> Any:
        kept = [
            t for run in recorded.runs
            for t in (*run.sae.parameters(), *(m for of in run.optimizer.state.values() for m in of.values()),
                      run.watch.step, run.watch.values, run.silent, run.room.step)
        ]  # fmt: skip
        before = [t.detach().clone() for t in kept]
        with Tape() as tape:
            result = function()
        with torch.no_grad():
            for tensor, old in zip(kept, before, strict=True):
                tensor.copy_(old)
        taped.append(tape)
        return tape.replay, result

    recorded.replayed = Replayed(recorded.work, capture)
    for number in range(10):
        batch = Batch.of(Samples().batch(128, number))
        plain.take(batch, 0.0)
        recorded.take(batch, 0.0)
    assert len(taped) == 1
    for one, other in zip(recorded.runs, plain.runs, strict=True):
        for ours, theirs in zip(one.sae.parameters(), other.sae.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_runs_that_differ_step_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [
        *sweep("topk")[:2], changed("topk", 9, {"steps": 30}), config("topk", d_sae=64, **SETTINGS),
        changed("matryoshka", 0, {}), changed("matryoshka", 1, {}),
    ]  # fmt: skip
    runs = [Run(Samples(), one, QUIET, tmp_path) for one in settings]
    stack, *others = units(runs)
    assert isinstance(stack, Stack)
    assert (stack.runs, others) == (runs[:2], runs[2:])
    monkeypatch.setattr("saeflow.training.stacked.MOST_LATENTS", 40)
    assert units(runs) == runs
    monkeypatch.setattr("saeflow.training.stacked.MOST_LATENTS", MOST_LATENTS)
    monkeypatch.setattr(sparse, "is_padded", False)  # a CPU
    assert units(runs) == runs
