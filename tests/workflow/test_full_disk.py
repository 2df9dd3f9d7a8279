"""A disk that fills up, for real: a small tmpfs under results/."""

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from .conftest import SYNTHETIC, Project
from .test_windows import saes, trained

pytestmark = [
    pytest.mark.workflow,
    pytest.mark.heavy,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root"),
]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Any]:
    """A project whose results lie on a tmpfs, and a function that sets its size in KiB."""
    project = Project(tmp_path, SYNTHETIC, cold=True)
    results = project.folder / "results"
    results.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    subprocess.run([*mount, "size=2m", "tmpfs", str(results)], check=True)

    def resize(kib: int) -> None:
        subprocess.run([*mount, f"remount,size={kib}k", "tmpfs", str(results)], check=True)

    try:
        yield project, resize
    finally:
        subprocess.run(["umount", "-l", str(results)], check=True)


def assert_one_clear_line(text: str) -> None:
    assert "no space left on the device; nothing half-written is kept for whole" in text
    assert "Traceback" not in text


def test_a_full_disk_loses_nothing(disk: Any, synthetic: Project) -> None:
    project, resize = disk
    results = project.folder / "results"
    assert_one_clear_line(project.snakemake("train", code=1))  # the first store does not fit
    assert not list(results.rglob("train/provenance.json"))
    resize(64 << 10)
    project.snakemake("extract")
    room = os.statvfs(results)
    ballast = results / "ballast"
    ballast.write_bytes(bytes((room.f_bavail - 4) * room.f_frsize))  # weights do not fit
    assert_one_clear_line(project.snakemake("train", code=1))
    assert not list(results.rglob("weights.safetensors"))
    ballast.unlink()
    project.snakemake("train")
    synthetic.snakemake("train", "extract")
    assert project.contents() == {
        name: digest for name, digest in synthetic.contents().items() if "/s" in name
    }
    assert "are as they were made" in project.run("saeflow", "verify")


def filled_after(draw: int, project: Project) -> str:
    """Run a stream whose disk something else fills once SAEs were trained on a draw of its windows; the output of the run.

    The other takes what the stream's own jobs free, too: a window that was read leaves no room for what comes next.
    """
    results = project.folder / "results"
    ballast = results / "ballast"
    ended = threading.Event()

    def fill() -> None:
        while not list(results.glob(f"saes.groups/*.{draw}.done")):
            if ended.wait(0.002):
                return
        with ballast.open("wb") as file:
            taken = 0
            while not ended.wait(0.002):
                room = os.statvfs(results)
                free = (room.f_bavail - 10) * room.f_frsize
                if free > 0:
                    with suppress(OSError):  # a job took some of it meanwhile
                        os.posix_fallocate(file.fileno(), taken, free)
                        taken += free

    other = threading.Thread(target=fill)
    other.start()
    try:
        return project.snakemake("train", code=1)
    finally:
        ended.set()
        other.join()
        ballast.unlink(missing_ok=True)


def test_a_disk_that_fills_up_in_the_middle_of_a_stream_loses_nothing(
    disk: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    project, resize = disk
    resize(64 << 10)
    project.write(trained(2))
    project.cold = False  # two dozen small jobs
    left = project.todo("train")["train_window"]
    for draw in (0, 2):  # of five
        assert_one_clear_line(filled_after(draw, project))
        assert not list((project.folder / "results").rglob("weights.safetensors"))
        before, left = left, project.todo("train")["train_window"]
        assert 0 < left <= 5 - (draw + 1) < before  # no draw is trained on again
    project.snakemake("train")
    kept = Project(tmp_path_factory.mktemp("kept"), trained("all"))
    kept.snakemake("train")
    assert len(saes(kept)) == 2
    assert saes(project) == saes(kept)
    folder = project.folder / "results/stores/synthetic"
    assert [path.name for path in folder.iterdir()] == ["train"]
    assert "are as they were made" in project.run("saeflow", "verify")
