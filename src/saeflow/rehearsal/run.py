"""Run a rehearsal: write its stand-ins and its parameter file, start the real workflow, say what came of it."""

import importlib.util
import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from saeflow.config import ROOT, check_params, load_params, scorer_file
from saeflow.errors import UserError
from saeflow.files import atomic_file
from saeflow.installed import PROGRAMS
from saeflow.plan import Plan
from saeflow.rehearsal.scale import Rehearsal, rehearsal_of
from saeflow.rehearsal.stand_ins import write_stand_ins
from saeflow.rehearsal.warm import warm_python

logger = logging.getLogger(__name__)

PARAMS, LOG, REPORT = "params.yaml", "rehearsal.log", "results/report.html"
_SAY_EVERY_S = 20.0


class RehearsalFailed(Exception):  # noqa: N818 (it is no fault of the code)
    """A job of the rehearsal failed; the message is one line."""


@contextmanager
def stage() -> Iterator[dict[str, str]]:
    """The environment of rehearsals: offline, one thread a job, jobs that start at once."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with (
        TemporaryDirectory(prefix="saeflow-data-") as cache,
        warm_python(environment | {"HF_DATASETS_CACHE": cache}) as programs,
    ):
        yield environment | {"HF_DATASETS_CACHE": cache, PROGRAMS: str(programs)}


def rehearse(
    preset: Path,
    folder: Path,
    cores: int,
    environment: Mapping[str, str],
    *,
    every_run: bool = False,
) -> str:
    """Rehearse a parameter file.

    What an earlier rehearsal in the same folder made is kept where its parameters and its code are the same.

    Args:
        preset: the parameter file.
        folder: where everything goes: parameters, stand-ins, results, logs.
        cores: of this machine, for the workflow.
        environment: what `stage` gives.
        every_run: see `rehearsal_of`.

    Returns:
        What was made and what cannot be rehearsed, one line each.

    Raises:
        UserError: the parameter file is at fault, or a job found it to be.
        RehearsalFailed: a job failed for another reason.
    """
    began = time.monotonic()
    if importlib.util.find_spec("snakemake") is None or not (ROOT / "Snakefile").is_file():
        raise UserError(
            f"rehearse: expected Snakemake and {ROOT / 'Snakefile'}, found not both. Run it in a checkout of saeflow, in the "
            "environment that `make setup` makes."
        )
    params = load_params(preset)
    rehearsal = rehearsal_of(params, every_run=every_run)
    folder.mkdir(parents=True, exist_ok=True)
    _own_scorer(params, folder)
    write_stand_ins(rehearsal.stand_ins, folder)
    with atomic_file(folder / PARAMS) as staged:
        text = yaml.safe_dump(rehearsal.params, sort_keys=False, allow_unicode=True, width=120)
        staged.write_text(
            f"# The rehearsal of {preset}, made by `saeflow rehearse`.\n{text}", encoding="utf-8"
        )
    _check(folder)
    _run_workflow(folder, cores, environment)
    return _said(preset, params, rehearsal, folder, time.monotonic() - began)


def _own_scorer(params: Mapping[str, Any], folder: Path) -> None:
    """Take a scorer of the user's own along: modules are looked for in the working directory."""
    own = scorer_file(params["evaluation"].get("interpretability") or {})
    if own is not None and own.parent == Path.cwd():
        shutil.copyfile(own, folder / own.name)


def _check(folder: Path) -> None:
    """Validate the rehearsal's parameters where its jobs will run."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        check_params(yaml.safe_load(Path(PARAMS).read_text(encoding="utf-8")), [PARAMS])
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    finally:
        os.chdir(before)


def _run_workflow(folder: Path, cores: int, environment: Mapping[str, str]) -> None:
    """Start Snakemake in the folder, and say now and then how far it is."""
    command = [
        str(Path(environment[PROGRAMS], "snakemake")), "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder),
        "--configfile", str(folder / PARAMS), "--workflow-profile", str(ROOT / "profiles" / "default"),
        "--cores", str(cores), "--quiet", "host", "--", "all",
    ]  # fmt: skip
    failed: list[str] = []
    said, is_error = time.monotonic(), False
    with (
        (folder / LOG).open("w", buffering=1, encoding="utf-8") as log,
        subprocess.Popen(
            command,
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as running,
    ):
        assert running.stdout is not None
        for line in running.stdout:
            log.write(line)
            if found := re.match(r"(?:Error in rule|RuleException in rule) (\w+)", line.strip()):
                is_error = True
                failed.append(f"rule {found[1]}")
            elif is_error and (found := re.search(r"log: (\S+)", line)):
                failed.append(found[1])
                is_error = False
            elif line.startswith("error: "):
                failed.append(line.strip())
            done = re.match(r"(\d+) of (\d+) steps", line)
            if done and (time.monotonic() - said > _SAY_EVERY_S or done[1] == done[2]):
                said = time.monotonic()
                logger.info("%s: %s of %s jobs", folder.name, done[1], done[2])
    if running.returncode:
        raise _failure(folder, failed)


def _failure(folder: Path, failed: list[str]) -> Exception:
    """The first thing that went wrong, in one line: the user's fault where a job says so."""
    rule = next((name for name in failed if name.startswith("rule ")), "the workflow")
    logs = [folder / name for name in failed if name.endswith(".log")]
    written = [path.read_text(encoding="utf-8").splitlines() for path in logs if path.is_file()]
    lines = [line for lines in written for line in lines if line.strip()]
    faults = [line for line in (*lines, *failed) if line.startswith("error: ")]
    where = f"All of it: {', '.join(map(str, [*logs[:1], folder / LOG]))}."
    if faults:
        return UserError(f"{rule}: {faults[0].removeprefix('error: ')} {where}")
    last = lines[-1] if lines else "no message"
    return RehearsalFailed(f"{rule} failed: {last.strip()}. {where}")


def _said(
    preset: Path, params: Mapping[str, Any], rehearsal: Rehearsal, folder: Path, seconds: float
) -> str:
    plan = Plan(rehearsal.params)
    made = (
        f"{folder / REPORT}: {len(params['saes'])} entries, {len(plan.runs)} of {len(Plan(params).runs)} runs, "
        f"{len(rehearsal.params['figures']['names'])} figures and tables, in {seconds:.0f} s."
    )
    fetched = sorted({one.instead_of for one in rehearsal.stand_ins if one.kind in _FETCHED})
    device = params["runtime"]["device"]
    left_out = [
        *([f"fetching {', '.join(fetched)}"] if fetched else []),
        *([f"the device {device}"] if device != "cpu" else []),
        *(["several processes a run"] if params["runtime"]["ranks"]["count"] > 1 else []),
        f"disk, memory and hours (`saeflow plan --params {preset}`)",
    ]
    return f"{made}\nNot rehearsed: {'; '.join(left_out)}. The numbers mean nothing."


_FETCHED = ("models", "texts", "images")
