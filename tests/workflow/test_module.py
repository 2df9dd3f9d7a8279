"""The workflow as a module of another one, read from a git repository, as snakedeploy sets it up."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from .conftest import ROOT, Project, job_counts

pytestmark = pytest.mark.workflow

DEPLOYED = """
configfile: "config/config.yaml"

module saeflow:
    snakefile: "git+file://{repository}/workflow/Snakefile@main"
    config: config

use rule * from saeflow
"""
"""snakedeploy's template for a workflow, with a repository of this machine."""


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def deployed(synthetic: Project, tmp_path: Path) -> Path:
    """A folder as `snakedeploy deploy-workflow` leaves it, with the parameters of the synthetic run."""
    repository, folder = tmp_path / "repository", tmp_path / "mine"
    repository.mkdir()
    for name in ("workflow", "config", "profiles"):
        shutil.copytree(ROOT / name, repository / name)
    git(repository, "init", "-q", "-b", "main")
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "The workflow")
    (folder / "workflow").mkdir(parents=True)
    (folder / "workflow/Snakefile").write_text(DEPLOYED.format(repository=repository))
    shutil.copytree(repository / "profiles", folder / "profiles")
    (folder / "config").mkdir()
    (folder / "config/config.yaml").write_text(yaml.safe_dump(synthetic.params))
    return folder


def test_without_a_target_and_deployed_there_are_the_jobs_of_the_whole(
    synthetic: Project, deployed: Path
) -> None:
    whole = synthetic.todo("all")
    assert whole["write_report"] == 1
    own = synthetic.run("snakemake", "--cores", "2", "-n", "--quiet", "rules")
    assert job_counts(own) == whole
    done = subprocess.run(
        ["snakemake", "--cores", "2", "-n", "--quiet", "rules"],
        cwd=deployed, env=synthetic.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    assert job_counts(done.stdout) == whole


def test_a_deployed_workflow_runs(synthetic: Project, deployed: Path) -> None:
    command = ["snakemake", "--cores", "2", "extract"]
    done = subprocess.run(
        command, cwd=deployed, env=synthetic.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    assert {path.parent.name for path in deployed.glob("results/stores/*/*/provenance.json")} == {
        "train",
        "evaluation",
    }


def test_the_configuration_that_is_deployed_is_the_tiny_preset() -> None:
    assert (ROOT / "config/config.yaml").resolve() == ROOT / "presets/tiny.yaml"
