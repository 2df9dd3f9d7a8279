"""A copy of the project with a tiny parameter file, in which the real workflow runs."""

import atexit
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from saeflow.rehearsal.warm import warm_python

ROOT = Path(__file__).parents[2]


@cache
def programs() -> str:
    """A folder with a `python` that has imported what jobs need: see saeflow.rehearsal.warm."""
    python = warm_python(os.environ | {"PYTHONPATH": str(ROOT / "src")})
    atexit.register(python.__exit__, None, None, None)
    return str(python.__enter__())


class Project:
    """A checkout of its own: commands run in it, with this environment's programs.

    Args:
        cold: start a Python for each command and each job, as a user's run does. Elsewhere Snakemake, saeflow and the jobs
            are forked from a process that has imported them and this checkout's package already, which saves most of a
            small job's time. It may be changed between commands.

    Attributes:
        timeout_s: seconds after which a command is given up.
    """

    timeout_s = 600

    def __init__(self, folder: Path, params: dict[str, Any], *, cold: bool = False) -> None:
        self.folder, self.cold = folder, cold
        for name in ("Snakefile", "dvc.yaml", "requirements.lock", ".gitignore", ".dvcignore"):
            shutil.copy(ROOT / name, folder / name)
        for name in ("workflow", "profiles", "src", "envs", ".dvc"):
            # What Python and numba compiled for this checkout, and the cache of its code, come along.
            ignore = shutil.ignore_patterns("*.egg-info", "cache", "tmp")
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        self.params = params
        self.write(params)

    def write(self, params: dict[str, Any]) -> None:
        (self.folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))

    @property
    def environment(self) -> dict[str, str]:
        own = {
            "PYTHONPATH": str(self.folder / "src"),
            "DVC_NO_ANALYTICS": "1",
            "PYTHONDONTWRITEBYTECODE": "",
        }
        places = [str(Path(sys.executable).parent), os.environ["PATH"]]
        if not self.cold:
            places.insert(0, own.setdefault("SAEFLOW_PROGRAMS", programs()))
        return os.environ | own | {"PATH": os.pathsep.join(places)}

    def run(self, *command: str, code: int | None = 0) -> str:
        """Run a command to its end; its output, stdout and stderr together."""
        environment = self.environment
        done = subprocess.run(
            [shutil.which(command[0], path=environment["PATH"]) or command[0], *command[1:]],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=self.timeout_s,
            check=False,
        )
        if code is not None:
            assert done.returncode == code, (
                f"{command}: exit {done.returncode}\n{done.stdout[-6000:]}"
            )
        return done.stdout

    def start(self, *command: str) -> "subprocess.Popen[bytes]":
        """Start a command in a process group of its own, which heeds Ctrl-C even if we do not.

        The program is the environment's own, so that a signal meets Snakemake itself.
        """
        own = shutil.which(command[0], path=str(Path(sys.executable).parent))
        return subprocess.Popen(
            [own or command[0], *command[1:]],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def snakemake(self, *arguments: str, code: int | None = 0) -> str:
        return self.run("snakemake", "--cores", "2", *arguments, code=code)

    def todo(self, *targets: str) -> dict[str, int]:
        """Count the jobs of each rule that a run would start."""
        text = self.snakemake(*(targets or ("all",)), "-n", "--quiet", "rules")
        return job_counts(text)

    def contents(self) -> dict[str, Any]:
        """Content digests of every store and SAE."""
        records = sorted((self.folder / "results").rglob("provenance.json"))
        found = {str(path.parent): json.loads(path.read_text()).get("content") for path in records}
        return {
            os.path.relpath(name, self.folder): content
            for name, content in found.items()
            if content
        }


def on_disk(folder: Path) -> int:
    """Bytes of all files below a folder, each counted once however many names it has."""
    sizes = {}
    for place, _, names in os.walk(folder):  # passes over folders that are deleted meanwhile
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(Path(place, name))
                sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


class Watch(threading.Thread):
    """Watches the bytes below a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.peak, self.ended = folder, 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.02):
            self.peak = max(self.peak, on_disk(self.folder))

    def end(self) -> int:
        self.ended.set()
        self.join()
        return self.peak


def kill(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    """Kill a whole run after some seconds, if it has not ended."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def job_counts(text: str) -> dict[str, int]:
    """The job table that Snakemake prints, without its targets and total."""
    counts = {}
    for line in text.splitlines():
        match line.split():
            case [rule, count] if count.isdigit() and rule not in TARGETS:
                counts[rule] = int(count)
    return counts


TARGETS = ("all", "total", "inputs", "extract", "train", "evaluate", "figures")

SYNTHETIC: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "synthetic.yaml").read_text())


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project on synthetic activations, not yet run."""
    return Project(tmp_path_factory.mktemp("synthetic"), SYNTHETIC)
