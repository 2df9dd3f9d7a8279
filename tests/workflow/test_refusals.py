"""Mistakes that stop the real workflow before its first job, and paths that only look like mistakes."""

import copy
import pydoc_data.topics
import re
from pathlib import Path
from typing import Any

import pytest

from .conftest import SYNTHETIC, Project
from .test_text import PARAMS as TEXT
from .test_text import SCORER, make_model
from .test_vision import PARAMS as VISION

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


def test_a_hook_point_that_a_local_model_lacks_stops_before_the_first_job(tmp_path: Path) -> None:
    project = Project(tmp_path, TEXT)
    documents = list(pydoc_data.topics.topics.values())[:40]
    make_model(project.folder / "model", documents)
    for number in range(2):
        (project.folder / f"{number}.txt").write_text("\n\n".join(documents), encoding="utf-8")
    (project.folder / "own_scorer.py").write_text(SCORER)
    target = "results/sources/gpt2/model/provenance.json"
    params = copy.deepcopy(TEXT)
    params["sources"]["gpt2"]["hook_points"] += ["module.transformer.h.1.attn.output.7"]
    project.write(params)
    said = project.snakemake(target, code=2)
    assert [line for line in said.splitlines() if line.startswith("error:")] == [
        "error: sources.gpt2: GPT2LMHeadModel: module.transformer.h.1.attn.output.7: the module gives 2 values (0..1), found "
        "output.7. Choose one below 2."
    ]
    assert "Traceback" not in said
    assert not (project.folder / "results" / "sources").exists()


def last_line(said: str) -> str:
    return said.strip().splitlines()[-1]


def test_what_went_wrong_is_the_last_line(tmp_path: Path) -> None:
    """A job that fails, a run that is misspelt, a parameter file that is not there: one line at the end."""
    project = Project(tmp_path, SYNTHETIC)
    project.snakemake(FIRST)
    damaged = tmp_path / "results/sources/synthetic/inputs/dictionary.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    said = project.snakemake("results/stores/synthetic/train/provenance.json", code=1)
    assert "Traceback" not in said
    assert re.match(
        r"error: .*dictionary\.safetensors: its bytes changed since it was made .* "
        r"\[extract_part; the whole log: logs/extract_part/\S+\.log\]$",
        last_line(said),
    )
    misspelt = "results/saes/synthetic/features/tokp/d48-k8-seed0/provenance.json"
    said = project.snakemake(misspelt, code=2)
    assert "Traceback" not in said
    assert last_line(said).startswith(f"error: {misspelt}: expected a run of the parameters, found")
    assert "The nearest is synthetic/features/topk/" in last_line(said)
    # Snakemake reads it before the Snakefile, and ends by itself.
    said = project.snakemake(FIRST, "--configfile", "gone.yaml", code=1)
    assert "gone.yaml" in last_line(said)


def test_another_parameter_file_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    project = Project(tmp_path, SYNTHETIC)
    project.snakemake(FIRST)
    (tmp_path / "other.yaml").write_text((tmp_path / "params.yaml").read_text())
    said = project.snakemake(FIRST, "--configfile", "other.yaml", "--forceall", code=2)
    assert (
        "error: results: expected the parameter file that they were made from, params.yaml" in said
    )
    assert "add `--directory FOLDER`" in said
    listed = project.snakemake(FIRST, "--configfile", "other.yaml", "-n", code=2)
    assert "error: results: expected the parameter file that they were made from" in listed
    project.snakemake(FIRST, "--configfile", "other.yaml", "--directory", "elsewhere")
    assert (tmp_path / "elsewhere" / FIRST).exists()
    project.snakemake(FIRST, "--forceall")  # the first file's own


RUN = "scenes/vision.blocks.0.resid_post/soft-topk/d64-seed0"


def test_windows_that_cannot_be_stop_before_the_first_job(tmp_path: Path) -> None:
    project = Project(tmp_path, VISION)
    probing = {"runs": [RUN], "rows": 100, "probing": {"k": [1], "rows": 100, "seed": 0}}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"window_rows": 127}, {}, "window_rows: expected windows of at least one batch (128 rows), found 12 windows of 125"),
        ({"window_rows": 1501}, {}, "window_rows: expected at most train_rows (1500), found 1501"),
        ({"window_rows": 500, "keep_windows": 1}, {}, "keep_windows: expected null or all or at least 2, found 1"),
        ({"keep_windows": 2}, {}, "keep_windows: expected a training split of several windows, found one"),
        (
            {"window_rows": 500, "keep_windows": 2}, {"interpretability": probing},
            "keep_windows: expected nothing that reads rows of the training split after training, when its windows are "
            f"gone, found evaluation.interpretability.runs with {RUN}",
        ),
    ]  # fmt: skip
    validate, listing = ("saeflow", "validate"), ("snakemake", "-n", "--cores", "2", "all")
    for store, evaluation, message in cases:
        params = copy.deepcopy(VISION)
        params["stores"]["scenes"] |= store
        params["evaluation"] |= evaluation
        project.write(params)
        for command in (validate, listing) if evaluation else (listing,):
            said = project.run(*command, code=2)
            (line,) = (line for line in said.splitlines() if "error" in line)
            assert f"stores.scenes.{message}" in line
            assert "Traceback" not in said
    assert not (tmp_path / "results").exists()
