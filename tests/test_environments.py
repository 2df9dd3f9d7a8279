"""The environments of conda, pip and CI hold the same versions."""

import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import yaml

from saeflow.config import load_params
from saeflow.jobs import Jobs
from saeflow.plan import Plan

ROOT = Path(__file__).parents[1]
LOCK_TEXT = (ROOT / "requirements.lock").read_text()
_SPEC = importlib.util.spec_from_file_location("pin", ROOT / "envs" / "pin.py")
assert _SPEC is not None
assert _SPEC.loader is not None
pin = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(pin)
ENVIRONMENTS = sorted((ROOT / "envs").glob("*.yaml"))


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.stem)
def test_an_environment_pins_all_it_needs_as_the_lock_does(path: Path) -> None:
    assert path.read_text() == pin.pinned(path.read_text()), "run envs/pin.py"
    *conda, pip = yaml.safe_load(path.read_text())["dependencies"]
    assert [package.split("=")[0] for package in conda] == ["python", "pip"]
    assert all(re.fullmatch(r"[\w.-]+==\S+", package) for package in pip["pip"])


def test_every_package_of_the_lock_has_digests() -> None:
    packages = re.split(r"\n(?=[\w.-]+==)", LOCK_TEXT)[1:]
    assert len(packages) > 100
    for package in packages:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", package), package


def test_every_rule_environment_exists() -> None:
    rules = (ROOT / "workflow" / "rules").glob("*.smk")
    texts = [rule.read_text() for rule in rules]
    named = {name for text in texts for name in re.findall(r'environment\("(\w+)"\)', text)}
    assert named == {path.stem for path in ENVIRONMENTS}
    assert sum(len(re.findall(r"^ +conda:$", text, re.MULTILINE)) for text in texts) == sum(
        text.count('environment("') for text in texts
    )


def normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def commands() -> dict[str, str]:
    """The environment in which the rules run each command of saeflow."""
    found = {}
    for path in (ROOT / "workflow" / "rules").glob("*.smk"):
        for rule in re.split(r"^rule ", path.read_text(), flags=re.MULTILINE)[1:]:
            for command in re.findall(r" -m saeflow (\w+)", rule):
                found[command] = re.findall(r'environment\("(\w+)"\)', rule)[0]
    return found


@pytest.mark.parametrize(
    "file", [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))], ids=lambda p: p.stem
)
def test_an_environment_has_every_package_that_its_jobs_import(file: Path) -> None:
    """By the code that each job may run. What `draw` may run is more than it does: tests/figures run it without the rest."""
    pinned = {
        path.stem: {
            normal(package.split("==")[0])
            for package in yaml.safe_load(path.read_text())["dependencies"][-1]["pip"]
        }
        for path in ENVIRONMENTS
    }
    packages = importlib.metadata.packages_distributions()
    of_command = commands()
    libraries: dict[str, set[str]] = {}
    for job in Jobs(Plan(load_params(file))).every():
        libraries.setdefault(job.command, set()).update(job.reached.libraries)
    assert libraries.keys() <= of_command.keys()
    assert "torch" in libraries["train"]
    for command in libraries.keys() - {"draw"}:
        found = pinned[of_command[command]]
        missing = {
            library
            for library in libraries[command] - sys.stdlib_module_names
            if not found & set(map(normal, packages.get(library, [library])))
        }
        assert not missing, f"envs/{of_command[command]}.yaml, for {command}"


def test_lock_names_no_machine() -> None:
    for word in ("file:", "://", "+cpu"):
        assert word not in LOCK_TEXT
