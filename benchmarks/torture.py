"""The fault campaign: kills at random moments, damaged files, disks, clocks and hubs that fail.

    make torture                               # about an hour
    python benchmarks/torture.py --kills 3 --inputs 500 --seed 1 --no-tests --out FOLDER
    python benchmarks/torture.py --kills 0     # the rest, beside the last table of faults
    python benchmarks/torture.py --kills 0 --inputs 0      # a stream of windows alone

A fault is survived when the run that follows ends with the results of an undisturbed one, or when one clear
line names the file at fault; anything else is printed, and gives exit code 1. Faults are drawn from the seed;
where a signal finds a run depends on the machine as well. A read-only folder needs root, a clock that jumps
the program `faketime`; where one is missing, its row says so.
"""

import argparse
import contextlib
import copy
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from moments import LONGEST_WAIT_S, OF_WINDOWS, end, frozen, job_seconds
from tables import RESULTS, last_tables, replaced, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "workflow"))

from conftest import ROOT, SYNTHETIC, Project
from saeflow.files import file_digest

# Files by kind, and a result whose making reads them.
FILES = {
    "store chunk": ("stores/*/train/*.zarr/activations/c/**/*", "saes/*/*/topk/*"),
    "store metadata": ("stores/*/train/*.zarr/zarr.json", "saes/*/*/topk/*"),
    "array metadata": ("stores/*/train/*.zarr/activations/zarr.json", "saes/*/*/topk/*"),
    "weights": ("saes/*/*/topk/*/weights.safetensors", "evaluations/*/*/topk/*"),
    "SAE config": ("saes/*/*/topk/*/config.json", "evaluations/*/*/topk/*"),
    "training steps": ("saes/*/*/topk/*/steps.csv", "tables"),
    "true dictionary": ("sources/*/inputs/dictionary.safetensors", "stores/*/evaluation"),
    "metrics": ("evaluations/*/*/topk/*/metrics.csv", "tables"),
    "table": ("tables/metrics.csv", "figures/fvu_l0"),
    "figure": ("figures/fvu_l0/fvu_l0.svg", None),
    "provenance": ("saes/*/*/topk/*/provenance.json", "evaluations/*/*/topk/*"),
}
WAYS = ("flipped bit", "truncated", "missing")
WITH_TESTS = {"hub": "tests/sources/test_hub.py", "full disk": "tests/workflow/test_full_disk.py"}


@dataclass
class Score:
    """Count of attempts, with those that failed."""

    tried: dict[str, int] = field(default_factory=dict)
    survived: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, kind: str, failure: str | None) -> None:
        self.tried[kind] = self.tried.get(kind, 0) + 1
        self.survived[kind] = self.survived.get(kind, 0) + (failure is None)
        if failure is not None:
            self.failures.append(f"{kind}: {failure}")
            print(f"FAILED {kind}: {failure}", flush=True)

    def skip(self, kind: str) -> None:
        self.tried[kind] = self.survived[kind] = 0

    def table(self) -> pd.DataFrame:
        counts = {"tried": self.tried, "survived": self.survived}
        return pd.DataFrame(counts).sort_index().rename_axis("fault").reset_index()


def parameters() -> dict[str, Any]:
    """A small run of every step whose training takes some seconds."""
    params = copy.deepcopy(SYNTHETIC)
    params["saes"] = {name: params["saes"][name] for name in ("topk", "adaptive-k")}
    params["figures"]["names"] = ["fvu_l0", "training", "complexity"]
    params["training"]["tokens"] = 400_000
    params["runtime"]["checkpoint_every_s"] = 0.2
    return params


def streamed() -> dict[str, Any]:
    """A small run whose SAEs are trained on a stream of four windows, an epoch and a quarter."""
    params = parameters()
    params["complexity"] = {}
    params["saes"] = {name: SYNTHETIC["saes"][name] for name in ("topk", "relu")}
    # Many files, so that the deletion of a window takes some time.
    layout = {"window_rows": 5000, "keep_windows": 2, "chunk_rows": 64, "shard_rows": 64}
    params["stores"]["synthetic"] |= layout
    params["figures"]["names"] = ["fvu_l0", "training"]
    params["training"]["tokens"] = 25_000
    params["runtime"] |= {"extraction_jobs": 1, "saes_per_job": 8}
    return params


def outcome(project: Project) -> dict[str, Any]:
    """Content digests of stores and SAEs, and the bytes of tables and figures but for the speeds."""
    found = project.contents()
    for path in sorted((project.folder / "results").glob("[tf]*/**/*")):
        name = os.path.relpath(path, project.folder)
        if path.name == "training.csv":
            found[name] = pd.read_csv(path).drop(columns="tokens_per_s", errors="ignore").to_csv()
        elif path.is_file() and path.name != "provenance.json":
            found[name] = file_digest(path)
    return found


class Campaign:
    """All faults, from one seed, against the results of one undisturbed run of some parameters."""

    def __init__(self, folder: Path, seed: int, params: dict[str, Any]) -> None:
        self.folder, self.params = folder, params
        self.rng = random.Random(seed)
        self.score = Score()
        self.undisturbed = self.project("undisturbed")
        self.undisturbed.snakemake("all")
        self.expected, self.lengths = outcome(self.undisturbed), job_seconds(self.undisturbed)

    def project(self, name: str = "disturbed") -> Project:
        """A project without results; in one folder, so that compiled kernels are found again."""
        folder = self.folder / name
        for made in ("results", "logs", ".snakemake"):
            shutil.rmtree(folder / made, ignore_errors=True)
        if folder.exists():
            return self.disturbed
        folder.mkdir()
        self.disturbed = Project(folder, self.params)
        return self.disturbed

    def failure(self, project: Project) -> str | None:
        """Results that are not the expected ones, if there are any."""
        try:
            found = outcome(project)
        except ValueError as error:
            return f"a result that cannot be read: {error}"
        if found == self.expected:
            return None
        names = self.expected.keys() | found.keys()
        wrong = sorted(name for name in names if self.expected.get(name) != found.get(name))
        return f"other results: {', '.join(wrong[:3])}"

    def finish(self, project: Project) -> str | None:
        """Run a disturbed project to its end; what is wrong with it then, if anything is."""
        project.run("snakemake", "--unlock")
        try:
            project.snakemake("all")
        except AssertionError as error:
            return str(error)
        return self.failure(project)

    def signals(
        self, how: signal.Signals, count: int, aims: Iterable[str | None] = (None,)
    ) -> None:
        """Signals at random moments; each run goes on from where the last one was ended.

        Args:
            how: the signal.
            count: of signals.
            aims: jobs in which the moments lie, in turn; None for a moment of the whole run.
        """
        done, every = 0, itertools.cycle(aims)
        while done < count:
            project, kinds = self.project(), []
            while done < count:
                project.run("snakemake", "--unlock")
                process = project.start("snakemake", "--cores", "2", "all")
                aim = next(every)
                if (found := frozen(project, process, aim, self.rng, self.lengths)) is None:
                    break
                end(process, how)
                done += 1
                stage = aim if aim in found else next(iter(sorted(found)), "between jobs")
                kinds.append(f"{how.name} during {stage}")
                print(f"{done} of {count}: {kinds[-1]}", flush=True)
            failure = self.finish(project)
            for kind in kinds:
                self.score.add(kind, failure)

    def clock(self, count: int) -> None:
        """Files that seem days older or newer than they are, and a clock that is days off, either way."""
        if shutil.which("faketime") is None:
            return self.score.skip("clock that jumps")
        for number in range(count):
            project = self.project()
            process = project.start("snakemake", "--cores", "2", "all")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self.rng.uniform(6.0, LONGEST_WAIT_S))
            end(process, signal.SIGKILL)
            for path in sorted((project.folder / "results").rglob("*")):
                seconds = time.time() + self.rng.uniform(-10, 10) * 86400
                os.utime(path, (seconds, seconds))
            project.run("snakemake", "--unlock")
            project.run(
                *("env", "NO_FAKE_STAT=1", "FAKETIME_DONT_FAKE_MONOTONIC=1"),
                *("faketime", "-f", "+9d" if number % 2 else "-9d"),
                *("snakemake", "--cores", "2", "all"),
                code=None,
            )
            self.score.add("clock that jumps", self.finish(project))
        return None

    def damaged(self, path: Path, way: str) -> None:
        """Damage a file in place."""
        if way == "missing":
            path.unlink()
            return
        data = bytearray(path.read_bytes())
        place = self.rng.randrange(len(data))
        if way == "truncated":
            del data[place:]
        else:
            data[place] ^= 1 << self.rng.randrange(8)
        path.write_bytes(bytes(data))

    def rot(self, count: int) -> None:
        """Every kind of file damaged: `verify` names it, and what reads it never takes it for right."""
        project = self.undisturbed
        results, whole = project.folder / "results", self.folder / "whole"
        shutil.copytree(results, whole)
        for place, (kind, (pattern, reader)) in enumerate(FILES.items()):
            files = sorted(path for path in results.glob(pattern) if path.is_file())
            for number in range(count):
                path, way = self.rng.choice(files), WAYS[(place + number) % len(WAYS)]
                self.damaged(path, way)
                text = project.run("saeflow", "verify", code=None)
                self.score.add(f"{kind}: {way}, verified", self.unclear(path, text))
                if reader is not None:
                    (folder,) = results.glob(reader)
                    shutil.rmtree(folder)
                    record = os.path.relpath(folder / "provenance.json", project.folder)
                    text = project.snakemake(record, code=None)
                    right = self.failure(project) is None
                    failure = None if right else self.unclear(path, text)
                    self.score.add(f"{kind}: {way}, read", failure)
                shutil.rmtree(results)
                shutil.copytree(whole, results)
                print(f"{kind}: {way}", flush=True)
        text = project.run("saeflow", "verify", code=None)
        self.score.add("all files fixed", None if "are as they were made" in text else text[-2000:])

    @staticmethod
    def unclear(path: Path, text: str) -> str | None:
        """Return a command's output, unless a line of it names a damaged file or its folder."""
        lines = [line for line in text.splitlines() if "error: " in line]
        named = any(path.name in line or path.parent.name in line for line in lines)
        return None if named and "Traceback" not in text else f"{path}: {text[-2000:]}"

    def checkpoints(self) -> None:
        """A checkpoint that rotted: named, and once it is deleted the run ends as it should."""
        for way in WAYS[:2]:
            project = self.project()
            process = project.start("snakemake", "--cores", "2", "all")
            pattern = "results/saes/**/*.partial/checkpoint-*"
            while not list(project.folder.glob(pattern)) and process.poll() is None:
                time.sleep(0.02)
            end(process, signal.SIGKILL)
            path = max(project.folder.glob(pattern))  # of several, the last, which is read
            self.damaged(path, way)
            project.run("snakemake", "--unlock")
            text = project.snakemake("all", code=None)
            is_right = not path.exists() and self.failure(project) is None
            failure = None if is_right else self.unclear(path, text)
            path.unlink(missing_ok=True)
            self.score.add(f"checkpoint: {way}", failure or self.finish(project))

    def two_at_once(self) -> None:
        """The second snakemake stops at the lock, the first one ends as it should."""
        project = self.project()
        first = project.start("snakemake", "--cores", "2", "all")
        while not list(project.folder.glob(".snakemake/locks/*")) and first.poll() is None:
            time.sleep(0.05)
        text = project.run("snakemake", "--cores", "1", "all", code=None)
        first.wait()
        failure = None if "lock" in text.lower() else text[-2000:]
        self.score.add("two snakemake at once", failure or self.failure(project))

    def read_only(self) -> None:
        """A results folder that cannot be written to: one line, and later the right results."""
        if os.geteuid():
            return self.score.skip("read-only results")
        project = self.project()
        results = project.folder / "results"
        results.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(results)], check=True)
        try:
            project.snakemake("extract")
            subprocess.run(["mount", "-o", "remount,ro", str(results)], check=True)
            text = project.snakemake("all", code=None)
            is_clear = "cannot be written to" in text or "Read-only file system" in text
            subprocess.run(["mount", "-o", "remount,rw", str(results)], check=True)
            failure = None if is_clear and "Traceback" not in text else text[-2000:]
            self.score.add("read-only results", failure or self.finish(project))
        finally:
            subprocess.run(["umount", "-l", str(results)], check=True)
        return None

    def tests(self) -> None:
        """The faults that tests of their own cover."""
        report = self.folder / "tests.xml"
        for kind, path in WITH_TESTS.items():
            command = ["-m", "pytest", "-q", f"--junitxml={report}", path]
            subprocess.run([sys.executable, *command], cwd=ROOT, check=False)
            for case in ElementTree.parse(report).iter("testcase"):
                if case.find("skipped") is None:
                    broken = [case.find(name) for name in ("failure", "error")]
                    failures = [str(node.get("message")) for node in broken if node is not None]
                    name = str(case.get("name")).removeprefix("test_").replace("_", " ")
                    self.score.add(f"{kind}: {name}", failures[0] if failures else None)


def changed_inputs(count: int, seed: int) -> Score:
    """Inputs from outside that are changed at random, read in a process of their own (tests/fuzz/inputs)."""
    score = Score()
    command = [sys.executable, "-m", "inputs", f"--count={count}", f"--seed={seed}"]
    done = subprocess.run(
        command, cwd=ROOT / "tests" / "fuzz", stdout=subprocess.PIPE, text=True, check=False
    )
    lines = done.stdout.splitlines()
    if done.returncode not in (0, 1) or not lines:
        score.add("input", f"the process died with {done.returncode}: {lines[-1:]}")
        return score
    found = json.loads(lines[-1])
    wrong = [(f"input: {kind}", what) for kind, what in found["wrong"]]
    for kind, tried in found["tried"].items():
        name = f"input: {kind}"
        score.tried[name] = score.survived[name] = tried - sum(one == name for one, _ in wrong)
    for name, what in wrong:
        score.add(name, what)
    return score


def main() -> None:
    parser = argparse.ArgumentParser(description="Faults of every kind, and what survived them.")
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs; the rest goes with them")
    parser.add_argument("--stream-kills", type=int, default=30, help="SIGKILLs of a stream")
    parser.add_argument("--inputs", type=int, default=20_000, help="inputs changed at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-tests", action="store_true", help="leave out what has tests")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table")
    chosen = parser.parse_args()
    tables, failures = last_tables("torture", chosen.out), []
    for title, made in (
        ("Inputs", lambda: changed_inputs(chosen.inputs, chosen.seed) if chosen.inputs else None),
        ("Faults", lambda: faults(chosen) if chosen.kills else None),
        ("Kills of a stream", lambda: kills_of_a_stream(chosen) if chosen.stream_kills else None),
    ):
        started = time.monotonic()
        if (score := made()) is None:
            continue
        minutes = (time.monotonic() - started) / 60
        tables = replaced(tables, {f"{title}, seed {chosen.seed}, {minutes:.0f} minutes": score.table()})  # fmt: skip
        failures += score.failures
    write(
        "torture",
        tables,
        "Survived: the run after it ended with the results of an undisturbed one, or one clear line named the "
        "damaged file; an input was read right, or refused in such a line, within 2 GB.",
        chosen.out,
    )
    sys.exit(bool(failures))


def faults(chosen: argparse.Namespace) -> Score:
    """The campaign of faults."""
    tenth = max(1, chosen.kills // 10)
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), chosen.seed, parameters())
        campaign.rot(max(1, chosen.kills // 30))
        campaign.checkpoints()
        campaign.two_at_once()
        campaign.read_only()
        campaign.clock(max(1, tenth // 2))
        for number, count in ((signal.SIGTERM, tenth), (signal.SIGINT, tenth), (signal.SIGKILL, chosen.kills)):  # fmt: skip
            campaign.signals(number, count)
        if not chosen.no_tests:
            campaign.tests()
    return campaign.score


def kills_of_a_stream(chosen: argparse.Namespace) -> Score:
    """SIGKILLs in each kind of job that makes, uses or deletes a window of a stream."""
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), chosen.seed, streamed())
        campaign.signals(signal.SIGKILL, chosen.stream_kills, OF_WINDOWS)
    return campaign.score


if __name__ == "__main__":
    main()
