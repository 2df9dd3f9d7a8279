"""SAEs against rivals, against plain loops over drawn documents; and what is said of the differences."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file
from scipy.stats import ttest_1samp

from saeflow.config import load_params
from saeflow.errors import UserError
from saeflow.evaluation.rivals import control_lines, rival_lines
from saeflow.plan import Plan
from saeflow.tables import verdict

SETTINGS = {"resamples": 400, "seed": 5}
UNITS = 25
NAMES = ("rows", "error", "power", "spread", "cosine", "l0")


def sums(seed: int, error: float) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    rows = random.integers(5, 60, UNITS).astype(float)
    shared = np.random.default_rng(99).lognormal(0, 0.5, UNITS)  # hard documents are hard for both
    spread = rows * shared
    return {
        "rows": rows * 0 + 30, "error": error * spread * random.lognormal(0, 0.05, UNITS),
        "power": spread * 2, "spread": spread, "cosine": rows, "l0": 240 + random.integers(0, 9, UNITS) * 1.0,
    }  # fmt: skip


@pytest.fixture
def compared(tmp_path: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """Two seeds of an SAE and of its rival, with a control of the SAE."""
    folders = {}
    for number, run in enumerate(("own-seed0", "own-seed1", "rival-seed0", "rival-seed1")):
        folder = folders[run] = tmp_path / run
        folder.mkdir()
        found = {"rows.unit": np.arange(UNITS) * 3}
        found |= {f"rows.{k}": v for k, v in sums(number, 0.2 if number < 2 else 0.25).items()}
        if number < 2:
            control = {"unit": np.arange(UNITS) * 3, **sums(10 + number, 0.4)}
            found |= {f"control.k_by_norm.{k}": v for k, v in control.items()}
        save_file(found, folder / "sums.safetensors")
    comparison = {
        "source": "s", "hook_point": "h", "d_sae": 8, "entry": "own", "variant": "soft_topk", "setting": "d8",
        "rival_entry": "rival", "rival_variant": "topk", "rival_setting": "d8-k8",
        "pairs": [["own-seed0", "rival-seed0"], ["own-seed1", "rival-seed1"]],
    }  # fmt: skip
    return comparison, folders


def test_differences_are_those_of_documents_drawn_for_both(
    compared: tuple[dict[str, Any], dict[str, Path]],
) -> None:
    comparison, folders = compared
    found = {line["metric"]: line for line in rival_lines(comparison, folders, SETTINGS)}
    assert set(found) == {"fvu", "nmse", "cosine", "l0_mean"}
    pairs = [(sums(0, 0.2), sums(2, 0.25)), (sums(1, 0.2), sums(3, 0.25))]
    of_seeds = [
        own["error"].sum() / own["spread"].sum() - rival["error"].sum() / rival["spread"].sum()
        for own, rival in pairs
    ]
    line = found["fvu"]
    assert line["difference"] == pytest.approx(np.mean(of_seeds))
    assert line["seed_sd"] == pytest.approx(np.std(of_seeds, ddof=1))
    assert line["value"] - line["rival"] == pytest.approx(line["difference"])
    assert (line["seeds"], line["units"]) == (2, UNITS)
    random, drawn = np.random.default_rng(SETTINGS["seed"]), []
    for _ in range(SETTINGS["resamples"]):
        chosen = random.integers(UNITS, size=UNITS)
        each = [
            own["error"][chosen].sum() / own["spread"][chosen].sum()
            - rival["error"][chosen].sum() / rival["spread"][chosen].sum()
            for own, rival in pairs
        ]
        drawn.append(np.mean(each))
    assert [line["low"], line["high"]] == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist())
    assert line["high"] < 0


def test_pairing_narrows_the_interval(compared: tuple[dict[str, Any], dict[str, Path]]) -> None:
    """Hard documents are hard for both: unpaired, the interval would be several times as wide."""
    comparison, folders = compared
    line = rival_lines(comparison, folders, SETTINGS)[0]
    own, rival = sums(0, 0.2), sums(2, 0.25)
    random, drawn = np.random.default_rng(0), []
    for _ in range(2000):
        a, b = random.integers(UNITS, size=UNITS), random.integers(UNITS, size=UNITS)
        drawn.append(own["error"][a].mean() / 1 - rival["error"][b].mean())
    unpaired = np.quantile(drawn, 0.975) - np.quantile(drawn, 0.025)
    scale = own["spread"].mean()
    assert (line["high"] - line["low"]) * scale < 0.5 * unpaired


def test_controls_are_compared_with_the_sae_itself(
    compared: tuple[dict[str, Any], dict[str, Path]],
) -> None:
    comparison, folders = compared
    lines = control_lines(comparison, folders, SETTINGS)
    assert {line["rival_variant"] for line in lines} == {"k_by_norm"}
    fvu = next(line for line in lines if line["metric"] == "fvu")
    expected = [
        sums(s, 0.2)["error"].sum() / sums(s, 0.2)["spread"].sum()
        - sums(10 + s, 0.4)["error"].sum() / sums(10 + s, 0.4)["spread"].sum()
        for s in (0, 1)
    ]
    assert fvu["difference"] == pytest.approx(np.mean(expected))
    assert fvu["high"] < 0


def test_other_documents_are_refused(compared: tuple[dict[str, Any], dict[str, Path]]) -> None:
    comparison, folders = compared
    found = {"rows.unit": np.arange(UNITS), **{f"rows.{k}": v for k, v in sums(2, 0.2).items()}}
    save_file(found, folders["rival-seed0"] / "sums.safetensors")
    with pytest.raises(UserError, match="expected the same documents"):
        rival_lines(comparison, folders, SETTINGS)


def test_a_plan_pairs_seeds_of_an_sae_and_of_its_rivals() -> None:
    params = load_params(Path(__file__).parents[2] / "params.yaml")
    plan = Plan(params)
    for one in plan.rivals:
        for own, rival in one["pairs"]:
            assert own.rpartition("-seed")[2] == rival.rpartition("-seed")[2]
            assert plan.runs[rival].variant == one["rival_variant"]
            guide = plan.runs[rival].guide
            assert guide is not None
            assert guide.rpartition("-seed")[0] == own.rpartition("-seed")[0]
    assert {(one["variant"], one["rival_variant"]) for one in plan.rivals} >= {
        (own, rival)
        for own in ("soft_topk", "adaptive_k", "sparsemax")
        for rival in ("topk", "batch_topk")
    }
    params["evaluation"]["bootstrap"] = None
    assert Plan(params).rivals == []


def row(**changes: Any) -> dict[str, Any]:
    known = {
        "source": "s", "hook_point": "h", "d_sae": 8, "entry": "own", "variant": "soft_topk", "setting": "d8",
        "rival_entry": "rival", "rival_variant": "topk", "rival_setting": "d8-k8", "seeds": 3, "units": 25,
    }  # fmt: skip
    return (
        known
        | {"seed_sd": 0.001, "low": -0.03, "high": -0.01, "difference": -0.02, "rival": 0.3}
        | changes
    )


def tables_of(l0: float, rival_l0: float, **changes: Any) -> Any:
    lines = [
        row(metric="fvu", **changes),
        row(metric="l0_mean", value=l0, rival=rival_l0),
    ]
    columns = [
        "source",
        "hook_point",
        "evaluated_on",
        "variant",
        "entry",
        "d_sae",
        "fvu",
        "l0_mean",
    ]
    wide = pd.DataFrame([["s", "h", "s", "topk", "topk", 8, 0.3, 10.0], ["s", "h", "s", "topk", "topk", 8, 0.1, 20.0]], columns=columns)  # fmt: skip
    none = pd.DataFrame(columns=["option", "chosen", "split", "source", "hook_point", "entry"])
    return SimpleNamespace(rivals=pd.DataFrame(lines), wide=wide, options=none, probes=none)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, verdict.BETTER),
        ({"difference": 0.02, "low": 0.01, "high": 0.03}, verdict.WORSE),
        ({"high": 0.001}, verdict.EQUAL),  # the interval holds 0
        ({"seed_sd": 0.01}, verdict.EQUAL),  # seeds alone move it as far: 4.3 / sqrt(3) deviations
        ({"seeds": 1, "seed_sd": math.nan}, verdict.ONE_SEED),
        ({"low": math.nan, "high": math.nan, "units": 1}, verdict.ONE_UNIT),
    ],
)
def test_only_clear_differences_are_ranked(changes: dict[str, Any], expected: str) -> None:
    assert verdict.judged(tables_of(10, 10, **changes), ["fvu"])["verdict"].tolist() == [expected]


def test_a_difference_that_l0_explains_is_not_ranked() -> None:
    """FVU falls from .3 to .1 as L0 doubles: 2 % more latents explain .3 x .02 x 1.58."""
    slope = math.log(0.3 / 0.1) / math.log(2)
    found = verdict.judged(tables_of(10.2, 10, difference=-0.008), ["fvu"]).iloc[0]
    assert found["l0_effect"] == pytest.approx(0.3 * math.log(1.02) * slope)
    assert found["verdict"] == verdict.EQUAL
    assert verdict.judged(tables_of(10, 10, difference=-0.008), ["fvu"])["verdict"].tolist() == [
        verdict.BETTER
    ]


def test_seed_noise_is_that_of_a_t_test() -> None:
    values = np.array([0.01, 0.013, 0.022])
    found = verdict.judged(
        tables_of(10, 10, difference=values.mean(), seed_sd=values.std(ddof=1)), ["fvu"]
    ).iloc[0]
    interval = ttest_1samp(values, 0).confidence_interval(0.95)
    assert found["seed_noise"] == pytest.approx((interval.high - interval.low) / 2)


def test_sentences_count_verdicts() -> None:
    said = verdict.sentences(tables_of(10, 10))
    assert said == [
        "Against TopK trained at the same L0, 1 of 1 reconstruct better (SoftSAE on s)."
    ]
    (unranked,) = verdict.sentences(tables_of(10, 10, seeds=1, seed_sd=math.nan))
    assert "cannot be ranked" in unranked
