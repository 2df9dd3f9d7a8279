"""`--use-conda`, with a stand-in for conda itself: every step runs in the environment that its rule names."""

import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT, SYNTHETIC, Project

pytestmark = [pytest.mark.workflow, pytest.mark.heavy]
PARAMS: dict[str, Any] = {  # every environment has a rule that runs
    **SYNTHETIC,
    "saes": {"adaptive-k": SYNTHETIC["saes"]["adaptive-k"]},
    "figures": {**SYNTHETIC["figures"], "names": ["fvu_l0"]},
}


def install(folder: Path) -> Path:
    """Lay out the stand-in as conda lies: bin/conda and bin/activate; its bin folder."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    conda = programs / "conda"
    code = (Path(__file__).parent / "conda.py").read_text()
    conda.write_text(f"#!{sys.executable}\n{code}")
    conda.chmod(conda.stat().st_mode | stat.S_IXUSR)
    (programs / "activate").write_text('source "$1/bin/activate"\n')
    return programs


def test_every_step_runs_in_its_own_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = install(tmp_path / "conda")
    for name in ("conda", "plain"):
        (tmp_path / f"run-{name}").mkdir()
    project = Project(tmp_path / "run-conda", PARAMS, cold=True)
    plain = Project(tmp_path / "run-plain", PARAMS, cold=True)
    plain.snakemake("all")
    monkeypatch.setenv("PATH", f"{programs}:{project.environment['PATH']}")
    project.snakemake("--use-conda", "all")
    environments = sorted((project.folder / ".snakemake" / "conda").glob("*_.yaml"))
    files = {path.read_text() for path in environments}
    assert files == {path.read_text() for path in (ROOT / "envs").glob("*.yaml")}
    assert (tmp_path / "conda" / "calls.log").read_text().count("env create") == len(files)
    assert project.contents() == plain.contents()
    own = (ROOT / "envs" / "figures.yaml").read_text()
    figures = next(path for path in environments if path.read_text() == own)
    packages = {path.name for path in figures.with_suffix("").glob("lib/*/site-packages/*")}
    assert "matplotlib" in packages
    assert "torch" not in packages  # the figures were drawn without it
    shutil.rmtree(tmp_path / "conda")
    assert project.todo() == {}
