"""Several SAEs in one pass over the batches: the same bits as one by one."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saeflow.config import SAEConfig
from saeflow.errors import UserError
from saeflow.training import train, train_group
from saeflow.training.checkpoints import checkpoints, read_checkpoint
from saeflow.training.clock import Clock, shares
from saeflow.training.trainer import Trained

from .conftest import RUNTIME, Samples, config

QUIET = {**RUNTIME, "checkpoint_every_s": 1e9}
EVERY_STEP = {**RUNTIME, "checkpoint_every_s": 0}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def group() -> list[SAEConfig]:
    """Variants, a shorter budget, another input scale, and a seed of its own: two streams of batches."""
    other_seed = dataclasses.replace(config("topk", steps=30), seed=1)
    return [
        config("topk", steps=30),
        other_seed,
        config("jumprelu", steps=20),
        config("matryoshka", steps=30, input_scale="centred"),
    ]


def folders(path: Path, group: list[SAEConfig]) -> list[tuple[SAEConfig, Path, None]]:
    found = []
    for number, setting in enumerate(group):
        folder = path / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        found.append((setting, folder, None))
    return found


def contents(found: list[Trained]) -> list[dict[str, str]]:
    return [trained.content for trained in found]


class Counted(Samples):
    """Counts the batches that are read."""

    def __init__(self, **options: Any) -> None:
        self.read = 0
        super().__init__(**options)

    def batch(self, batch_size: int, number: int) -> torch.Tensor:
        self.read += 1
        return super().batch(batch_size, number)


def test_a_group_ends_with_the_bits_of_separate_runs(
    group: list[SAEConfig], tmp_path: Path
) -> None:
    alone = [
        train(Samples(), setting, QUIET, folder)
        for setting, folder, _ in folders(tmp_path / "alone", group)
    ]
    store = Counted()
    together = train_group(store, folders(tmp_path / "together", group), QUIET)
    assert contents(together) == alone
    assert sum(trained.share for trained in together) == pytest.approx(1)
    assert all(trained.share > 0 for trained in together)
    assert len({digests["weights"] for digests in alone}) == 4
    initialisations, streams = 4, 2
    assert store.read == initialisations + streams * 30
    for _, folder, _ in folders(tmp_path / "together", group):
        assert {path.name for path in folder.iterdir()} == {
            "weights.safetensors",
            "config.json",
            "steps.csv",
        }


def test_a_run_has_the_share_of_the_time_that_its_steps_took() -> None:
    clocks = [Clock(torch.device("cpu")) for _ in range(3)]
    assert shares(clocks) == [1 / 3] * 3
    for clock, seconds in zip(clocks, (3.0, 0.5, 0.0), strict=True):
        clock.add(seconds)
    clocks[1].add(0.5)
    assert shares(clocks) == [0.75, 0.25, 0.0]


def breaks_at(count: int) -> Callable[[int], None]:
    """Fail at the count-th batch that is read."""
    read = 0

    def on_batch(number: int) -> None:
        nonlocal read
        read += 1
        if read == count:
            raise OSError("the disk is gone")

    return on_batch


@pytest.mark.parametrize(
    "count", [4 + 7, 4 + 25, 4 + 30 + 12]
)  # in a stream, after its shorter run, in the next
def test_an_interrupted_group_goes_on(group: list[SAEConfig], count: int, tmp_path: Path) -> None:
    expected = contents(train_group(Samples(), folders(tmp_path / "undisturbed", group), QUIET))
    wanted = folders(tmp_path / "interrupted", group)
    with pytest.raises(OSError, match="the disk is gone"):
        train_group(Samples(on_batch=breaks_at(count)), wanted, EVERY_STEP)
    steps = [
        [read_checkpoint(path)[1]["step"] for path in checkpoints(folder)]
        for _, folder, _ in wanted
    ]
    assert steps[0] == [min(count - 5, 30)]
    assert contents(train_group(Samples(), wanted, QUIET)) == expected


def test_a_loss_that_is_not_finite_names_its_run(group: list[SAEConfig], tmp_path: Path) -> None:
    wild = config("relu", steps=30, lr=1e30, lr_warmup_steps=0)
    wanted = folders(tmp_path, [*group[:1], wild])
    with pytest.raises(UserError, match=r"^saes\.relu: the loss is not finite at step"):
        train_group(Samples(), wanted, EVERY_STEP)
