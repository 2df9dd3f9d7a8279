"""The script of `make bench-gpu` runs where there is no GPU too, at toy sizes."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False
    )


def test_its_parts_run_on_a_cpu() -> None:
    done = run("--device", "cpu", "--only", "loop", "groups", "extraction")
    assert done.returncode == 0, done.stderr
    assert "problem" not in done.stdout
    for what in (
        "product, bf16 (G)",
        "loop from the store",
        "loader alone",
        "one group",
        "bare forward",
    ):
        assert what in done.stdout


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['zarr'] = None; import runpy; sys.argv = ['gpu.py']; "
    done = subprocess.run(
        [sys.executable, "-c", f"{hide}runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: not installed: zarr.")
