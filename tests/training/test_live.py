"""Training that is watched: the same results, and every logged number where TensorBoard reads it."""

import csv
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from saeflow.errors import UserError
from saeflow.training import train, train_group

from .conftest import RUNTIME, Samples, config

QUIET = {**RUNTIME, "checkpoint_every_s": 1e9}
EVERY_STEP = {**RUNTIME, "checkpoint_every_s": 0}


def steps(folder: Path) -> list[dict[str, str]]:
    with (folder / "steps.csv").open() as file:
        return list(csv.DictReader(file))


def shown(logs: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard reads of a run."""
    events = EventAccumulator(str(logs / "tensorboard" / name), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def check(logs: Path, name: str, folder: Path) -> None:
    found, rows = shown(logs, name), steps(folder)
    assert set(found) == {key for key in rows[0] if key != "step"}
    for tag, points in found.items():
        assert [step for step, _ in points] == [int(row["step"]) for row in rows]
        if tag != "tokens_per_s":
            assert [value for _, value in points] == pytest.approx(
                [float(row[tag]) for row in rows], rel=1e-6
            )


def test_what_is_shown_is_what_is_written_and_changes_no_result(tmp_path: Path) -> None:
    logged = {**QUIET, "logging": {"folder": tmp_path / "logs"}}
    for folder in ("plain", "watched"):
        (tmp_path / folder).mkdir()
    setting = config("topk", steps=60)
    expected = train(Samples(), setting, QUIET, tmp_path / "plain")
    assert train(Samples(), setting, logged, tmp_path / "watched") == expected
    check(tmp_path / "logs", setting.name, tmp_path / "watched")
    (tmp_path / "again").mkdir()
    train(Samples(), setting, logged, tmp_path / "again")  # a new run takes the old one's place
    check(tmp_path / "logs", setting.name, tmp_path / "again")


def broken_from(number: int) -> Callable[[int], None]:
    def on_batch(at: int) -> None:
        if at >= number:
            raise OSError("the disk is gone")

    return on_batch


@pytest.mark.parametrize("opened", [0, 8, 9])
def test_a_resumed_run_shows_every_step_once(
    opened: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the names of its event files, which end in a count, grow by a digit in one second."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(opened))
    logging = {"folder": tmp_path / "logs"}
    setting, folder = config("topk", steps=60), tmp_path / "run"
    folder.mkdir()
    for number, runtime in ((17, {**EVERY_STEP}), (45, {**QUIET})):
        with pytest.raises(OSError, match="the disk is gone"):
            train(
                Samples(on_batch=broken_from(number)),
                setting,
                {**runtime, "logging": logging},
                folder,
            )
    train(Samples(), setting, {**QUIET, "logging": logging}, folder)
    assert [int(row["step"]) for row in steps(folder)] == [10, 20, 30, 40, 50, 60]
    check(tmp_path / "logs", setting.name, folder)


def test_runs_of_a_group_are_shown_apart(tmp_path: Path) -> None:
    settings = [config("topk", steps=20), config("relu", steps=20)]
    tasks = [(setting, tmp_path / setting.entry, None) for setting in settings]
    for _, folder, _ in tasks:
        folder.mkdir()
    train_group(Samples(), tasks, {**QUIET, "logging": {"folder": tmp_path / "logs"}})
    for setting, folder, _ in tasks:
        check(tmp_path / "logs", setting.name, folder)


def test_nothing_is_written_where_it_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    logging = {"folder": "logs", "tensorboard": False}
    train(Samples(), config("topk", steps=20), {**QUIET, "logging": logging}, tmp_path / "run")
    assert not (tmp_path / "logs").exists()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_that_is_not_there_is_said(tmp_path: Path) -> None:
    logging = {"folder": tmp_path / "logs", "tensorboard": False, "wandb": {"project": "p"}}
    with pytest.raises(
        UserError, match=r"runtime.logging.wandb: .* pip install 'saeflow\[wandb\]'"
    ):
        train(Samples(), config("topk", steps=20), {**QUIET, "logging": logging}, tmp_path)
