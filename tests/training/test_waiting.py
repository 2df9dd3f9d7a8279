"""A step does not wait for its device: nothing of it is read by the host outside lines of the log."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saeflow.batch import Batch
from saeflow.operators import native, sparse
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


def start(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Run:
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
    run = Run(Samples(), setting, RUNTIME, folder)
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
    run.sae.settle()
    run.take(next(batches), 0.0)
    with NoReads():
        for batch in [next(batches) for _ in range(3)]:
            run.take(batch, 0.0)
    run.check()


def test_rows_that_lose_latents_are_counted_and_get_more_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = start("batch_topk", tmp_path, monkeypatch, d_sae=256, log_every_steps=2)
    monkeypatch.setattr(type(run.sae), "most", 1)  # room for 16
    with torch.no_grad():
        run.sae.b_enc.zero_()
    batch = next(run.batches())
    batch.x[:2] *= 1000  # rows that take the whole batch's latents
    for _ in range(4):
        run.take(batch, 0.0)
    assert caplog.text.count("rows since the last line") == 2
    assert run.sae.widened == 4
    run.take(batch, 0.0)
    run.checkpoint()
    again = start("batch_topk", tmp_path, monkeypatch, d_sae=256, log_every_steps=2)
    assert again.sae.widened == 4
    assert int(again.cut) == int(run.cut) > 0  # which the next line of the log will say


def test_a_row_cut_on_another_rank_gives_room_on_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start("batch_topk", tmp_path, monkeypatch)
    monkeypatch.setattr(run.ranks, "over_both", lambda own: own + 1)
    run.make_room()
    assert run.sae.widened == 2


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
