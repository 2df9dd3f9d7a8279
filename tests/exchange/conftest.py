"""The other libraries, each what PyPI has of it, in an environment of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saeflow.config import ROOT

Foreign = Callable[[Path, list[dict[str, Any]]], None]


@pytest.fixture(scope="session")
def foreign() -> Foreign:
    """Runs jobs of foreign.py."""
    sys.path.insert(0, str(ROOT / "benchmarks" / "peers"))
    from environments import EXCHANGE, environment

    try:
        python = environment(EXCHANGE)
    except subprocess.CalledProcessError as error:
        if os.environ.get("REQUIRE_PEERS"):
            raise
        pytest.skip(f"SAELens and dictionary_learning cannot be installed here: {error}")

    def run(folder: Path, jobs: list[dict[str, Any]]) -> None:
        told = folder / "jobs.json"
        told.write_text(json.dumps(jobs, default=str))
        script = Path(__file__).with_name("foreign.py")
        offline = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        done = subprocess.run([python, script, told], capture_output=True, text=True, env=offline)
        assert done.returncode == 0, done.stderr[-2000:]

    return run
