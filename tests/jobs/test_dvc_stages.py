"""Stages of dvc.yaml against the jobs that they ask Snakemake for: every dependency and every output, and no other."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from saeflow.config import ROOT, load_params
from saeflow.config.schema import params_schema
from saeflow.jobs import Job, Jobs
from saeflow.jobs.code import FOLDER
from saeflow.plan import Plan

STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
OF_EVERY_STAGE = {"Snakefile", "requirements.lock", "workflow", "profiles"}
"""Files that decide how jobs run, and the versions of libraries, which are in every key."""
RECORDS = {".snakemake/metadata", "results/report.html.provenance.json"}
"""Outputs that are no job's result, but stand beside results."""


def outs(stage: str) -> set[str]:
    return {next(iter(one)) for one in STAGES[stage]["outs"]} - RECORDS


def stage_of(job: Job) -> str:
    """The one stage below whose outputs a job writes."""
    (found,) = (
        stage
        for stage in STAGES
        if any(job.path == Path(out) or Path(out) in job.path.parents for out in outs(stage))
    )
    return found


def part_of(module: str) -> str:
    """The file or folder of the package's top level that a module lies in."""
    top = module.split(".")[1]
    return f"src/saeflow/{top}" if (FOLDER / top).is_dir() else f"src/saeflow/{top}.py"


@pytest.fixture(scope="module")
def every() -> list[Job]:
    """Jobs of the default and of every preset, one of each that reads the like and runs the same code."""
    found: dict[str, Job] = {}
    for file in [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]:
        for job in Jobs(Plan(load_params(file))).every():
            reads = sorted({"/".join(before.path.parts[:2]) for before in job.before})
            found.setdefault(repr((job.path.parts[:2], reads, job.entries)), job)
    return list(found.values())


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_what_its_jobs_declare(stage: str, every: list[Job]) -> None:
    own = [job for job in every if stage_of(job) == stage]
    code = {part_of(module) for job in own for module in job.reached.modules}
    read = {str(before.path) for job in own for before in job.before if stage_of(before) != stage}
    results = {"/".join(Path(path).parts[:2]) for path in read}
    assert set(STAGES[stage]["deps"]) == OF_EVERY_STAGE | code | results


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_no_output_that_no_job_writes(stage: str, every: list[Job]) -> None:
    written = {"/".join(job.path.parts[:2]) for job in every if stage_of(job) == stage}
    assert outs(stage) == written


def test_a_stage_depends_on_every_section_of_the_parameters() -> None:
    """`runtime` decides how jobs run; of it the precision alone decides what they give."""
    named = {name for stage in STAGES.values() for name in stage["params"]}
    assert named == set(params_schema()["properties"]) - {"runtime"} | {"runtime.precision"}


def test_a_stage_asks_for_its_own_step() -> None:
    for stage, values in STAGES.items():
        assert values["cmd"] == f"snakemake --cores all {stage}"
