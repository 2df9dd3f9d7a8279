"""Every script of benchmarks/ finds what it imports; they run rarely, and a name may have moved meanwhile."""

import subprocess
import sys

from saeflow.config import ROOT

CODE = """
import importlib, pathlib, sys
sys.path[:0] = ["benchmarks", "benchmarks/peers"]
for path in sorted(pathlib.Path("benchmarks").glob("*.py")):
    importlib.import_module(path.stem)
    print(path.stem)
"""


def test_every_script_can_be_imported() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert len(scripts) > 10
    assert scripts <= set(done.stdout.split())
