"""The environments of conda, pip and CI hold the same versions."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LOCK = dict(
    re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
)
ENVIRONMENTS = sorted((ROOT / "envs").glob("*.yaml"))


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.stem)
def test_pins_equal_the_lock(path: Path) -> None:
    *conda, pip = yaml.safe_load(path.read_text())["dependencies"]
    assert [package.split("=")[0] for package in conda] == ["python", "pip"]
    pins = dict(pin.split("==") for pin in pip["pip"])
    assert pins == {name: LOCK.get(name) for name in pins}


def test_every_rule_environment_exists() -> None:
    rules = (ROOT / "workflow" / "rules").glob("*.smk")
    named = {name for rule in rules for name in re.findall(r"envs/(\w+\.yaml)", rule.read_text())}
    assert named == {path.name for path in ENVIRONMENTS}


def test_lock_names_no_machine() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert "file:" not in text
    assert "://" not in text
    assert "+cpu" not in text
