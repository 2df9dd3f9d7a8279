"""Trials of a sweep: what is drawn, on what it depends, and what is refused."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy.stats import kstest

from saeflow.cli import main
from saeflow.config import SAEConfig, expand_runs, share_of, trial_of, validate, without_trial
from saeflow.config.sweep import between, trials, tunable
from saeflow.errors import UserError
from saeflow.jobs import Jobs
from saeflow.needs import Needs, Rates, as_text, count_passes
from saeflow.plan import Plan
from saeflow.rehearsal.scale import rehearsal_of

ROOT = Path(__file__).parents[2]
SWEEP = {"trials": 4, "l0": 8, "seed": 3, "tolerance": 0.1, "selection_share": 0.5}
RANGES = {"lr": [1.0e-4, 3.0e-3], "l1": [0, 2], "lr_warmup_steps": [1, 64]}


def parameters(**changes: Any) -> dict[str, Any]:
    """A small file with two tuned entries, before it is validated."""
    params: dict[str, Any] = yaml.safe_load((ROOT / "tests/workflow/synthetic.yaml").read_text())
    params["saes"] |= {
        "relu": params["saes"]["relu"] | {"options": {"l1": 0.5}, "seed": [0, 1], "ranges": RANGES},
        "topk": params["saes"]["topk"] | {"options": {"k": [4, 8]}, "ranges": {"lr": [1.0e-4, 3.0e-3]}},
    }  # fmt: skip
    return {**params, "sweep": dict(SWEEP), **changes}


def runs_of(params: dict[str, Any], entry: str) -> list[SAEConfig]:
    return [run for run in expand_runs(validate(params)) if run.entry == entry]


def drawn(number: int, seed: int = 3, entry: str = "relu") -> list[dict[str, Any]]:
    values = {"variant": "relu", "ranges": RANGES}
    return [one for _, one in trials(SWEEP | {"trials": number, "seed": seed}, entry, values)][1:]


def test_an_entry_with_ranges_is_trained_once_a_trial() -> None:
    relu, topk = (runs_of(parameters(), entry) for entry in ("relu", "topk"))
    assert [run.name.rpartition("/")[2] for run in relu] == [
        f"d128-trial{trial}-seed{seed}" for seed in (0, 1) for trial in range(4)
    ]
    assert len(topk) == 8
    assert {run.name.rpartition("/")[2] for run in topk} >= {"d128-k4-trial3-seed0"}
    for trial in range(4):  # one draw for all seeds, stores, sizes and swept options
        same = [run for run in relu if trial_of(run.name) == trial]
        assert same[0].training == same[1].training
        assert same[0].options == same[1].options
    for key in ("seed0", "seed1"):
        assert len({run.training.lr for run in relu if run.name.endswith(key)}) == 4
    assert not any(
        trial_of(run.name) for run in expand_runs(validate(parameters())) if run.entry == "adaptive-k"
    )  # fmt: skip


def test_trial_0_has_the_entry_s_own_values() -> None:
    first = runs_of(parameters(), "relu")[0]
    assert (first.training.lr, first.options["l1"], first.training.lr_warmup_steps) == (
        2.0e-3,
        0.5,
        10,
    )


def test_names_of_trials() -> None:
    assert trial_of("s/h/e/d8-k2-trial12-seed3") == trial_of("d8-k2-trial12") == 12
    assert trial_of("s/h/my-trial3-entry/d8-seed0") is None
    assert without_trial("s/h/e/d8-k2-trial12") == "s/h/e/d8-k2"


def test_a_draw_depends_on_seed_entry_trial_and_key_alone() -> None:
    four, nine = drawn(4), drawn(9)
    assert nine[:3] == four  # more trials change no trial
    assert drawn(4, entry="other") != four
    assert drawn(4, seed=4) != four
    other = parameters()
    other["saes"]["relu"]["ranges"] = {"lr": RANGES["lr"]}
    assert [run.training.lr for run in runs_of(other, "relu")] == [
        run.training.lr for run in runs_of(parameters(), "relu")
    ]
    del other["saes"]["topk"]["ranges"]
    assert [run.training.lr for run in runs_of(other, "relu")] == [
        run.training.lr for run in runs_of(parameters(), "relu")
    ]


def test_draws_are_uniform_in_the_logarithm_or_in_the_value_where_the_range_begins_at_0() -> None:
    found = drawn(2001)
    low, high = RANGES["lr"]
    for values, scale in (
        ([math.log(one["lr"] / low) / math.log(high / low) for one in found], "lr"),
        ([one["l1"] / 2 for one in found], "l1"),
    ):
        assert 0 <= min(values) <= max(values) <= 1
        assert kstest(values, "uniform").pvalue > 0.01, scale
    steps = [one["lr_warmup_steps"] for one in found]
    assert all(isinstance(step, int) and 1 <= step <= 64 for step in steps)
    # of [1, 64], ln 8 is the middle: as many are below 8 as above
    assert abs(sum(step < 8 for step in steps) / 2000 - math.log(7.5) / math.log(64)) < 0.03
    pairs = [(share_of(3, "relu", n, "lr"), share_of(3, "relu", n, "l1")) for n in range(2000)]
    mean = sum((a - 0.5) * (b - 0.5) for a, b in pairs) / 2000
    assert abs(mean * 12) < 0.07  # keys are drawn apart: a correlation of 0, within 3 deviations


@pytest.mark.parametrize(("low", "high"), [(0.0012344, 0.0012345), (0, 0.12345), (7, 1e30)])
def test_rounding_leaves_no_range(low: float, high: float) -> None:
    for share in (0.0, 0.3, 1 - 2**-52):
        assert low <= between(share, low, high, is_whole=False) <= high


def test_numbers_but_the_budget_can_be_tuned() -> None:
    assert tunable("relu") == {
        "lr": False, "lr_warmup_steps": True, "lr_decay_fraction": False, "grad_clip": False, "dead_after_tokens": True,
        "l1": False, "orthogonality_weight": False, "orthogonality_chunk": True,
    }  # fmt: skip
    assert tunable("topk")["k"] is True


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"lr": [0, 1]}, "saes.relu.ranges.lr: expected above 0, found 0"),
        ({"l1": [2, 2]}, "saes.relu.ranges.l1: expected [low, high] with 0 <= low < high <= 1e+30, found [2, 2]"),
        ({"l1": [-1, 2]}, "saes.relu.ranges.l1: expected [low, high] with 0 <= low < high"),
        ({"l1": [1, 10**400]}, "saes.relu.ranges.l1: expected [low, high] with 0 <= low < high"),
        ({"l1": [0.1, 1, 2]}, "saes.relu.ranges.l1"),
        ({"l1": ["low", 2]}, "saes.relu.ranges.l1.0: expected a number, found 'low'"),
        ({"l2": [1, 2]}, "saes.relu.ranges.l2: unknown key l2. Known keys: dead_after_tokens, grad_clip, l1, lr,"),
        ({"betas": [0.1, 0.9]}, "saes.relu.ranges.betas: expected a key with numbers (dead_after_tokens"),
        ({"tokens": [10, 20]}, "saes.relu.ranges.tokens: expected a key that leaves the budget as it is"),
        ({"lr_warmup_steps": [0.5, 9]}, "saes.relu.ranges.lr_warmup_steps: expected a whole number, found 0.5"),
        ({}, "saes.relu.ranges"),
    ],
)  # fmt: skip
def test_a_wrong_range_is_refused_in_one_line(ranges: dict[str, Any], message: str) -> None:
    params = parameters()
    params["saes"]["relu"]["ranges"] = ranges
    refused(params, message)


def refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        validate(params)
    assert len(error.value.lines) == 1
    assert error.value.lines[0].startswith(message)


def without_ranges(params: dict[str, Any]) -> dict[str, Any]:
    for entry in params["saes"].values():
        entry.pop("ranges", None)
    return params


def test_what_a_sweep_lacks_is_refused_in_one_line() -> None:
    refused(parameters(sweep=None), "saes.relu.ranges: expected the section sweep")
    refused(without_ranges(parameters()), "sweep: expected an entry of saes with ranges")
    refused(parameters(sweep={"trials": 3}), "sweep: the key l0 is missing")
    refused(parameters(sweep=SWEEP | {"trials": 1}), "sweep.trials: expected at least 2, found 1")
    refused(
        parameters(sweep=SWEEP | {"trial": 1}), "sweep: unknown key trial. Known keys: l0, seed"
    )
    refused(parameters(sweep=SWEEP | {"selection_share": 1}), "sweep.selection_share")
    refused(
        parameters(sweep=SWEEP | {"trials": 9000}),
        "saes: expected at most 20,000 SAEs, found 36,002, most of them the 18,000",
    )
    without_sums = parameters()
    without_sums["evaluation"]["bootstrap"] = None
    refused(
        without_sums, "evaluation.bootstrap: expected resamples and a seed, as sweep chooses trials"
    )
    swept = parameters()
    swept["saes"]["topk"]["ranges"]["k"] = [2, 8]
    refused(
        swept,
        "saes.topk.ranges.k: expected one number for k in the entry, which trial 0 takes, found [4, 8]",
    )
    swept["saes"]["topk"] |= {"options": {"k": 4}, "ranges": {"k": [100, 4000]}}
    refused(swept, "saes.topk.ranges.k: expected 1..128 (d_sae), found 4000")
    guided = parameters()
    guided["saes"]["topk"] |= {"options": {"k": {"mean_l0_of": "relu/d128-trial0-seed0"}}}
    refused(guided, "saes.topk.options.k.mean_l0_of: expected a run of an entry without ranges")
    imported = parameters()
    imported["saes"]["theirs"] = {
        "store": "synthetic/features",
        "import": {"library": "saelens", "folder": "."},
        "ranges": RANGES,
    }
    refused(imported, "saes.theirs: unknown key ranges")


def test_a_refusal_ends_the_command_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(parameters(sweep=None)))
    monkeypatch.setattr("sys.argv", ["saeflow", "validate", "--params", str(path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: saes.relu.ranges: expected")


def test_one_trial_more_trains_its_own_runs_alone() -> None:
    few, more = (
        Jobs(Plan(validate(parameters(sweep=SWEEP | {"trials": n})))) for n in (3, 4)
    )  # fmt: skip
    assert all(more.sae(run).key == few.sae(run).key for run in few.plan.runs)
    assert all(more.evaluation(run).key == few.evaluation(run).key for run in few.plan.runs)
    assert {trial_of(run) for run in more.plan.runs.keys() - few.plan.runs.keys()} == {3}
    other = Jobs(Plan(validate(parameters(sweep=SWEEP | {"trials": 3, "l0": 9}))))
    assert all(other.evaluation(run).key == few.evaluation(run).key for run in few.plan.runs)
    assert len({few.sweeps().key, more.sweeps().key, other.sweeps().key}) == 3


def test_a_plan_has_the_trials_of_each_setting_with_all_seeds() -> None:
    plan = Plan(validate(parameters()))
    found = {(one["entry"], one["trials"][0]["setting"]): one for one in plan.sweeps}
    assert set(found) == {
        ("relu", "d128-trial0"),
        ("topk", "d128-k4-trial0"),
        ("topk", "d128-k8-trial0"),
    }
    first = found["relu", "d128-trial0"]["trials"][0]
    assert first["drawn"] == "lr 0.002, l1 0.5, lr_warmup_steps 10"
    assert [run.rpartition("-")[2] for run in first["runs"]] == ["seed0", "seed1"]
    assert [one["trial"] for one in found["relu", "d128-trial0"]["trials"]] == [0, 1, 2, 3]
    assert sorted(plan.tried) == sorted(run for run in plan.runs if trial_of(run) is not None)


def test_a_plan_s_needs_count_the_trials() -> None:
    def table(params: dict[str, Any]) -> str:
        plan = Plan(validate(params))
        rates = Rates.read(ROOT / "benchmarks/results/rates.yaml")
        return as_text(Needs(plan, rates, count_passes(plan, ROOT / "results")))

    tuned = table(parameters())
    assert "18 SAEs (16 trials of a sweep)" in tuned
    assert "trials" not in table(without_ranges(parameters(sweep=None)))


@pytest.mark.parametrize("every_run", [False, True])
def test_a_rehearsal_of_a_sweep_is_a_valid_file(every_run: bool) -> None:
    params = parameters()
    params["saes"]["topk"] |= {
        "options": {"k": 8},
        "ranges": {"k": [2, 100], "dead_after_tokens": [1000, 10**6]},
    }
    before = copy.deepcopy(params)
    small = validate(rehearsal_of(validate(params), every_run=every_run).params)
    assert small["sweep"]["trials"] == (4 if every_run else 2)
    assert {trial_of(run.name) for run in expand_runs(small)} >= {None, 0, 1}
    assert params == before
