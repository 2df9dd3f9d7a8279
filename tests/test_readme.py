"""README and docs name commands, files and pages that are there."""

import re
from pathlib import Path

import pytest
from docs.tree import page, tree

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_readme_is_read_in_ten_minutes() -> None:
    assert len(README.splitlines()) <= 130


def test_every_file_says_what_it_is_for() -> None:
    for line in tree().splitlines():
        if line.startswith("| `"):
            assert len(line.split("|")[2].strip()) > 10, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    missing = [x for x in links if "://" not in x and not (page.parent / x).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_are_targets_of_the_makefile(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in set(re.findall(r"(?:^|`)make ([\w-]+)", page.read_text(), re.MULTILINE)):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command


def test_ci_runs_the_test_command() -> None:
    assert re.search(r"^make test$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert "make test" in README


def test_the_tree_is_the_one_of_the_files_that_are_there() -> None:
    assert (ROOT / "docs/architecture.md").read_text() == page(), "run `make docs`"


def test_the_cluster_profile_names_every_rule_that_asks_for_a_gpu() -> None:
    rules = "".join(path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk"))
    asking = re.findall(r"^rule (\w+):(?:\n(?!rule ).*)*?\n\s+gpu=gpus\(\)", rules, re.MULTILINE)
    profile = (ROOT / "workflow/profiles/slurm/config.yaml").read_text()
    named = re.findall(r"^#   (\w+): \{slurm_partition: gpu\}$", profile, re.MULTILINE)
    assert len(asking) == rules.count("gpu=gpus()")
    assert sorted(named) == sorted(asking)
