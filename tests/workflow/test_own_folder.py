"""Two commands, `saeflow init` and `saeflow run`, make a report of one's own model and text, from a checkout and installed."""

import json
import os
import pydoc_data.topics
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from saeflow.config import ROOT

from .conftest import programs
from .test_text import make_model

pytestmark = pytest.mark.workflow


def environment(package: Path) -> dict[str, str]:
    """This environment, with saeflow from another place."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(package)}


def saeflow(at: Path, own: Mapping[str, str], *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "saeflow", *arguments],
        cwd=at, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == code, f"{arguments}: exit {done.returncode}\n{done.stdout[-5000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a text of one's own."""
    folder = tmp_path_factory.mktemp("given")
    documents = list(pydoc_data.topics.topics.values())
    make_model(folder / "model", documents)
    (folder / "own.txt").write_text("\n\n".join(documents[:12]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def done(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the two commands leave; another one is the working directory."""
    folder, elsewhere = (
        tmp_path_factory.mktemp("own") / "mine",
        tmp_path_factory.mktemp("elsewhere"),
    )
    own = environment(ROOT / "src") | {"SAEFLOW_PROGRAMS": programs()}
    saeflow(
        elsewhere, own, "init", str(folder), "--text", str(given / "own.txt"), "--model", str(given / "model")
    )  # fmt: skip
    saeflow(elsewhere, own, "run", "--folder", str(folder), "--cores", "2")
    assert not list(elsewhere.iterdir())
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which a wheel of this checkout was installed."""
    folder = tmp_path_factory.mktemp("installed")
    source, wheels, target = folder / "source", folder / "wheels", folder / "target"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.zarr", "build")
    for name in ("src", "workflow", "profiles", "envs", "presets", "benchmarks/results"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)], check=True
    )  # fmt: skip
    (wheel,) = wheels.glob("saeflow-*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], check=True
    )  # fmt: skip
    shutil.rmtree(source)
    return target


def test_the_file_is_short_and_every_line_has_a_reason(done: Path) -> None:
    text = (done / "params.yaml").read_text()
    assert len(text.splitlines()) <= 30
    params = yaml.safe_load(text)
    assert set(params) == {"sources", "stores", "training", "saes", "evaluation", "figures"}
    assert params["sources"]["model"]["hook_points"] == ["blocks.2.resid_post"]


def test_the_report_is_in_the_folder_and_holds_its_figures_and_a_page_of_latents(
    done: Path,
) -> None:
    report = (done / "results/report.html").read_text()
    for name in yaml.safe_load((done / "params.yaml").read_text())["figures"]["names"]:
        assert name in report
    page = re.search(r'href="(evaluations/latents/[^"]+)"', report)
    assert page is not None
    assert (done / "results" / page[1]).is_file()


def test_the_sizes_are_those_of_the_text(done: Path) -> None:
    """The contexts that were counted are those that tokenising found."""
    params = yaml.safe_load((done / "params.yaml").read_text())
    record = json.loads((done / "results/sources/model/inputs/provenance.json").read_text())
    rows, splits = params["stores"]["model"], record["read"]["splits"]
    length = params["sources"]["model"]["context_length"]
    for split in ("train", "evaluation"):
        assert splits[split]["contexts"] == rows[f"{split}_rows"] / (length - 1)


def test_a_second_run_has_nothing_to_do_and_arguments_are_passed_on(done: Path) -> None:
    own = environment(ROOT / "src")
    assert "Nothing to be done" in saeflow(done, own, "run", "--", "-n")
    assert "nonsense" in saeflow(done, own, "run", "--", "nonsense", code=1)


@pytest.mark.heavy
def test_an_installed_package_has_the_workflow_and_the_same_keys(
    done: Path, installed: Path, given: Path, tmp_path: Path
) -> None:
    own = environment(installed)
    where = "import saeflow.config as c; print(c.ROOT)"
    root = subprocess.run(
        [sys.executable, "-c", where], env=own, capture_output=True, text=True, check=True
    ).stdout.strip()  # fmt: skip
    assert Path(root) == installed / "saeflow" / "_project"
    # Another installation, the same code, lock and parameters: every key is that of the checkout's run.
    assert "Nothing to be done" in saeflow(done, own, "run", "--", "-n")
    mine = ("init", "mine", "--text", str(given / "own.txt"), "--model", str(given / "model"))
    saeflow(tmp_path, own, *mine)
    assert (tmp_path / "mine/params.yaml").read_text() == (done / "params.yaml").read_text()
    folder = tmp_path / "mine"
    assert "1 source, " in saeflow(folder, own, "validate")
    assert "train" in saeflow(folder, own, "plan")
    listed = saeflow(folder, own, "run", "--", "-n", "--quiet", "rules")
    assert re.search(r"^write_report +1$", listed, re.MULTILINE)
    said = saeflow(folder, own, "run", "--", "-n", "--use-conda", code=2)
    assert "error: --use-conda: expected a checkout" in said


def test_the_exit_code_is_that_of_the_run(given: Path, tmp_path: Path) -> None:
    own = environment(ROOT / "src")
    assert "saeflow init" in saeflow(tmp_path, own, "run", code=2)
    saeflow(tmp_path, own, "init", "mine", "--text", str(given / "own.txt"), "--model", str(given / "model"))  # fmt: skip
    path = tmp_path / "mine/params.yaml"
    path.write_text(path.read_text().replace(str(given / "own.txt"), "gone.txt"))
    for command in ("validate", "plan"):  # hours of what would be refused help nobody
        said = saeflow(tmp_path / "mine", own, command, code=2)
        assert "text.files: no such file or folder: gone.txt" in said
    (tmp_path / "params.yaml").write_text("sources: {}\n")
    said = saeflow(tmp_path, own, "run", code=2)
    assert "error: " in said
    assert "Traceback" not in said
