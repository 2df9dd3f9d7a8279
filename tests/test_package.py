"""The package's public face."""

import tomllib
from pathlib import Path

import yaml

import saeflow

ROOT = Path(__file__).parents[1]


def test_one_version_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"]
    assert f"## {project['version']} (" in (ROOT / "CHANGELOG.md").read_text()
    assert project["license"] == "MIT"
    assert saeflow.__version__


def test_the_public_names_can_be_had() -> None:
    for name in saeflow.__all__:
        assert getattr(saeflow, name) is not None
