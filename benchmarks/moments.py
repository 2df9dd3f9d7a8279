"""Moments at which a run of the workflow is ended: the jobs that are under way, read from its processes and its windows."""

import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "workflow"))

from conftest import Project
from saeflow.provenance import is_whole

LONGEST_WAIT_S = 10.0
"""Longest time from the start of a run to a signal."""
DELETION = "deletion of a window"
# Jobs by the command of saeflow that runs, and a part of one of its arguments. The first that fits names the job.
WINDOWS = {
    "extraction of a window": ("extract", "/train.parts/"), "merging of a window": ("merge", "/train.windows/"),
    "training on a window": ("train", "/train.windows/"),
}  # fmt: skip
STAGES = {
    "extraction": ("extract", ""), "merging": ("merge", ""), "training": ("train", ""), "probing": ("probe", ""),
    "evaluation": ("evaluate", ""), "drawing": ("draw", ""),
}  # fmt: skip
LOGS = {
    "extraction of a window": "extract_part/*_train_*", "merging of a window": "merge_window/*_train_*",
    "training on a window": "train_window/*",
}  # fmt: skip
"""Snakemake's records of the jobs of windows, which hold their seconds."""
OF_WINDOWS = (*WINDOWS, DELETION)
"""Jobs that make, use and delete the windows of a stream."""


def under_way(project: Project, process: "subprocess.Popen[bytes]") -> set[str]:
    """Name the jobs of a run that are under way, by its processes."""
    found = set()
    is_stream = any("keep_windows" in store for store in project.params["stores"].values())
    known = (WINDOWS if is_stream else {}) | STAGES
    for one in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # has ended meanwhile
            session = one.joinpath("stat").read_text().rpartition(")")[2].split()[3]
            if int(session) != process.pid:
                continue
            arguments = one.joinpath("cmdline").read_bytes().decode().split("\0")
            if "saeflow" in arguments[:-1]:
                command, *rest = arguments[arguments.index("saeflow") + 1 :]
                names = (
                    name
                    for name, (own, part) in known.items()
                    if own == command and any(part in argument for argument in rest)
                )
                found.update([*names][:1])
    return found


def job_seconds(project: Project) -> dict[str, float]:
    """Seconds that a job of each kind took in a run that has ended, their medians; of kinds that were in it."""
    found = {}
    for job, pattern in LOGS.items():
        files = project.folder.glob(f"logs/benchmarks/{pattern}.tsv")
        if taken := [float(path.read_text().splitlines()[1].split("\t")[0]) for path in files]:
            found[job] = statistics.median(taken)
    return found


def halved(project: Project) -> set[Path]:
    """Windows that lack a file. They are made aside and renamed when whole, so that these are being deleted, or were at a kill."""
    windows = project.folder.glob("results/stores/*/train.windows/[0-9]*")
    return {one for one in windows if one.name.isdigit() and not is_whole(one) and one.is_dir()}


def freeze(process: "subprocess.Popen[bytes]") -> None:
    """Stop a whole process group where it is, so that the stage which is read is the one that the signal finds."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGSTOP)


def end(process: "subprocess.Popen[bytes]", how: signal.Signals) -> None:
    """Send a signal to a whole process group; what does not heed it in time is killed."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, how)
        os.killpg(process.pid, signal.SIGCONT)
        if how != signal.SIGKILL:
            process.wait(60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def frozen(
    project: Project,
    process: "subprocess.Popen[bytes]",
    aim: str | None,
    rng: random.Random,
    lengths: Mapping[str, float],
) -> set[str] | None:
    """Wait for a random moment of a whole run, or of its next job of one kind, and freeze the run there.

    Args:
        project: in which the run is.
        process: of Snakemake, in a session of its own.
        aim: the job in which the moment lies; None for a moment of the whole run.
        rng: where the moment comes from.
        lengths: seconds of jobs by kind, see `job_seconds`.

    Returns:
        The jobs under way; None where the run ended first.
    """
    before = halved(project)
    if aim is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(2.0, LONGEST_WAIT_S))
            return None
    elif aim == DELETION:  # takes milliseconds
        while halved(project) <= before:
            if process.poll() is not None:
                return None
            time.sleep(0.0005)
    else:
        while aim not in under_way(project, process):
            if process.poll() is not None:
                return None
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, lengths[aim]))
    freeze(process)
    is_deletion = not halved(project) <= before
    return under_way(project, process) | ({DELETION} if is_deletion else set())
