"""A job in a forked child behaves as one in a process of its own: arguments, folder, environment, streams, exit code."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from saeflow.config import ROOT
from saeflow.rehearsal.warm import warm_python

pytestmark = pytest.mark.workflow


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


def jobs_in(folder: Path) -> list[int]:
    """Processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if (process / "cwd").readlink() == folder:
                found.append(int(process.name))
    return found


@contextmanager
def waiting(python: Path, folder: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """A command that waits for its parameters, with its client."""
    command = [python, "-m", "saeflow", "validate", "--params", "/dev/stdin"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # even where these tests ignore it
    with subprocess.Popen(command, cwd=folder, preexec_fn=heed, **pipes) as client:  # type: ignore[call-overload]
        try:
            until(lambda: len(jobs_in(folder)) == 2)
            yield client
        finally:
            client.kill()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_job_ends_with_its_client(python: Path, tmp_path: Path) -> None:
    """Snakemake and a scheduler kill what they started."""
    with waiting(python, tmp_path) as client:
        client.kill()
        until(lambda: not jobs_in(tmp_path))


def test_a_client_s_signals_reach_its_job(python: Path, tmp_path: Path) -> None:
    with waiting(python, tmp_path) as client:
        client.send_signal(signal.SIGINT)
        code, said = client.wait(), client.stderr.read()  # type: ignore[union-attr]
        # Python's own end while modules are loaded; once the command line runs, its code without a word
        assert code == (1 if b"KeyboardInterrupt" in said else 130)
        assert not jobs_in(tmp_path)


def test_jobs_end_with_the_process_that_serves_them(tmp_path: Path) -> None:
    """A rehearsal that is killed leaves no process behind."""
    code = (
        "import os, time; from saeflow.rehearsal.warm import warm_python\n"
        "with warm_python(os.environ): print('ready', flush=True); time.sleep(600)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"ready\n"
        assert len(jobs_in(tmp_path)) == 2
        owner.kill()
        until(lambda: not jobs_in(tmp_path))
