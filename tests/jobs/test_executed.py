"""Run every kind of job of a small workflow under a profiler: what ran is what the job's key digests."""

import ast
import importlib
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import yaml

from saeflow.cli import JOBS, stores
from saeflow.config import ROOT, check_params
from saeflow.jobs import Job, Jobs, tasks
from saeflow.jobs.code import FOLDER, OUTSIDE, package_code
from saeflow.plan import Plan

CODE = package_code()
MODULE_OF = {str(path): module for module, path in CODE.files.items()}
SEEN_AT = set(MODULE_OF)
SMALL = ROOT / "tests/workflow/synthetic.yaml"


class Ran:
    """Return the functions of the package that ran: (module, name of the top-level definition)."""

    def __init__(self) -> None:
        self.found: set[tuple[str, str]] = set()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename in SEEN_AT and not _is_no_code(frame):
            name = code.co_qualname.partition(".")[0]
            if not name.startswith("<") and name != "__getattr__":  # which passes names on
                self.found.add((MODULE_OF[code.co_filename], name))

    def __enter__(self) -> "Ran":
        threading.setprofile(self)
        sys.setprofile(self)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)


def _message_lines(path: Path) -> set[int]:
    """Lines of a file that log or raise."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        is_log = isinstance(node, ast.Expr) and ast.unparse(node).startswith("logger.")
        if is_log or isinstance(node, ast.Raise):
            found |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return found


MESSAGES = {str(path): _message_lines(path) for path in CODE.files.values()}


def _is_no_code(frame: FrameType | None) -> bool:
    """Tell whether a function runs for a module that is part of no job's code, or for a message."""
    while frame is not None:
        if frame.f_lineno in MESSAGES.get(frame.f_code.co_filename, ()):
            return True
        module = MODULE_OF.get(frame.f_code.co_filename)
        if module is not None and module.split(".")[1:2] != [] and module.split(".")[1] in OUTSIDE:
            return True
        frame = frame.f_back
    return False


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The small synthetic workflow with a page, probes of latents, two seeds and a tuned rival, in a folder of its own."""
    values = yaml.safe_load(SMALL.read_text())
    found = {"mean_l0_of": "adaptive-k/d128-seed0"}
    guided = values["saes"]["topk"] | {"options": {"k": found}, "ranges": {"lr": [1.0e-4, 1.0e-2]}}
    values["sweep"] = {"trials": 2, "l0": 8}
    values["saes"] = {"adaptive-k": values["saes"]["adaptive-k"], "topk-guided": guided}
    values["figures"]["names"] += ["headline", "table_headline", "table_sweep"]
    values["seeds"] = [0, 1]
    values["training"]["tokens"] = 8192
    values["stores"]["synthetic"] |= {"train_rows": 8192, "evaluation_rows": 1024}
    for name in sorted(CODE.files):  # what runs while a module is imported is not of a job
        if ".kernels" not in name and not name.endswith("__main__"):
            importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("executed"))
        yield check_params(values, [str(SMALL)])


def run(job: Job, runtime: str) -> None:
    """Run a job's command as its rule does, in this process."""
    told = tasks([job])
    machine = {"runtime": runtime, "threads": 1}
    command = JOBS[job.command]
    if job.command == "merge":
        part = Path(f"{job.path}.parts/0-of-1")
        stores.extract(told, out=part, **machine)  # type: ignore[arg-type]
        command(told, [part])
        return
    names = command.__code__.co_varnames[: command.__code__.co_argcount]
    command(told, **{name: value for name, value in machine.items() if name in names})


def test_what_ran_is_what_the_key_digests(params: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    runtime = json.dumps(params["runtime"])
    commands = set()
    for job in Jobs(Plan(params)).every():
        with Ran() as ran:
            run(job, runtime)
        reached = job.reached.nodes
        missed = {
            f"{module}.{name}"
            for module, name in ran.found
            if (module, name) not in reached and module.split(".")[1] not in OUTSIDE
        }
        assert not missed, f"{job.command} {job.result}"
        assert job.command == "collect" or len(ran.found) > 3
        commands.add(job.command)
    assert commands >= {
        "prepare",
        "merge",
        "train",
        "evaluate",
        "baselines",
        "stability",
        "rivals",
        "choose",
        "collect",
        "draw",
        "report",
    }
    assert FOLDER in Path(stores.__file__).parents
