"""A step that cannot be taken is found without waiting, leaves the weights alone, and is named later."""

from pathlib import Path

import pytest
import torch

from saeflow.batch import Batch
from saeflow.errors import UserError
from saeflow.operators import native
from saeflow.training.finite import Watch
from saeflow.training.run import Run

from .conftest import RUNTIME, Samples, config


def look(watch: Watch, step: int, x: torch.Tensor, **terms: float) -> bool:
    watch.begin(step)
    return bool(
        watch.look(Batch.of(x), {name: torch.tensor(value) for name, value in terms.items()})
    )


def test_the_first_step_is_remembered_with_its_terms() -> None:
    watch, x = Watch(torch.device("cpu")), torch.ones(3, 2)
    assert not look(watch, 4, x, loss=1.5, norm=1.5)
    assert watch.read() is None
    assert look(watch, 5, x, loss=1.5, norm=torch.nan)
    assert look(watch, 6, x * torch.inf, loss=torch.nan, norm=torch.nan)
    assert look(watch, 7, x, loss=1.5, norm=1.5)
    assert watch.read() == (5, "loss 1.5, norm nan", False)


def test_a_batch_that_is_not_finite_is_told_apart() -> None:
    watch, x = Watch(torch.device("cpu")), torch.ones(3, 2)
    x[1, 1] = -torch.inf
    assert look(watch, 2, x, loss=torch.inf)
    assert watch.read() == (2, "loss inf", True)


@pytest.mark.parametrize("is_native", [True, False])
def test_an_update_that_is_skipped_writes_nothing(
    is_native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "is_on", is_native)
    run = Run(Samples(), config("topk"), RUNTIME, tmp_path)
    batches = run.batches()
    run.one_step(next(batches))
    before = {name: tensor.clone() for name, tensor in run.sae.state_dict().items()}
    moments = [v.clone() for state in run.optimizer.state.values() for v in state.values()]
    run.optimizer.update(run.optimizer.measure(), torch.tensor(True))
    for name, tensor in run.sae.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-6, atol=0)
    after = [v for state in run.optimizer.state.values() for v in state.values()]
    assert all(map(torch.equal, moments, after))


def test_a_run_that_looks_later_names_the_step_and_has_the_weights_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "is_on", False)
    run = Run(Samples(), config("relu"), RUNTIME, tmp_path)
    batches = run.batches()
    with monkeypatch.context() as waiting:
        waiting.setattr(Run, "check", lambda self: None)  # as on a GPU between lines of the log
        for number in range(6):
            if number == 3:
                before = run.sae.W_enc.detach().clone()
            factor = torch.nan if number == 3 else 1.0
            run.one_step(next(batches).map(lambda x, factor=factor: x * factor))
            run.step += 1
    torch.testing.assert_close(run.sae.W_enc.detach(), before, rtol=0, atol=0)
    with pytest.raises(
        UserError, match=r"not finite at step 3 \(batch 3 .*the batch is not finite"
    ):
        run.check()
    with pytest.raises(UserError, match="not finite at step 3"):
        run.checkpoint()
