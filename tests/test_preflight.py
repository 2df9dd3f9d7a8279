"""Mistakes that a later job would refuse are refused before the first job."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from saeflow.config import load_params, validate
from saeflow.errors import UserError
from saeflow.files import parse_json
from saeflow.plan import Plan
from saeflow.preflight import (
    check_inputs,
    check_saes,
    checked_plan,
    device_problem,
    take_results,
    warnings,
)

from .workflow.conftest import SYNTHETIC

ROOT = Path(__file__).parents[1]
PARAMS = load_params(ROOT / "params.yaml")


def changed(path: str, value: Any) -> dict[str, Any]:
    """The default parameters with one value set."""
    params: Any = copy.deepcopy(PARAMS)
    *parents, last = path.split("/")
    node = params
    for key in parents:
        node = node[key]
    node[last] = value
    return validate(params)


def test_the_shipped_parameters_pass() -> None:
    check_saes(checked_plan(PARAMS))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        # 4000 evaluation rows of 127 a context (128 tokens less the first): 32 contexts
        ("evaluation/ce_contexts", 33, "evaluation.ce_contexts: expected at most 32 (stores."),
        ("evaluation/dimension/neighbours", [750], "expected less than half of the 1500 rows"),
        ("training/tokens", 1023, "expected training tokens for at least one step of batch_size"),
        (
            "runtime/ranks",
            {"count": 3, "split": "batch"},
            "batch_size: expected a multiple of the 3",
        ),
        ("runtime/ranks", {"count": 5, "split": "latents"}, "d_sae: expected a multiple of the 5"),
        (
            "stores/smollm2/window_rows",
            60001,
            "stores.smollm2.window_rows: expected at most train_rows (60000), found 60001",
        ),
        ("stores/smollm2/window_rows", 126, "expected at least the 127 rows of a context"),
        (
            "stores/smollm2/keep_windows",
            2,
            "stores.smollm2.keep_windows: expected a training split of several",
        ),
        ("stores/smollm2/keep_windows", "all", "expected a training split of several windows"),
        (
            "stores/scenes/window_rows",
            1000,
            "stores.scenes.window_rows: expected windows of at least one batch (1024 rows), found 60 windows of 1000 rows",
        ),
        (
            "figures/names",
            ["fvu_10"],
            "figures.names: unknown figure 'fvu_10'. Known: adaptivity, ",
        ),
    ],
)
def test_numbers_that_do_not_fit_each_other(path: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        checked_plan(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        # 0.5 + 0.5 of 256 latents leave none for the last group
        ("varying-matryoshka/options/groups", {"fractions": [0.5, 0.5]}, "groups: expected fract"),
        ("varying-matryoshka/options/groups", {"fractions": [0.001]}, "groups: expected fractions"),
        ("entmax/options/activation", "relu", "activation: expected weights or scores"),
        ("sparsemax-mlp/options/query", "linear", "query: expected identity"),
        ("sparsemax/train_decoder", False, "train_decoder: the shared concepts"),
        ("adaptive-k-soft/options/alpha", None, "alpha: expected a number with form soft"),
        (
            "relu/options",
            {"l1": 1.0, "l1_schedule": {"kind": "exponential", "from": 0, "until": 0.5}},
            "an exponential schedule needs values above 0",
        ),
    ],
)
def test_options_that_a_variant_refuses(path: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"^saes\.{path.split('/')[0]}[ .].*{re.escape(message)}"):
        check_saes(checked_plan(changed(f"saes/{path}", value)))


def test_latents_of_a_variant_that_needs_whole_rows_are_not_divided() -> None:
    plan = checked_plan(changed("runtime/ranks", {"count": 2, "split": "latents"}))
    with pytest.raises(UserError, match="latents of SoftTopK cannot be divided among ranks"):
        check_saes(plan)


def test_an_imported_sae_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    config = {"d_in": 576, "d_sae": 64, "activation_fn_str": "tanh-relu"}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    params: Any = copy.deepcopy(PARAMS)
    params["saes"]["theirs"] = {
        "store": "smollm2/blocks.19.resid_post",
        "import": {"library": "saelens", "folder": str(tmp_path)},
    }
    plan = checked_plan(validate(params))
    with pytest.raises(UserError, match=r"saes.theirs.import: .*cfg.json: activation_fn_str"):
        check_saes(plan)


def test_a_dictionary_beyond_memory_is_checked_without_it() -> None:
    check_saes(checked_plan(changed("saes/varying-matryoshka/d_sae", 2**31 - 1)))


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = {"device": "cuda", "ranks": {"count": 1, "split": "batch"}}
    assert device_problem(runtime | {"device": "cpu"}) is None
    assert device_problem(runtime | {"device": "auto"}) is None
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert "is built without CUDA" in str(device_problem(runtime))
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "torch sees no GPU" in str(device_problem(runtime))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_problem(runtime) is None
    assert "cuda:3, found none that works (torch sees 2, counted from cuda:0)" in str(
        device_problem(runtime | {"device": "cuda:3"})
    )
    four = {"device": "cuda", "ranks": {"count": 4, "split": "batch"}}
    assert "torch sees 2, for 4 ranks" in str(device_problem(four))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_json_of_a_command_line_holds_finite_numbers(number: str) -> None:
    with pytest.raises(UserError, match=f"--run: expected finite numbers, found {number}"):
        parse_json("--run", f'{{"training": {{"lr": {number}}}}}')


def test_results_belong_to_one_parameter_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    take_results(["params.yaml"])
    take_results([tmp_path / "params.yaml"])  # the same file under another name
    message = r"expected the parameter file that they were made from, params\.yaml, found presets/tiny\.yaml"
    with pytest.raises(UserError, match=message + r".* add `--directory FOLDER`"):
        take_results([tmp_path / "presets/tiny.yaml"])
    take_results(["params.yaml"])
    assert [path.name for path in (tmp_path / "results").iterdir()] == [".parameters.json"]


def test_many_passes_over_few_rows_are_said() -> None:
    assert warnings(checked_plan(PARAMS)) == []
    (warning,) = warnings(checked_plan(changed("saes/varying-topk/tokens", 80000 * 12)))
    assert (
        "saes.varying-topk: training passes 12 times over the 80,000 rows of stores.varying."
        in warning
    )


def test_settings_that_training_does_not_reach_are_said() -> None:
    params = changed("training/lr_warmup_steps", PARAMS["training"]["tokens"])
    (warning, *_) = warnings(checked_plan(validate(params)))
    assert ": lr_warmup_steps is " in warning
    assert "so that its learning rate never reaches lr. Lower it, or raise tokens." in warning
    store = "synthetic/features"
    late = {
        "variant": "batch_topk",
        "store": store,
        "d_sae": 128,
        "options": {"k": 4, "threshold_start_step": 10**6},
    }
    (warning,) = warnings(checked_plan(validate(changed("saes/late", late))))
    assert warning.startswith("saes.late: threshold_start_step is 1000000, and training has ")


def test_an_evaluation_on_training_data_is_refused() -> None:
    """`python` reading the text of smollm2 with a larger evaluation split: part of it was trained on."""
    params = copy.deepcopy(PARAMS)
    params["sources"]["python"]["text"] = {"bundled": "english"}
    params["evaluation"]["also_on"] = {"smollm2": ["python"]}
    checked_plan(validate(params))  # the same share: the same documents
    params["sources"]["python"]["evaluation_share"] = 0.3
    message = r"also_on\.smollm2: python reads what smollm2 is trained on \(bundled english\), .* 0\.3 is above 0\.15"
    with pytest.raises(UserError, match=message):
        checked_plan(validate(params))


def test_a_file_without_the_column_is_refused_before_the_first_job(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, key in zip(paths, ("text", "body"), strict=True):
        path.write_text(json.dumps({key: "words"}) + "\n")
    given = {"files": [str(path) for path in paths], "column": "text"}
    params = copy.deepcopy(PARAMS)
    params["sources"]["smollm2"]["text"] = given
    plan = checked_plan(validate(params))
    with pytest.raises(
        UserError, match=r"sources\.smollm2\.text: .*b\.jsonl, line 1: no column 'text'"
    ):
        check_inputs(plan)
    paths[1].write_text(json.dumps({"text": "words"}) + "\n")
    check_inputs(plan)


@pytest.mark.parametrize("keep", [1, 0, "most", True, 2.5])
def test_a_stream_keeps_two_windows_at_least(keep: Any) -> None:
    with pytest.raises(
        UserError,
        match=r"stores\.synthetic\.keep_windows: expected null or all or (at least 2|a whole number), found",
    ):
        changed("stores/synthetic/keep_windows", keep)


def test_what_reads_rows_of_windows_that_are_gone_is_refused() -> None:
    """A stream serves SAEs and baselines; PCA is left out with a warning."""
    params: Any = copy.deepcopy(PARAMS)
    params["stores"]["smollm2"] |= {"window_rows": 20000, "keep_windows": 2}
    with pytest.raises(UserError) as refused:
        checked_plan(params)
    assert len(refused.value.lines) == 1
    assert str(refused.value).startswith(
        "stores.smollm2.keep_windows: expected nothing that reads rows"
    )
    params["stores"]["smollm2"]["keep_windows"] = "all"
    about = [line for line in warnings(checked_plan(params)) if "keep_windows" in line]
    assert about
    assert all("fitted to half of the held-out documents" in line for line in about)
    readers = Plan(PARAMS).readers_of_rows("smollm2")
    assert readers
    # Nothing else: a k is found in a pass of its own, and a probe is fitted to held-out rows.
    assert all(r.startswith("evaluation.interpretability.runs with ") for r in readers)
    alone: Any = copy.deepcopy(SYNTHETIC)
    alone["complexity"] = {}
    del alone["saes"]["adaptive-k"]
    alone["stores"]["synthetic"] |= {"window_rows": 5000, "keep_windows": 2}
    alone["figures"]["names"] = ["fvu_l0"]
    assert "PCA baselines of synthetic are left out" in warnings(checked_plan(validate(alone)))[0]


@pytest.mark.parametrize(("seed", "expected"), [(None, 1), (0, 0)])
def test_windows_of_images_in_their_own_order_are_warned_of(
    seed: int | None, expected: int
) -> None:
    params: Any = copy.deepcopy(PARAMS)
    params["sources"]["scenes"]["images"] = {
        "dataset": "ILSVRC/imagenet-1k", "revision": 40 * "0", "split": "train", "image_column": "image", "label_column": "label",
        "streaming": False, "shuffle_seed": seed,
    }  # fmt: skip
    assert not [line for line in warnings(Plan(validate(params))) if "shuffle_seed" in line]
    params["stores"]["scenes"]["window_rows"] = 20000
    found = [line for line in warnings(Plan(validate(params))) if "shuffle_seed" in line]
    assert len(found) == expected
    assert all(line.startswith("stores.scenes.window_rows: windows hold images") for line in found)
