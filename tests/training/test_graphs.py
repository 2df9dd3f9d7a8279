"""A recorded step does what the step does, and is recorded anew when something of it changes."""

import dataclasses
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from saeflow.batch import Batch
from saeflow.config import SAEConfig
from saeflow.operators import native, sparse
from saeflow.saes import VARIANTS
from saeflow.training.graphs import WARM, Replayed, capture_cuda
from saeflow.training.run import Run

from .conftest import RUNTIME, Samples, config

STEPS = 16
MOVES = {
    "topk": "k", "soft_topk": "temperature", "jumprelu": "k", "gated": "l1_weight", "p_anneal": "l1_weight",
    "relu": "l1_weight",
}  # fmt: skip
"""The column of steps.csv that a schedule of theirs moves until step 20 or 60."""
FOLLOW_DENSITY = ("gated", "jumprelu", "p_anneal", "relu", "soft_topk")


class Tape(TorchDispatchMode):
    """A CUDA graph's counterpart on a CPU: operations in order, on the memory and with the numbers of their recording."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, out in self.calls:
                again = function(*args, **kwargs)
                for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def state(run: Run) -> list[Tensor]:
    """All that a step writes."""
    moments = [t for of in run.optimizer.state.values() for t in of.values()]
    watched = [run.watch.step, run.watch.values]
    return [
        *run.sae.parameters(),
        *run.sae.buffers(),
        *moments,
        *watched,
        run.silent,
        run.room.step,
    ]


def capture_on(run: Run, taped: list[Tape]) -> Callable[[Callable[[], Any]], Any]:
    """As `capture_cuda`: recording changes nothing."""

    def capture(function: Callable[[], Any]) -> Any:
        before = [tensor.detach().clone() for tensor in state(run)]
        with Tape() as tape:
            result = function()
        with torch.no_grad():
            for tensor, old in zip(state(run), before, strict=True):
                tensor.copy_(old)
        taped.append(tape)
        return tape.replay, result

    return capture


@pytest.fixture(autouse=True)
def as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(native, "is_on", False)
    monkeypatch.setattr(sparse, "is_padded", True)


def cold(setting: SAEConfig) -> SAEConfig:
    """Soft masks that a list holds, at a temperature that moves."""
    if setting.variant != "soft_topk":
        return setting
    falls = {"kind": "exponential", "from": 4e-3, "until": 0.3}
    return dataclasses.replace(
        setting, options={**setting.options, "alpha": 1e-3, "alpha_schedule": falls}
    )


@pytest.mark.parametrize("first", [0, 120])  # while schedules move, and at rest
@pytest.mark.parametrize("variant", VARIANTS)
def test_recorded_steps_are_the_steps(variant: str, first: int, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"steps": 200, "dead_after_tokens": 500, "log_every_steps": 4}
    setting = cold(config(variant, **changes))
    plain, recorded = (Run(Samples(), setting, RUNTIME, tmp_path) for _ in "ab")
    taped: list[Tape] = []
    keys: set[Hashable] = set()
    recorded.replayed = Replayed(recorded.work, capture_on(recorded, taped))
    for run in (plain, recorded):
        run.step = first
    batches = [batch for batch, _ in zip(plain.batches(first), range(STEPS), strict=False)]
    for batch in batches:
        plain.take(batch, 0.0)
        recorded.take(batch, 0.0)
        keys.add(tuple(recorded.sae.dials().items()))
    assert taped
    if variant in MOVES and not first:
        assert len({row[MOVES[variant]] for row in recorded.rows}) > 1
    if variant not in FOLLOW_DENSITY:
        assert len(taped) <= len(keys)  # one, unless room for dead latents is made
    for one, other in zip(state(recorded), state(plain), strict=True):
        assert torch.equal(one, other)
    timed = {"tokens_per_s"}
    for one, other in zip(recorded.rows, plain.rows, strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {
            k: v for k, v in other.items() if k not in timed
        }


def test_a_line_of_the_log_alone_changes_no_key(tmp_path: Path) -> None:
    sae = Run(Samples(), config("relu", d_sae=2048), RUNTIME, tmp_path).sae
    sae.active.fill_(20)
    sae.counted = 1
    sae.settle()
    first = sae.dials()
    assert first["is_sparse"]
    assert first == sae.dials()
    sae.settle()
    assert first == sae.dials()


def test_another_key_is_recorded_anew() -> None:
    recordings: list[int] = []

    def capture(function: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        result = torch.zeros(2)
        recordings.append(1)
        return lambda: result.copy_(function()), result

    factor = 2.0
    doubled = Replayed(lambda batch: batch.x * factor, capture)
    for number in range(WARM + 4):
        x = torch.full((2,), float(number))
        assert torch.equal(doubled(Batch.of(x), ("k", 3)), 2 * x)
    assert len(recordings) == 1
    for number in range(2 * WARM):
        x = torch.full((3 if number >= WARM else 2,), float(number))
        assert torch.equal(doubled(Batch.of(x), ("k", 4)), 2 * x)
    assert len(recordings) == 1  # never the same for long enough
    for number in range(WARM + 1):
        x = torch.full((2,), float(number))
        assert torch.equal(doubled(Batch.of(x), ("k", 3)), 2 * x)
    assert len(recordings) == 2


def test_what_cannot_be_recorded_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    def capture(function: Callable[[], Tensor]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    doubled = Replayed(lambda batch: batch.x * 2, capture)
    for number in range(WARM + 3):
        x = torch.full((2,), float(number))
        assert torch.equal(doubled(Batch.of(x), 0), 2 * x)
    assert caplog.text.count("cannot be recorded") == 1


def test_a_recording_takes_inputs_and_targets() -> None:
    def capture(function: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        result = torch.zeros(2)
        return lambda: result.copy_(function()), result

    difference = Replayed(lambda batch: batch.x - batch.target, capture)
    for number in range(WARM + 4):
        x, target = torch.full((2,), float(number)), torch.full((2,), float(number**2))
        assert torch.equal(difference(Batch(x, target), 0), x - target)
    assert difference.recorded is not None
    assert not difference(Batch.of(x), 0).any()  # of another kind: not the recording's
    assert difference.recorded is None


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cuda_graph_gives_the_bits_of_its_kernels(variant: str, tmp_path: Path) -> None:
    runtime = {**RUNTIME, "device": "cuda", "precision": "bf16"}
    changes: dict[str, Any] = {"steps": 200, "dead_after_tokens": 500, "log_every_steps": 4}
    plain, recorded = (Run(Samples(), config(variant, **changes), runtime, tmp_path) for _ in "ab")
    plain.replayed = None
    recorded.replayed = Replayed(recorded.work, capture_cuda)
    for run in (plain, recorded):
        run.step = 120
    for number in range(STEPS):
        batch = Batch.of(Samples().batch(128, number).cuda() / 3)
        plain.take(batch, 0.0)
        recorded.take(batch, 0.0)
    assert recorded.replayed.is_possible
    for one, other in zip(state(recorded), state(plain), strict=True):
        assert torch.equal(one, other)
