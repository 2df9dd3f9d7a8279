"""Choosing among trials, against plain loops over documents."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from saeflow.errors import UserError
from saeflow.evaluation.sweeps import choose, in_selection, trial_lines

BOOTSTRAP = {"resamples": 300, "seed": 5}
SWEEP = {"seed": 2, "l0": 8.0, "tolerance": 0.1, "selection_share": 0.4}
UNITS = np.arange(40) * 3 + 1
NAMES = ("rows", "error", "power", "spread", "cosine", "l0")
POINTS = ((0.30, 8.2), (0.22, 8.5), (0.10, 12.0), (0.26, 6.0))
"""FVU and L0 of each trial: the third is above the limit of 8.8, the second the best below it."""


def sums(trial: int, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng([trial, seed])
    rows = np.random.default_rng(9).integers(5, 60, len(UNITS)).astype(float)
    fvu, l0 = POINTS[trial]
    spread = rows * np.random.default_rng(99).lognormal(0, 0.5, len(UNITS))
    found = {
        "rows": rows, "error": fvu * spread * random.lognormal(0, 0.1, len(UNITS)), "power": spread * 2,
        "spread": spread, "cosine": rows, "l0": l0 * rows * random.lognormal(0, 0.01, len(UNITS)),
    }  # fmt: skip
    return {"unit": UNITS, **found}


@pytest.fixture
def tried(tmp_path: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """Four trials of two seeds each."""
    setting: dict[str, Any] = {
        "source": "s", "hook_point": "h", "d_sae": 8, "entry": "e", "variant": "relu", "trials": [],
    }  # fmt: skip
    folders = {}
    for trial in range(len(POINTS)):
        runs = [f"d8-trial{trial}-seed{seed}" for seed in (0, 1)]
        for seed, run in enumerate(runs):
            folder = folders[run] = tmp_path / run
            folder.mkdir()
            kept = {f"rows.{name}": values for name, values in sums(trial, seed).items()}
            save_file(kept | {"model.tokens": np.ones(3)}, folder / "sums.safetensors")
        known = {"trial": trial, "setting": f"d8-trial{trial}", "drawn": f"lr {trial}"}
        setting["trials"].append({**known, "runs": runs})
    return setting, folders


def ratio(trial: int, seed: int, units: list[int], over: str, under: str) -> float:
    held = sums(trial, seed)
    return sum(float(held[over][unit]) for unit in units) / sum(float(held[under][unit]) for unit in units)  # fmt: skip


def mean(trial: int, units: list[int], over: str, under: str) -> float:
    return (ratio(trial, 0, units, over, under) + ratio(trial, 1, units, over, under)) / 2


def parts() -> tuple[list[int], list[int]]:
    held = in_selection(UNITS, SWEEP)
    return [i for i in range(len(UNITS)) if held[i]], [i for i in range(len(UNITS)) if not held[i]]


def test_lines_are_those_of_plain_loops(tried: tuple[dict[str, Any], dict[str, Path]]) -> None:
    lines = trial_lines(*tried, SWEEP, BOOTSTRAP)
    selection, report = parts()
    assert [line["trial"] for line in lines] == [0, 1, 2, 3]
    best = None
    for trial, line in enumerate(lines):
        fvu, l0 = (mean(trial, selection, *of) for of in (("error", "spread"), ("l0", "rows")))
        assert (line["selection_fvu"], line["selection_l0"]) == pytest.approx((fvu, l0))
        assert line["is_within"] == (l0 <= 8.8)
        if l0 <= 8.8 and (best is None or fvu < lines[best]["selection_fvu"]):
            best = trial
        assert line["fvu"] == pytest.approx(mean(trial, report, "error", "spread"))
        assert line["l0"] == pytest.approx(mean(trial, report, "l0", "rows"))
        assert line["difference"] == pytest.approx(line["fvu"] - lines[0]["fvu"])
        assert (line["units"], line["selection_units"]) == (len(report), len(selection))
        assert (line["seeds"], line["trials"]) == (2, 4)
    assert [line["is_chosen"] for line in lines] == [int(trial == best) for trial in range(4)]
    assert best == 1


def test_intervals_are_of_documents_of_the_report_part_drawn_for_all_trials_alike(
    tried: tuple[dict[str, Any], dict[str, Path]],
) -> None:
    line = trial_lines(*tried, SWEEP, BOOTSTRAP)[1]
    _, report = parts()
    random, values, differences = np.random.default_rng(BOOTSTRAP["seed"]), [], []
    for _ in range(BOOTSTRAP["resamples"]):
        chosen = [report[i] for i in random.integers(len(report), size=len(report))]
        values.append(mean(1, chosen, "error", "spread"))
        differences.append(values[-1] - mean(0, chosen, "error", "spread"))
    ends = [0.025, 0.975]
    assert [line["fvu_low"], line["fvu_high"]] == pytest.approx(np.quantile(values, ends).tolist())
    assert [line["low"], line["high"]] == pytest.approx(np.quantile(differences, ends).tolist())
    assert line["high"] < 0


def brute_force(points: list[tuple[float, float]], l0: float, limit: float) -> int:
    """Independent reference: sort every trial by whether it is within, then by FVU or by the distance."""
    ranked = sorted(
        range(len(points)),
        key=lambda i: (0, points[i][0], i) if points[i][1] <= limit else (1, abs(points[i][1] - l0), i),
    )  # fmt: skip
    return ranked[0]


def test_choosing_is_that_of_a_sorted_list() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        count = int(random.integers(1, 9))
        points = [
            (round(random.random(), 1), round(random.uniform(4, 16), 1)) for _ in range(count)
        ]
        assert choose(points, 8.0, 8.8) == brute_force(points, 8.0, 8.8)


def test_the_nearest_l0_is_chosen_where_none_is_within() -> None:
    assert choose([(0.1, 30.0), (0.3, 9.0), (0.2, 20.0)], 8.0, 8.8) == 1


def test_the_report_never_decides(tried: tuple[dict[str, Any], dict[str, Path]]) -> None:
    """Errors of the report part, multiplied at will, move no choice."""
    setting, folders = tried
    before = trial_lines(setting, folders, SWEEP, BOOTSTRAP)
    held = in_selection(UNITS, SWEEP)
    for trial, seed in itertools.product(range(4), (0, 1)):
        changed = sums(trial, seed)
        changed["error"] = np.where(
            held, changed["error"], changed["error"] * (1 + 9 * (trial == 1))
        )
        kept = {f"rows.{name}": values for name, values in changed.items()}
        save_file(kept, folders[f"d8-trial{trial}-seed{seed}"] / "sums.safetensors")
    after = trial_lines(setting, folders, SWEEP, BOOTSTRAP)
    for name in ("is_chosen", "selection_fvu"):
        assert [line[name] for line in after] == [line[name] for line in before]
    assert after[1]["fvu"] == pytest.approx(10 * before[1]["fvu"])


def test_units_are_divided_by_their_number_and_the_seed_alone() -> None:
    many = np.arange(4000)
    held = in_selection(many, SWEEP)
    assert abs(held.mean() - 0.4) < 0.03  # within 4 standard deviations of a fair draw
    assert (in_selection(many[::-7], SWEEP) == held[::-7]).all()
    other = in_selection(many, SWEEP | {"seed": 3})
    assert abs((held & other).mean() - 0.16) < 0.03
    smaller = in_selection(many, SWEEP | {"selection_share": 0.2})
    assert not (smaller & ~held).any()


def test_other_documents_and_an_empty_part_are_refused(
    tried: tuple[dict[str, Any], dict[str, Path]],
) -> None:
    with pytest.raises(
        UserError, match="to choose trials on and others to report on, found 0 and 40"
    ):
        trial_lines(*tried, SWEEP | {"selection_share": 1e-9}, BOOTSTRAP)
    setting, folders = tried
    moved = {f"rows.{name}": values for name, values in sums(2, 0).items()} | {
        "rows.unit": UNITS + 1
    }
    save_file(moved, folders["d8-trial2-seed0"] / "sums.safetensors")
    with pytest.raises(UserError, match="expected the same documents"):
        trial_lines(setting, folders, SWEEP, BOOTSTRAP)
