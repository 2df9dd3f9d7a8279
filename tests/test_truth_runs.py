import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from saeflow.config import ROOT


@pytest.fixture(scope="module")
def runs() -> ModuleType:
    """The module as `python benchmarks/truth.py` imports it, whose neighbours are on the path."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        spec = importlib.util.spec_from_file_location("truth_runs", f"{folder}/truth_runs.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(folder)


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


def test_the_interval_is_that_of_a_t_test(runs: ModuleType) -> None:
    differences = [0.01, -0.02, 0.05]
    expected = ttest_1samp(differences, 0).confidence_interval(0.95)
    mean, low, high = runs.interval(differences)
    assert (mean, low, high) == pytest.approx((np.mean(differences), *expected))
    mean, low, high = runs.interval([0.3])
    assert mean == 0.3
    assert np.isnan([low, high]).all()


def test_a_metric_at_another_l0_lies_between_the_nearest_settings(runs: ModuleType) -> None:
    reference = pd.DataFrame({"l0_mean": [7.0, 5.0, 6.0], "fvu": [0.1, 0.3, 0.15]})
    for l0 in (5.0, 5.4, 6.0, 6.9, 7.0):
        expected = np.interp(l0, [5, 6, 7], [0.3, 0.15, 0.1])
        assert runs.at_l0(reference, l0, "fvu") == pytest.approx(expected)
    assert runs.at_l0(reference, 4.9, "fvu") is None
    assert runs.at_l0(reference, 7.1, "fvu") is None


def made(sae: str, control: str, l0: float, errors: list[float], setting: int = 0) -> list[dict]:
    return [
        {"law": "w", "sae": sae, "control": control, "setting": setting, "seed": seed,
         "l0_mean": l0, "fvu": fvu}
        for seed, fvu in enumerate(errors)
    ]  # fmt: skip


def test_verdicts_are_of_differences_within_seeds(runs: ModuleType) -> None:
    """Seeds differ by much more than methods do, which paired differences do not see."""
    base = [0.10, 0.20, 0.30]
    reference = [
        row
        for number, (l0, more) in enumerate([(6.0, 0.0), (5.0, 0.02)])
        for row in made("batch_topk", "", l0, [fvu + more for fvu in base], number)
    ]
    better = made(
        "soft", "", 5.5, [fvu + 0.01 - d for fvu, d in zip(base, (0.03, 0.031, 0.029), strict=True)]
    )
    shuffled = made("soft", "shuffled k", 5.5, [fvu + 0.1 for fvu in base])
    far = made("dense", "", 9.0, base)
    unclear = made("same", "", 6.0, [0.13, 0.17, 0.30])
    every = pd.DataFrame([*reference, *better, *shuffled, *far, *unclear])
    found = runs.verdicts(every[every.setting == 0], every, "w").set_index("SAE")
    assert found.loc["soft", "fvu - BatchTopK's"].startswith("-0.030 [-0.032, -0.028]")
    assert found.loc["soft", "verdict"] == "better"
    assert found.loc["soft", "fvu - with shuffled k"].startswith("-0.120")
    assert found.loc["soft", "fvu - with k by norm"] == "–"
    assert found.loc["dense", "fvu - BatchTopK's"] == "L0 out of range"
    assert found.loc["same", "verdict"] == "undecided"
    assert "batch_topk" not in found.index
