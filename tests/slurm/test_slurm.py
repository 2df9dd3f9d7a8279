"""Whatever happens to jobs and to snakemake on a cluster, results are those of a local run."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..workflow.conftest import ROOT, Project
from .cluster import Cluster, ask
from .conftest import edited_profile, small

pytestmark = pytest.mark.workflow
LONG = 1_500_000  # tokens: some ten seconds of training


def wait_for(
    is_there: Callable[[], Any], process: "subprocess.Popen[bytes]", limit_s: float
) -> None:
    end = time.monotonic() + limit_s
    while not is_there():
        assert process.poll() is None, "snakemake ended before"
        assert time.monotonic() < end
        time.sleep(0.1)


def submitted() -> list[str]:
    """State of every job the cluster has seen, first to last."""
    return ask("squeue", "-h", "-t", "all", "-S", "i", "-o", "%T").split()


def saes(project: Project) -> dict[str, Any]:
    """Content digests of the trained SAEs."""
    found = {name: content for name, content in project.contents().items() if "/saes/" in name}
    assert found
    return found


def checkpoints(project: Project) -> list[Path]:
    return list(project.folder.glob("results/saes/**/*.partial/checkpoint*"))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The whole small workflow, run locally."""
    project = Project(tmp_path_factory.mktemp("local"), small(), cold=True)
    project.snakemake("all")
    return project


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A longer training, run locally: what the disturbed ones must give."""
    project = Project(tmp_path_factory.mktemp("trained"), small(LONG), cold=True)
    project.snakemake("train")
    return project


@pytest.fixture
def extracted(trained: Project, tmp_path: Path) -> Project:
    """A project with stores and no SAE."""
    project = Project(tmp_path, small(LONG), cold=True)
    project.snakemake("extract")
    return project


def profile_of(project: Project, **train: Any) -> str:
    return str(edited_profile(project.folder / "slurm", {"train_sae": train} if train else None))


def test_the_whole_workflow_as_the_guide_says(
    cluster: Cluster, local: Project, tmp_path: Path
) -> None:
    guide = (ROOT / "docs" / "cluster.md").read_text()
    looks = re.findall(r"`(s(?:info|queue) [^`]*)`", guide)
    commands = re.findall(r"snakemake -[^`#\n]* (?:all|inputs)\b", guide)
    fetch, dry_run, run = commands
    assert len(looks) >= 3
    project = Project(tmp_path, small(), cold=True)
    edited_profile(project.folder / "workflow" / "profiles" / "slurm")
    before = len(submitted())
    for command in (*looks, fetch, dry_run):
        project.run("bash", "-c", command)
    assert len(submitted()) == before
    assert list(project.folder.glob("results/sources/*/inputs/provenance.json"))
    project.run("bash", "-c", run)
    jobs = submitted()[before:]
    assert len(jobs) >= 10
    assert set(jobs) == {"COMPLETED"}
    assert project.contents() == local.contents()
    assert (project.folder / "results" / "report.html").exists()
    assert project.todo() == {}
    assert "are as they were made" in project.run("saeflow", "verify")


def test_a_cancelled_job_is_submitted_again_and_goes_on(
    cluster: Cluster, trained: Project, extracted: Project
) -> None:
    before = len(submitted())
    process = extracted.start("snakemake", "--profile", profile_of(extracted), "train")
    wait_for(lambda: checkpoints(extracted), process, 120)
    subprocess.run(["scancel", "--user=root"], check=True)
    assert process.wait(300) == 0
    assert submitted()[before:] == ["CANCELLED", "COMPLETED"]
    assert saes(extracted) == saes(trained)


def test_a_job_over_its_memory_gets_more(
    cluster: Cluster, trained: Project, extracted: Project
) -> None:
    before = len(submitted())
    profile = profile_of(extracted, mem_mb="500 * attempt")
    extracted.run("snakemake", "--profile", profile, "train")
    states = submitted()[before:]
    assert states[0] in ("FAILED", "OUT_OF_MEMORY")
    assert states[-1] == "COMPLETED"
    assert saes(extracted) == saes(trained)


@pytest.mark.longest
def test_a_job_over_its_time_goes_on_from_its_checkpoint(cluster: Cluster, tmp_path: Path) -> None:
    """SLURM ends jobs a while after their minute is over; the SIGTERM makes a checkpoint."""
    params = small(16_000_000)
    params["runtime"]["checkpoint_every_s"] = 1e6  # none but the signal's
    project = Project(tmp_path, params, cold=True)
    project.snakemake("extract")
    before = len(submitted())
    process = project.start(
        "snakemake", "--profile", profile_of(project, runtime="1 if attempt < 2 else 20"), "train"
    )
    wait_for(lambda: checkpoints(project), process, 200)
    first = int(checkpoints(project)[0].name.split("-")[1])
    assert first > 0
    assert process.wait(500) == 0
    assert submitted()[before:] == ["TIMEOUT", "COMPLETED"]
    logs = "\n".join(path.read_text() for path in project.folder.glob("logs/train_sae/**/*.log"))
    assert "going on from" in logs
    (tmp_path / "undisturbed").mkdir()
    undisturbed = Project(tmp_path / "undisturbed", params, cold=True)
    assert undisturbed.start("snakemake", "--cores", "2", "train").wait(2000) == 0
    assert saes(project) == saes(undisturbed)


def test_interrupting_snakemake_cancels_its_jobs(
    cluster: Cluster, trained: Project, extracted: Project
) -> None:
    profile = profile_of(extracted)
    process = extracted.start("snakemake", "--profile", profile, "train")
    wait_for(lambda: checkpoints(extracted), process, 120)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(120) != 0
    end = time.monotonic() + 60
    while ask("squeue", "-h"):
        assert time.monotonic() < end
        time.sleep(0.5)
    assert not list(extracted.folder.glob("results/saes/**/weights.safetensors"))
    extracted.run("snakemake", "--profile", profile, "train")
    assert saes(extracted) == saes(trained)


def test_a_killed_snakemake_leaves_jobs_that_end_and_a_lock(
    cluster: Cluster, trained: Project, extracted: Project
) -> None:
    profile = profile_of(extracted)
    process = extracted.start("snakemake", "--profile", profile, "train")
    wait_for(lambda: checkpoints(extracted), process, 120)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 300
    while ask("squeue", "-h"):  # as docs/cluster.md says: wait for them
        assert time.monotonic() < end
        time.sleep(0.5)
    extracted.run("snakemake", "--unlock")
    extracted.run("snakemake", "--profile", profile, "train")
    assert saes(extracted) == saes(trained)
