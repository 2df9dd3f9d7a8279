"""The fault campaign: kills at random moments, damaged files, a full or read-only disk.

    make torture            # about half an hour; writes benchmarks/results/torture.md
    python tests/torture/campaign.py --kills 5 --seed 1 --out FOLDER

A fault is survived when the run that follows ends with the results of an undisturbed one, or when one clear
line names the file at fault; anything else is printed and ends the campaign with exit code 1.
"""

import argparse
import contextlib
import copy
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "workflow")]

import pandas as pd
from conftest import SYNTHETIC, Project
from tables import write

from saeflow.files import file_digest

LONGEST_WAIT_S = 14.0
STAGES = {
    "extraction": "results/stores/**/*.partial", "training": "results/saes/**/*.partial",
    "evaluation": "results/evaluations/**/*.partial", "drawing": "results/figures/*.partial",
}  # fmt: skip
FILES = {
    "store: chunk": "stores/*/train/*.zarr/activations/c/**/*",
    "store: metadata": "stores/*/train/*.zarr/zarr.json",
    "store: array metadata": "stores/*/train/*.zarr/activations/zarr.json",
    "weights": "saes/**/weights.safetensors",
    "config": "saes/**/config.json",
    "steps": "saes/**/steps.csv",
    "dictionary": "sources/*/inputs/dictionary.safetensors",
    "metrics": "evaluations/**/metrics.csv",
    "table": "tables/metrics.csv",
    "figure": "figures/fvu_l0/fvu_l0.svg",
    "provenance": "saes/**/provenance.json",
}


@dataclass
class Score:
    """What was tried, and what did not survive."""

    tried: dict[str, int] = field(default_factory=dict)
    survived: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, kind: str, failure: str | None) -> None:
        self.tried[kind] = self.tried.get(kind, 0) + 1
        self.survived[kind] = self.survived.get(kind, 0) + (failure is None)
        if failure is not None:
            self.failures.append(f"{kind}: {failure}")
            print(f"FAILED {kind}: {failure}", flush=True)

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(
            {"fault": kind, "tried": tried, "survived": self.survived[kind]}
            for kind, tried in sorted(self.tried.items())
        )


def parameters() -> dict[str, Any]:
    """A small run of every step whose training takes some seconds."""
    params = copy.deepcopy(SYNTHETIC)
    params["training"]["tokens"] = 1_000_000
    params["runtime"]["checkpoint_every_s"] = 0.2
    return params


def new_project(folder: Path) -> Project:
    folder.mkdir(parents=True)
    return Project(folder, parameters())


def outcome(project: Project) -> dict[str, Any]:
    """Content digests of stores and SAEs, and the bytes of tables and figures."""
    found = project.contents()
    for path in sorted((project.folder / "results").glob("[tf]*/**/*")):
        if path.is_file() and path.name != "provenance.json":
            found[os.path.relpath(path, project.folder)] = file_digest(path)
    return found


def stage(project: Project) -> str:
    """What was under way when everything was killed."""
    running = [name for name, pattern in STAGES.items() if any(project.folder.glob(pattern))]
    return running[-1] if running else "between jobs"


def end(process: "subprocess.Popen[bytes]", how: signal.Signals) -> None:
    """Send a signal to a whole process group; what does not heed it in time is killed."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, how)
        if how != signal.SIGKILL:
            process.wait(60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def disturb(
    how: signal.Signals,
    count: int,
    expected: dict[str, Any],
    root: Path,
    rng: random.Random,
    score: Score,
) -> None:
    """Signals at random moments; each run goes on from where the last one was ended."""
    project, done, kinds = new_project(root / f"{how.name}-0"), 0, []
    while done < count:
        project.run("snakemake", "--unlock", code=None)
        process = project.start("snakemake", "--cores", "2", "all")
        try:
            process.wait(rng.uniform(2.0, LONGEST_WAIT_S))
        except subprocess.TimeoutExpired:
            end(process, how)
            done += 1
            kinds.append(f"{how.name} during {stage(project)}")
            print(f"{done} of {count}: {kinds[-1]}", flush=True)
            continue
        settle(project, process.returncode, kinds, expected, score)
        shutil.rmtree(project.folder)
        project, kinds = new_project(root / f"{how.name}-{done}"), []
    project.run("snakemake", "--unlock", code=None)
    last = project.start("snakemake", "--cores", "2", "all")
    settle(project, last.wait(), kinds, expected, score)
    shutil.rmtree(project.folder)


def settle(
    project: Project, code: int, kinds: list[str], expected: dict[str, Any], score: Score
) -> None:
    """Whether a run that was disturbed some times ended as an undisturbed one."""
    failure = None
    if code:
        failure = f"exit code {code}"
    elif (found := outcome(project)) != expected:
        wrong = {name for name in expected | found if expected.get(name) != found.get(name)}
        failure = f"other results: {', '.join(sorted(wrong)[:3])}"
    for kind in kinds:
        score.add(kind, failure)


def damages(whole: bytes, rng: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """A file with one bit flipped, cut short, and gone."""
    if whole:
        place = rng.randrange(len(whole))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        yield "flipped bit", bytes(flipped)
        yield "truncated", whole[: rng.randrange(len(whole))]
    yield "missing", None


def damage(project: Project, count: int, rng: random.Random, score: Score) -> None:
    """Every kind of file, damaged in every way: `verify` must name it and give exit code 2."""
    results = project.folder / "results"
    for kind, pattern in FILES.items():
        files = sorted(path for path in results.glob(pattern) if path.is_file())
        for path in rng.sample(files, min(count, len(files))):
            whole = path.read_bytes()
            for way, data in damages(whole, rng):
                path.unlink() if data is None else path.write_bytes(data)
                text = project.run("saeflow", "verify", code=None)
                named = path.name in text or str(path.parent.relative_to(project.folder)) in text
                is_clear = named and "Traceback" not in text and "error: " in text
                score.add(f"{kind}: {way}", None if is_clear else f"{path}: {text[-300:]}")
                path.write_bytes(whole)
    text = project.run("saeflow", "verify", code=None)
    score.add("all mended", None if "are as they were made" in text else text[-300:])


def damaged_checkpoint(
    expected: dict[str, Any], root: Path, rng: random.Random, score: Score
) -> None:
    """A checkpoint that rotted: named, and after deleting it the run ends as it should."""
    for way in ("flipped bit", "truncated"):
        project = new_project(root / f"checkpoint-{way.split()[0]}")
        process = project.start("snakemake", "--cores", "2", "all")
        found: list[Path] = []
        while not found and process.poll() is None:
            found = list(project.folder.glob("results/saes/**/*.partial/checkpoint*"))
            time.sleep(0.02)
        end(process, signal.SIGKILL)
        path = next(iter(project.folder.glob("results/saes/**/*.partial/checkpoint*")))
        path.write_bytes(dict(damages(path.read_bytes(), rng))[way] or b"")
        project.run("snakemake", "--unlock", code=None)
        text = project.run("snakemake", "--cores", "2", "all", code=None)
        failure = None if path.name in text and "Traceback" not in text else text[-300:]
        path.unlink()
        project.run("snakemake", "--unlock", code=None)
        again = project.start("snakemake", "--cores", "2", "all").wait()
        if failure is None and (again or outcome(project) != expected):
            failure = "the run after it differs"
        score.add(f"checkpoint: {way}", failure)
        shutil.rmtree(project.folder)


def two_at_once(expected: dict[str, Any], root: Path, score: Score) -> None:
    """The second snakemake stops at the lock, the first one ends as it should."""
    project = new_project(root / "two")
    first = project.start("snakemake", "--cores", "2", "all")
    while not list(project.folder.glob(".snakemake/locks/*")) and first.poll() is None:
        time.sleep(0.05)
    text = project.run("snakemake", "--cores", "1", "all", code=None)
    failure = None if "lock" in text.lower() else text[-300:]
    if first.wait() or outcome(project) != expected:
        failure = "the first one differs"
    score.add("two snakemake at once", failure)
    shutil.rmtree(project.folder)


def read_only(expected: dict[str, Any], root: Path, score: Score) -> None:
    """A results folder that cannot be written to: one line, and later the right results."""
    project = new_project(root / "read-only")
    results = project.folder / "results"
    results.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(results)], check=True)
    try:
        project.snakemake("extract")
        subprocess.run(["mount", "-o", "remount,ro", str(results)], check=True)
        text = project.snakemake("all", code=None)
        is_clear = "cannot be written to" in text or "Read-only file system" in text
        failure = None if is_clear else text[-300:]
        subprocess.run(["mount", "-o", "remount,rw", str(results)], check=True)
        project.run("snakemake", "--unlock", code=None)
        if project.start("snakemake", "--cores", "2", "all").wait() or outcome(project) != expected:
            failure = "the run after it differs"
        score.add("read-only results", failure)
    finally:
        subprocess.run(["umount", "-l", str(results)], check=True)


def campaign(kills: int, seed: int, root: Path) -> Score:
    """All faults, from one seed."""
    rng, score = random.Random(seed), Score()
    whole = new_project(root / "undisturbed")
    whole.snakemake("all")
    expected = outcome(whole)
    parts: list[Callable[[], None]] = [
        lambda: disturb(signal.SIGKILL, kills, expected, root, rng, score),
        lambda: disturb(signal.SIGTERM, max(1, kills // 10), expected, root, rng, score),
        lambda: disturb(signal.SIGINT, max(1, kills // 10), expected, root, rng, score),
        lambda: damage(whole, 1 + kills // 50, rng, score),
        lambda: damaged_checkpoint(expected, root, rng, score),
        lambda: two_at_once(expected, root, score),
    ]
    if os.geteuid() == 0:
        parts.append(lambda: read_only(expected, root, score))
    for part in parts:
        part()
    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        score = campaign(chosen.kills, chosen.seed, Path(folder))
    minutes = (time.monotonic() - started) / 60
    print(score.table().to_string(index=False))
    write(
        "torture",
        {"Faults": score.table()},
        f"Seed {chosen.seed}, {minutes:.0f} minutes. Survived: the run after it ended with the results of an "
        "undisturbed one, or one clear line named the damaged file.",
    )
    sys.exit(bool(score.failures))


if __name__ == "__main__":
    main()
