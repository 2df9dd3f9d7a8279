"""Parts of `benchmarks/truth.py`: runs that are kept, processes that compute them, verdicts on them."""

import importlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from saeflow.config import ROOT


@pytest.fixture(scope="module", autouse=True)
def neighbours() -> Iterator[None]:
    """The folder of benchmarks on the path, as for `python benchmarks/truth.py`."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture
def runs() -> ModuleType:
    return importlib.import_module("truth_runs")


@pytest.fixture
def verdicts() -> ModuleType:
    return importlib.import_module("truth_verdicts")


@pytest.fixture
def processes() -> ModuleType:
    return importlib.import_module("processes")


def test_a_run_is_found_by_all_of_its_settings_and_the_later_of_two_counts(
    runs: ModuleType, tmp_path: Path
) -> None:
    file = tmp_path / "new" / "runs.jsonl"
    assert runs.read(file) == {}
    settings = {"sae": "topk", "options": {"k": 6}, "seed": 0}
    key = runs.key_of(settings)
    assert key == runs.key_of(dict(reversed(settings.items())))
    assert key != runs.key_of({**settings, "seed": 1})
    assert key != runs.key_of({**settings, "options": {"k": 7}})
    runs.keep(key, [{"fvu": 0.5}], file)
    runs.keep("other", [{"fvu": 0.4}], file)
    runs.keep(key, [{"fvu": 0.3}], file)
    found = runs.read(file)
    assert list(found) == [key, "other"]
    assert found[key]["rows"] == [{"fvu": 0.3}]
    assert found[key]["commit"].rstrip("+")


def test_the_interval_is_that_of_a_t_test(verdicts: ModuleType) -> None:
    differences = [0.01, -0.02, 0.05]
    expected = ttest_1samp(differences, 0).confidence_interval(0.95)
    mean, low, high = verdicts.interval(differences)
    assert (mean, low, high) == pytest.approx((np.mean(differences), *expected))
    mean, low, high = verdicts.interval([0.3])
    assert mean == 0.3
    assert np.isnan([low, high]).all()


def test_a_metric_at_another_l0_lies_between_the_nearest_settings(verdicts: ModuleType) -> None:
    reference = pd.DataFrame({"l0_mean": [7.0, 5.0, 6.0], "fvu": [0.1, 0.3, 0.15]})
    for l0 in (5.0, 5.4, 6.0, 6.9, 7.0):
        expected = np.interp(l0, [5, 6, 7], [0.3, 0.15, 0.1])
        assert verdicts.at_l0(reference, l0, "fvu") == pytest.approx(expected)
    assert verdicts.at_l0(reference, 4.9, "fvu") is None
    assert verdicts.at_l0(reference, 7.1, "fvu") is None


def made(sae: str, control: str, l0: float, errors: list[float], setting: int = 0) -> list[dict]:
    return [
        {"law": "w", "sae": sae, "control": control, "setting": setting, "seed": seed,
         "l0_mean": l0, "fvu": fvu}
        for seed, fvu in enumerate(errors)
    ]  # fmt: skip


def test_verdicts_are_of_differences_within_seeds(verdicts: ModuleType) -> None:
    """Seeds differ by much more than methods do, which paired differences do not see."""
    base = [0.10, 0.20, 0.30]
    reference = [
        row
        for number, (l0, more) in enumerate([(6.0, 0.0), (5.0, 0.02)])
        for row in made("batch_topk", "", l0, [fvu + more for fvu in base], number)
    ]
    gains = (0.03, 0.031, 0.029)
    better = made("soft_topk", "", 5.5, [f + 0.01 - d for f, d in zip(base, gains, strict=True)])
    shuffled = made("soft_topk", "shuffled k", 5.5, [fvu + 0.1 for fvu in base])
    far = made("entmax", "", 9.0, base)
    unclear = made("gated", "", 6.0, [0.13, 0.17, 0.30])
    every = pd.DataFrame([*reference, *better, *shuffled, *far, *unclear])
    chosen = every[every.setting == 0]
    compared = verdicts.comparisons(chosen, every)
    found = verdicts.verdicts(compared, chosen, "w").set_index("SAE")
    assert found.loc["soft_topk", "fvu - BatchTopK's"].startswith("-0.030 [-0.032, -0.028]")
    assert found.loc["soft_topk", "verdict"] == "better"
    assert found.loc["soft_topk", "fvu - with shuffled k"].startswith("-0.120")
    assert found.loc["soft_topk", "fvu - with k by norm"] == "–"
    assert found.loc["entmax", "verdict"] == "L0 out of range"
    assert found.loc["gated", "verdict"] == "undecided"
    assert "batch_topk" not in found.index
    answers = verdicts.answers(compared).set_index(["SAE", "against"])
    assert list(answers.loc[("soft_topk", "shuffled k")]) == ["1 (w)", "0", "0", "0"]
    assert list(answers.loc[("entmax", verdicts.AT_L0)]) == ["0", "0", "0", "1 (w)"]
    assert list(answers.loc[("gated", verdicts.AT_L0)]) == ["0", "0", "1 (w)", "0"]


def test_answers_name_every_world_by_its_verdict(verdicts: ModuleType) -> None:
    values = {"a": [-0.1, -0.11], "b": [0.1, 0.11], "c": [-0.1, 0.1], "d": [-0.2, -0.21]}
    found = [
        verdicts.Comparison(law, "jumprelu", verdicts.AT_L0, errors)
        for law, errors in values.items()
    ]
    assert list(verdicts.answers(found).iloc[0]) == [
        "jumprelu", verdicts.AT_L0, "2 (a, d)", "1 (b)", "1 (c)", "0",
    ]  # fmt: skip


def test_a_seed_that_one_side_lacks_is_left_out(verdicts: ModuleType) -> None:
    reference = [
        *made("batch_topk", "", 6.0, [0.1, 0.2]),
        *made("batch_topk", "", 5.0, [0.2, 0.3], 1),
    ]
    mine = made("gated", "", 6.0, [0.2, 0.4, 0.9])
    every = pd.DataFrame([*reference, *mine])
    (found,) = verdicts.comparisons(every[every.setting == 0], every)
    assert found.values == pytest.approx([0.1, 0.2])
    alone = pd.DataFrame(mine)
    assert verdicts.comparisons(alone, alone) == []


def test_every_task_gives_its_result_from_another_process(processes: ModuleType) -> None:
    found = dict(processes.in_processes(math.factorial, range(6), 2))
    assert found == {n: math.prod(range(1, n + 1)) for n in range(6)}
    ((_, number),) = processes.in_processes(eval, ["__import__('os').getpid()"], 1)
    assert number != os.getpid()


def test_a_failure_stops_what_has_not_begun(processes: ModuleType, tmp_path: Path) -> None:
    slow = "(__import__('time').sleep(0.05), open({!r}, 'w').close())"
    tasks = ["1 / 0", *(slow.format(str(tmp_path / str(n))) for n in range(400))]
    with pytest.raises(ZeroDivisionError):
        list(processes.in_processes(eval, tasks, 1))
    assert len(list(tmp_path.iterdir())) < 200


def test_no_process_outlives_a_killed_parent() -> None:
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); from processes import in_processes\n"
        "work = \"(print(__import__('os').getpid(), flush=True), __import__('time').sleep(600))\"\n"
        "list(in_processes(eval, [work], 1))"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:  # fmt: skip
        assert parent.stdout is not None
        child = Path("/proc", parent.stdout.readline().strip())
        assert child.exists()
        parent.kill()
        parent.stdout.read()  # ends when no process holds the other end
    assert not child.exists() or (child / "status").read_text().split("State:")[1].split()[0] == "Z"


def test_the_time_left_is_that_of_the_pace_so_far(processes: ModuleType) -> None:
    assert processes.time_left(10, 40, 600.0) == "10 of 40, 30 min left"


def test_differences_are_drawn_from_best_to_worst_and_filled_where_decided(
    verdicts: ModuleType, tmp_path: Path
) -> None:
    figures = importlib.import_module("truth_figures")
    values = {
        ("soft_topk", "one"): [0.3, 0.31, 0.32], ("soft_topk", "two"): [-0.1, 0.0, 0.1],
        ("gated", "one"): [-0.05, -0.05, -0.051], ("gated", "two"): None,
    }  # fmt: skip
    found = [
        verdicts.Comparison(law, sae, verdicts.AT_L0, numbers)
        for (sae, law), numbers in values.items()
    ]
    figures.draw_differences(found, tmp_path / "truth")
    text = (tmp_path / "truth.svg").read_text()
    labels = [text.index(f"<!-- {label} -->") for label in ("Gated", "SoftSAE")]
    assert labels == sorted(labels)
    colors = {name: figures.look_of(name).color.lower() for name in ("soft_topk", "gated")}
    filled = {name: text.count(f"fill: {color}; stroke: {color}") for name, color in colors.items()}
    assert filled == {"soft_topk": 1, "gated": 1}
    assert text.count(f"fill: #ffffff; stroke: {colors['soft_topk']}") == 1
    assert f"fill: #ffffff; stroke: {colors['gated']}" not in text
    figures.draw_differences([], tmp_path / "none")
    assert not list(tmp_path.glob("none*"))
