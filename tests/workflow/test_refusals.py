"""Mistakes that stop the real workflow before its first job, and paths that only look like mistakes."""

import copy
from pathlib import Path

import pytest

from .conftest import SYNTHETIC, Project

pytestmark = pytest.mark.workflow
FIRST = "results/sources/synthetic/inputs/provenance.json"


def test_a_path_with_spaces_quotes_and_braces_works_and_a_missing_device_does_not(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "it's my {run} {1}"
    folder.mkdir()
    params = copy.deepcopy(SYNTHETIC)
    params["runtime"]["device"] = "cuda:99"
    project = Project(folder, params)
    said = project.snakemake(FIRST, code=2)
    assert "error: runtime.device: expected" in said
    assert "Traceback" not in said
    assert not (folder / "results").exists()
    project.write(SYNTHETIC)
    project.snakemake(FIRST)
    assert (folder / FIRST).exists()
