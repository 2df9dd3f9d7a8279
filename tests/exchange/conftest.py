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

Foreign = Callable[..., None]


@pytest.fixture(scope="session")
def foreign() -> Foreign:
    """Runs jobs of foreign.py, or of another script beside it, which then finds saeflow's own code as well."""
    sys.path.insert(0, str(ROOT / "benchmarks" / "peers"))
    from environments import EXCHANGE, environment

    try:
        python = environment(EXCHANGE)
    except subprocess.CalledProcessError as error:
        if os.environ.get("REQUIRE_PEERS"):
            raise
        pytest.skip(f"SAELens, dictionary_learning, SAEBench cannot be installed here: {error}")

    def run(folder: Path, jobs: list[dict[str, Any]], script: str = "foreign.py") -> None:
        told = folder / "jobs.json"
        told.write_text(json.dumps(jobs, default=str))
        code = "" if script == "foreign.py" else str(ROOT / "src")
        offline = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": code}
        done = subprocess.run(
            [python, Path(__file__).with_name(script), told],
            capture_output=True, text=True, env=offline, cwd=folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]

    return run
