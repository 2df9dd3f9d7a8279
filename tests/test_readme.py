"""README's tree and commands are those of the project."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_tree_names_every_module_and_nothing_else() -> None:
    named = set(re.findall(r"^((?:src|workflow|benchmarks)/\S+\.\w+) ", README, re.MULTILINE))
    folders = ("src/saeflow/**/*.py", "src/saeflow/**/*.j2", "workflow/**/*.*", "benchmarks/*.py")
    files = {path for pattern in folders for path in ROOT.glob(pattern) if path.is_file()}
    assert named == {
        path.relative_to(ROOT).as_posix() for path in files if "pyc" not in path.suffix
    }


def test_the_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE))
    assert {"demo", "test"} <= commands
    for command in commands:
        assert re.search(rf"^{command}:", makefile, re.MULTILINE)


def test_ci_runs_the_test_command() -> None:
    assert re.search(r"^make test$", (ROOT / ".ci/run").read_text(), re.MULTILINE)


def test_its_pictures_are_there() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)
