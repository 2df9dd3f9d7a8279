"""Functions of the user's own, in modules of a temporary working directory."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from saeflow.config import ROOT, load_params, scorer_file
from saeflow.errors import UserError
from saeflow.evaluation.detection import SCORERS, Window, scorer_of
from saeflow.jobs import Jobs
from saeflow.plan import Plan
from saeflow.plugins import load_function, module_file

SCORER = """
from saeflow.evaluation.detection import Window

def longest(examples: list[Window], windows: list[Window]) -> list[float]:
    return [float(len(one.texts[one.mark])) for one in windows]

LIMIT = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory; what is imported from it (`own_...`) is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


def with_scorer(name: str) -> dict:
    params = load_params(ROOT / "params.yaml")
    params["evaluation"]["interpretability"]["detection"]["scorer"] = name
    return params


def test_a_function_beside_the_parameters_is_the_scorer(here: Path) -> None:
    (here / "own_scorer.py").write_text(SCORER)
    scorer = scorer_of("own_scorer:longest")
    asked = [Window((1, 2), 1, None, ("a", " bcd")), Window((1, 2), 0, None, ("a", ""))]
    assert scorer([], asked) == [4.0, 1.0]
    assert scorer_of("tokens") is SCORERS["tokens"]


def test_a_function_may_be_in_a_package(here: Path) -> None:
    (here / "own_package" / "deep").mkdir(parents=True)
    path = here / "own_package" / "deep" / "scorers.py"
    path.write_text(SCORER)
    assert load_function("own_package.deep.scorers:longest", "x").__name__ == "longest"
    assert module_file("own_package.deep.scorers:longest", "x") == path
    assert module_file("saeflow.evaluation:f", "x").parts[-2:] == ("evaluation", "__init__.py")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:f", r"no such module: nowhere. Put it into the working directory \(nowhere.py\)"),
        ("nowhere.deep:f", r"no such module: nowhere.deep"),
        ("own_scorer.deep:f", "no such module: own_scorer.deep"),
        ("own_scorer:LIMIT", r"own_scorer.py: expected a function LIMIT, found a int of that name"),
        ("own_scorer:shortest", r"expected a function shortest, found nothing of that name"),
        ("own_broken:f", r"own_broken.py: the module cannot be imported \(SyntaxError"),
        ("own_needs:f", r"cannot be imported \(ModuleNotFoundError: No module named 'not_there'"),
        ("json:f", r"another module has the name json"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(here: Path, name: str, message: str) -> None:
    (here / "own_scorer.py").write_text(SCORER)
    (here / "own_broken.py").write_text("def f(:\n")
    (here / "own_needs.py").write_text("import not_there\n")
    (here / "json.py").write_text("def f(): ...\n")
    with pytest.raises(UserError, match=message) as caught:
        scorer_of(name)
    assert str(caught.value).startswith("evaluation.interpretability.detection.scorer: ")
    assert "\n" not in str(caught.value)


def test_finding_a_module_does_not_run_it(here: Path) -> None:
    (here / "own_side_effect.py").write_text("raise SystemExit(7)\n")
    name = "own_side_effect:f"
    settings = with_scorer(name)["evaluation"]["interpretability"]
    assert scorer_file(settings) == here / "own_side_effect.py"
    assert "own_side_effect" not in sys.modules


def test_a_changed_scorer_changes_the_key_of_its_jobs_alone(here: Path) -> None:
    def keys(name: str) -> tuple[str, str, str]:
        jobs = Jobs(Plan(with_scorer(name)))
        run = jobs.plan.interpreted[0]
        return jobs.interpretation(run).key, jobs.evaluation(run).key, jobs.latents(run).key

    path = here / "own_scorer.py"
    path.write_text(SCORER)
    before = keys("own_scorer:longest")
    assert before == keys("own_scorer:longest")
    path.write_text(SCORER + "# another word\n")
    after = keys("own_scorer:longest")
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True, True]
    built_in = keys("tokens")
    path.unlink()
    assert keys("tokens") == built_in


@pytest.mark.parametrize("name", ["nowhere:f", "token", "own:", "own f:g"])
def test_parameters_with_a_scorer_that_is_not_there_end_with_exit_code_2(
    here: Path, name: str
) -> None:
    (here / "params.yaml").write_text(yaml.safe_dump(with_scorer(name)))
    done = subprocess.run(
        [sys.executable, "-m", "saeflow", "validate"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "evaluation.interpretability.detection.scorer: " in line
    assert done.stdout == ""
