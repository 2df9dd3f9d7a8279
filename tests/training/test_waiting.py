"""A step does not wait for its device: nothing of it is read by the host outside lines of the log."""

import dataclasses
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saeflow.batch import Batch
from saeflow.operators import SparseLatents, native, sparse
from saeflow.saes import VARIANTS
from saeflow.training.run import Run

from .conftest import CONSTANT, RUNTIME, Samples, config

READS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::bincount",
    "aten::is_nonzero", "aten::_unique2", "aten::item",
    "aten::lift_fresh",  # a tensor made of the host's numbers: a copy to the device
}  # fmt: skip
FOLLOW_DENSITY = ("gated", "jumprelu", "p_anneal", "relu")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{variant: (variant, {}) for variant in VARIANTS},
    "jumprelu of dictionary_learning": ("jumprelu", {"form": "dictionary_learning"}),
    "soft_topk that reaches far": ("soft_topk", {"reach": 103.0}),
    "soft_topk, decoder alone at the end": ("soft_topk", {"hard_phase": "decoder"}),
    "relu of the Sparsemax release": ("relu", {"loss": "norm_weighted"}),
    "sparsemax, shared": (
        "sparsemax",
        {"architecture": "shared", "query": "linear", "loss": "norm_weighted"},
    ),
}


class NoReads(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: values read, shapes that depend on values, the host's tensors."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name
        assert name not in READS, name
        if name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), f"{name} by a mask"
        return function(*args, **(kwargs or {}))


def start(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, device: str = "cpu", **changes: Any
) -> Run:
    variant, options = CASES[case]
    monkeypatch.setattr(native, "is_on", False)
    monkeypatch.setattr(sparse, "is_padded", True)
    if variant == "soft_topk":
        changes["d_sae"] = 256
    setting = config(variant, **changes)
    if variant == "soft_topk":  # cold: its hot steps are dense, see test_soft_topk
        cold = {"alpha": 1e-3, "alpha_schedule": CONSTANT}
        setting = dataclasses.replace(setting, options={**setting.options, **cold})
    setting = dataclasses.replace(setting, options={**setting.options, **options})
    run = Run(Samples(), setting, {**RUNTIME, "device": device}, folder)
    if variant in FOLLOW_DENSITY:
        with torch.no_grad():
            run.sae.b_enc.sub_(1.0)
    return run


@pytest.mark.parametrize("case", CASES)
def test_a_step_reads_nothing(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(case, tmp_path, monkeypatch, dead_after_tokens=300)
    batches = run.batches()
    for _ in range(4):  # the first decides the path; some latents are dead then
        run.take(next(batches), 0.0)
    run.catch_up(is_all=True)
    run.sae.settle()
    run.sae.settle_dead(run.sae.d_sae // 2)
    run.take(next(batches), 0.0)
    with NoReads():
        for batch in [next(batches) for _ in range(3)]:
            run.take(batch, 0.0)
    assert int(run.room.step) == -1
    run.check()


@pytest.mark.parametrize("case", ["batch_topk", "matryoshka", "jumprelu", "gated"])
def test_rows_with_more_latents_than_a_list_holds_lose_none(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(case, tmp_path, monkeypatch, d_sae=256)
    monkeypatch.setattr(type(run.sae), "most", 1)  # room for 16
    batch = next(run.batches())
    if case in FOLLOW_DENSITY:
        with torch.no_grad():
            run.sae.b_enc.sub_(4.0)  # few latents of the other rows are active
    batch.x[:2] *= 1000
    found = run.sae.run(batch, is_sparse=True)
    assert found.lacking().tolist() == [0, 0]
    assert int(found.l0().max()) > 100
    monkeypatch.setattr(sparse, "is_padded", False)
    expected = run.sae.run(batch, is_sparse=True)
    assert isinstance(found.latents, SparseLatents)
    assert isinstance(expected.latents, SparseLatents)
    torch.testing.assert_close(found.latents.dense(), expected.latents.dense())
    torch.testing.assert_close(found.l0(), expected.l0())
    assert torch.equal(found.fired(), expected.fired())


def crowded(
    variant: str, folder: Path, monkeypatch: pytest.MonkeyPatch, device: str = "cpu"
) -> tuple[Run, list[Batch]]:
    """A run, and batches with rows that take the latents of their whole batch; hardly any spare lists."""
    for module in ("batch_topk", "sparse"):
        place = import_module(f"saeflow.operators.{module}")
        monkeypatch.setattr(place, "spare_for", lambda _: 1)
    changes = {"log_every_steps": 50, "dead_after_tokens": 600}
    run = start(variant, folder, monkeypatch, device, d_sae=256, **changes)
    batches = [
        batch.map(lambda x: x.to(device))
        for batch, _ in zip(Samples().batches(128, 0), range(20), strict=False)
    ]
    for number in (3, 4, 12):
        batches[number].x[:2] *= 1000
    return run, batches


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("variant", ["batch_topk", "jumprelu", "matryoshka"])
def test_steps_that_lack_room_are_taken_again_before_any_later_one_counts(
    variant: str,
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    run, batches = crowded(variant, tmp_path, monkeypatch, device)
    whole = Run(Samples(), run.config, run.runtime, tmp_path)
    whole.sae.load_state_dict(run.sae.state_dict())
    whole.sae.dead_room = 256
    with monkeypatch.context() as with_room:
        with_room.setattr(type(run.sae), "most", 256)
        for x in batches:
            whole.take(x, 0.0)
    assert "taken again" not in caplog.text
    monkeypatch.setattr(type(run.sae), "most", 1)
    for x in batches:
        run.take(x, 0.0)
    run.catch_up(is_all=True)
    assert "taken again" in caplog.text
    assert run.sae.widened > 1
    assert run.step == whole.step == len(batches)
    for name, tensor in whole.sae.state_dict().items():
        if name != "density":  # of when the path was last decided
            ours = run.sae.state_dict()[name]
            torch.testing.assert_close(
                ours, tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert torch.equal(run.silent, whole.silent)


def test_a_step_that_lacks_room_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, batches = crowded("batch_topk", tmp_path, monkeypatch)
    with monkeypatch.context() as with_room:
        with_room.setattr(type(run.sae), "most", 256)
        for x in batches[:3]:
            run.take(x, 0.0)
    before = {name: tensor.clone() for name, tensor in run.sae.named_parameters()}
    monkeypatch.setattr(type(run.sae), "most", 1)
    for x in batches[3:6]:
        run.take(x, 0.0)
    for name, parameter in run.sae.named_parameters():
        assert torch.equal(parameter, before[name])
    assert int(run.room.step) == 3
    run.checkpoint()  # which waits for all
    assert int(run.room.step) == -1
    assert not torch.equal(run.sae.W_dec, before["W_dec"])
    again = Run(Samples(), run.config, RUNTIME, tmp_path)
    assert (again.step, again.sae.widened) == (6, run.sae.widened)
    for name, parameter in again.sae.named_parameters():
        assert torch.equal(parameter, run.sae.get_parameter(name))


def test_dead_latents_beyond_their_room_are_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run, batches = crowded("topk", tmp_path, monkeypatch)
    whole = Run(Samples(), run.config, RUNTIME, tmp_path)
    whole.sae.load_state_dict(run.sae.state_dict())
    whole.sae.dead_room = 256
    for each in (whole, run):
        for x in batches[5:12]:
            each.take(x, 0.0)
        each.catch_up(is_all=True)
    assert "dead latents" in caplog.text
    assert 0 < run.sae.dead_room < 256
    for name, parameter in run.sae.named_parameters():
        torch.testing.assert_close(parameter, whole.sae.get_parameter(name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_goes_on_from_its_checkpoint_with_the_same_bits(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"dead_after_tokens": 300, "log_every_steps": 4}
    whole = start(variant, tmp_path, monkeypatch, **changes)
    batches = [batch for batch, _ in zip(whole.batches(), range(10), strict=False)]
    for batch in batches[:6]:
        whole.take(batch, 0.0)
    whole.checkpoint()
    resumed = Run(Samples(), whole.config, RUNTIME, tmp_path)
    assert resumed.step == 6
    for batch in batches[6:]:
        whole.take(batch, 0.0)
        resumed.take(batch, 0.0)
    for name, tensor in whole.weights().items():
        assert torch.equal(resumed.weights()[name], tensor), name


def test_reads_are_found() -> None:
    values = torch.ones(3)
    with NoReads():
        for read in (float, bool, lambda x: x[x > 0], lambda x: x.nonzero()):
            with pytest.raises(AssertionError):
                read(values[:1])


@pytest.mark.parametrize("case", CASES)
def test_what_a_gpu_does_trains_as_a_cpu_does(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant, _ = CASES[case]
    changes = {"steps": 40, "d_sae": 64, "dead_after_tokens": 1000, "log_every_steps": 1}
    found = start(case, tmp_path, monkeypatch, **changes)
    expected = Run(Samples(), found.config, RUNTIME, tmp_path)
    monkeypatch.undo()
    if variant in FOLLOW_DENSITY:
        with torch.no_grad():
            expected.sae.b_enc.sub_(1.0)
    x_of = Samples()
    for number in range(12):
        batch = Batch.of(x_of.batch(128, number) / x_of.scale)
        expected.take(batch, 0.0)
        with monkeypatch.context() as as_gpu:
            as_gpu.setattr(native, "is_on", False)
            as_gpu.setattr(sparse, "is_padded", True)
            found.take(batch, 0.0)
    for name, tensor in expected.sae.state_dict().items():
        torch.testing.assert_close(
            found.sae.state_dict()[name],
            tensor,
            rtol=2e-3,
            atol=2e-4,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    assert torch.equal(found.silent, expected.silent)
    ours, theirs = found.rows[-1], expected.rows[-1]
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"tokens_per_s"}:
        assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-4), name
