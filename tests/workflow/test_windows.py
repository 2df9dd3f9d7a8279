"""The real workflow with a store of several windows: how much disk it takes, what a kill leaves, what is refused."""

import contextlib
import copy
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from saeflow.stores import open_store

from .conftest import SYNTHETIC, Project

pytestmark = pytest.mark.workflow
WINDOWS = 4


def windowed(**store: Any) -> dict[str, Any]:
    params = copy.deepcopy(SYNTHETIC)
    params["stores"]["synthetic"] |= {"window_rows": 5000, "block_contexts": 4, **store}
    params["runtime"]["extraction_jobs"] = 1
    return params


def on_disk(folder: Path) -> int:
    """Bytes of all files below a folder, each counted once however many names it has."""
    sizes = {}
    for place, _, names in os.walk(folder):  # passes over folders that are deleted meanwhile
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(Path(place, name))
                sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


class Watch(threading.Thread):
    """Watches the bytes below a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.peak, self.ended = folder, 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.02):
            self.peak = max(self.peak, on_disk(self.folder))

    def end(self) -> int:
        self.ended.set()
        self.join()
        return self.peak


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("windows"), windowed())
    store = project.folder / "results/stores"
    store.mkdir(parents=True)
    watch = Watch(store)
    watch.start()
    project.snakemake("extract")
    assert watch.is_alive()
    peak, whole = watch.end(), on_disk(store / "synthetic/train")
    held_out = on_disk(store / "synthetic/evaluation")
    assert whole < peak <= whole * (1 + 1.2 / WINDOWS) + 2 * held_out
    return project


def test_windows_are_put_together_and_nothing_else_is_left(done: Project) -> None:
    store = open_store(done.folder / "results/stores/synthetic/train/features.zarr")
    assert len(store.attrs["windows"]) == WINDOWS
    assert store.rows == 20096  # whole contexts
    left = {path.name for path in (done.folder / "results/stores/synthetic").iterdir()}
    assert left == {"train", "evaluation"}
    assert done.todo("extract") == {}
    assert "are as they were made" in done.run("saeflow", "verify")


def test_jobs_and_kills_change_no_digest(done: Project, tmp_path: Path) -> None:
    params = windowed()
    params["runtime"]["extraction_jobs"] = 2
    project = Project(tmp_path, params)
    for seconds in (9, 7):
        process = project.start("snakemake", "--cores", "2", "extract")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        project.run("snakemake", "--unlock")
    project.snakemake("extract")
    assert project.contents() == done.contents()
