"""A disk that fills up, for real: a small tmpfs under results/."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import SYNTHETIC, Project

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
