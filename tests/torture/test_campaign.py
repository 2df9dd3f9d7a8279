"""A short form of `make torture`: every kind of fault once or a few times."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.workflow
@pytest.mark.heavy
@pytest.mark.longest
def test_a_few_faults_of_every_kind_are_survived(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "benchmarks/torture.py",
        "--kills=3",
        "--stream-kills=2",
        "--inputs=0",
        "--seed=1",
        "--no-tests",
    ]
    done = subprocess.run(
        [*command, f"--out={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    table = pd.read_csv(tmp_path / "torture.csv")
    assert list(table["survived"]) == list(table["tried"])
    assert table["tried"].sum() >= 30
