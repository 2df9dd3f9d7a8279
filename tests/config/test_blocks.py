"""Hook points of all blocks or of a range, written out."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from saeflow.config import expand_runs, validate
from saeflow.errors import UserError
from saeflow.plan import Plan

from .test_parameters import MINIMAL

GPT2 = [f"blocks.{n}.resid_post" for n in range(12)]  # its pin is known


def changed(points: list[str], store: Any) -> dict[str, Any]:
    params = copy.deepcopy(yaml.safe_load(MINIMAL))
    params["sources"]["gpt2"]["hook_points"] = points
    for entry in params["saes"].values():
        entry["store"] = store
    return dict(params)


def test_every_block_is_written_out_from_the_number_of_blocks() -> None:
    params = validate(changed(["blocks.*.resid_post"], "gpt2/blocks.*.resid_post"))
    assert params["sources"]["gpt2"]["hook_points"] == GPT2
    assert {run.hook_point for run in expand_runs(params)} == set(GPT2)
    assert [hook_point for _, hook_point in Plan(params).stores] == sorted(GPT2)


def test_a_range_and_single_ones_are_kept_in_order() -> None:
    points = ["blocks.2-4.mlp_out", "blocks.7.resid_pre"]
    params = validate(changed(points, ["gpt2/blocks.2-3.mlp_out", "gpt2/blocks.7.resid_pre"]))
    expected = ["blocks.2.mlp_out", "blocks.3.mlp_out", "blocks.4.mlp_out", "blocks.7.resid_pre"]
    assert params["sources"]["gpt2"]["hook_points"] == expected
    assert {run.hook_point for run in expand_runs(params)} == {
        expected[0],
        expected[1],
        expected[3],
    }


def test_a_local_folders_config_tells_the_number(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    params = changed(["blocks.*.mlp_in"], "gpt2/blocks.*.mlp_in")
    params["sources"]["gpt2"]["model"] = {"folder": str(tmp_path)}
    found = validate(params)["sources"]["gpt2"]["hook_points"]
    assert found == ["blocks.0.mlp_in", "blocks.1.mlp_in"]


@pytest.mark.parametrize(
    ("points", "store", "message"),
    [
        (["blocks.*.resid"], "gpt2/blocks.0.resid", r"hook_points"),
        (["blocks.4-2.mlp_out"], "gpt2/blocks.2.mlp_out", r"expected FIRST-LAST in rising order"),
        (["blocks.0-99.mlp_out"], "gpt2/blocks.99-.mlp_out", r"store"),
        (
            ["blocks.0-3.mlp_out"],
            "gpt2/blocks.*.mlp_out",
            r"no such store: gpt2/blocks\.4\.mlp_out",
        ),
    ],
)
def test_what_names_no_blocks_is_refused(points: list[str], store: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(changed(points, store))


def test_a_model_whose_blocks_are_not_known_is_refused_in_one_line() -> None:
    params = changed(["blocks.*.resid_post"], "gpt2/blocks.0.resid_post")
    params["sources"]["gpt2"]["model"] = {"hub": "someone/something", "revision": 40 * "b"}
    with pytest.raises(
        UserError, match=r"hook_points: blocks\.\*\.resid_post: expected a model whose"
    ) as caught:
        validate(params)
    assert len(caught.value.lines) == 1
