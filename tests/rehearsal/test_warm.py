"""A job in a forked child behaves as one in a process of its own: arguments, folder, environment, streams, exit code."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from saeflow.config import ROOT
from saeflow.rehearsal.warm import warm_python

pytestmark = [pytest.mark.workflow, pytest.mark.heavy]


@pytest.fixture(scope="module")
def python() -> Iterator[Path]:
    """The program that a rehearsal's jobs find as `python`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    with warm_python(environment) as programs:
        yield programs / "python"


def run(python: Path, *arguments: str, **options: str) -> tuple[int, str, str]:
    folder = options.pop("folder", ".")
    done = subprocess.run(
        [python, *arguments],
        cwd=folder,
        env=os.environ | options,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_what_a_command_prints_and_returns_comes_back(python: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("a: [1")
    command = ("-m", "saeflow", "validate", "--params", "mine.yaml")
    code, out, err = run(python, *command, folder=str(tmp_path))  # in that folder, not here
    assert (code, out) == (2, "")
    assert err.startswith("error: mine.yaml: expected YAML")
    assert len(err.splitlines()) == 1
    code, out, err = run(python, "-m", "saeflow", "validate", "--params", str(ROOT / "params.yaml"))
    assert code == 0, err
    assert "sources" in out


def asked(task: dict[str, Any]) -> str:
    """A command's argument."""
    return json.dumps({"shared": {"params": {}, "reads": {}}, "jobs": [task]})


def test_the_environment_is_the_job_s(python: Path) -> None:
    """`saeflow extract` takes runtime from SAEFLOW_RUNTIME: what is wrong with it is what was handed over."""
    task = {
        "out": "o",
        "key": "",
        "reads": {},
        "params": {"source": {}, "store": {}, "split": "train"},
    }
    command = ("extract", asked(task), "--threads=1")
    code, _, err = run(python, "-m", "saeflow", *command, "--out=o", SAEFLOW_RUNTIME="none of it")
    assert code == 2
    assert "--runtime: expected JSON, found 'none of it'" in err


def test_an_error_of_the_program_s_own_is_a_traceback_and_exit_code_1(python: Path) -> None:
    task = {"out": "/dev/null/none", "key": "", "reads": {}, "params": {}}  # of no model
    command = ("fetch", asked(task))
    code, _, err = run(python, "-m", "saeflow", *command)
    assert code == 1
    assert "Traceback" in err


def test_anything_but_saeflow_is_run_by_python_itself(python: Path) -> None:
    assert run(python, "-c", "import sys; print(sys.argv); sys.exit(3)", "x") == (
        3, "['-c', 'x']\n", ""
    )  # fmt: skip
