"""A skipped test fails the run if REQUIRE_TESTS is set (as in .ci/run)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("required", "code"), [("", 0), ("1", 1)])
def test_a_skipped_test_fails_where_tests_are_required(required: str, code: int) -> None:
    """The tests of SLURM are skipped where none is asked for."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("REQUIRE_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "tests/slurm", "-k", "test_slurm"],
        cwd=ROOT,
        env=kept | ({"REQUIRE_TESTS": required} if required else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert " skipped" in done.stdout
    assert done.returncode == code, done.stdout[-2000:]
    assert ("REQUIRE_TESTS: tests/slurm/test_slurm.py" in done.stdout) == bool(required)
