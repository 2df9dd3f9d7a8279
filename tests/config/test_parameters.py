"""Defaults stand in one place, every key is described, and all mistakes are said at once."""

import copy
import importlib.resources
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from saeflow.cli import main
from saeflow.config import ROOT, load_params, read_yaml, validate
from saeflow.config.describe import as_markdown, as_text, keys
from saeflow.config.options import defaults
from saeflow.config.variants import variants
from saeflow.errors import UserError
from saeflow.plan import Plan

MINIMAL = """\
sources:
  gpt2:
    kind: text
    model: {hub: openai-community/gpt2, revision: 607a30d783dfa663caf39e06633721c8d4cfcd7e}
    hook_points: [blocks.8.resid_pre]
    text: {bundled: english}
    evaluation_share: 0.1
    context_length: 128
stores:
  gpt2: {train_rows: 1000000, evaluation_rows: 20000}
training:
  tokens: 4000000
  batch_size: 2048
saes:
  topk:
    variant: topk
    store: gpt2/blocks.8.resid_pre
    d_sae: 6144
    options: {k: [16, 32, 64]}
  jumprelu:
    variant: jumprelu
    store: gpt2/blocks.8.resid_pre
    d_sae: 6144
    options: {l0_weight: 1.0, target_l0: 32}
"""
FILES = [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]


def test_thirty_lines_are_a_parameter_file() -> None:
    assert len(MINIMAL.splitlines()) <= 30
    plan = Plan(validate(yaml.safe_load(MINIMAL)))
    assert len(plan.runs) == 4
    training = plan.runs["gpt2/blocks.8.resid_pre/topk/d6144-k16-seed0"].training
    assert (training.betas, training.lr, training.grad_clip) == ((0.9, 0.999), "auto", 1.0)
    assert plan.store("gpt2")["shard_rows"] % plan.store("gpt2")["chunk_rows"] == 0


def stated(value: Any) -> Any:
    """A copy through YAML, as if all of it had been written in a file."""
    return yaml.safe_load(yaml.safe_dump(value))


@pytest.mark.parametrize(
    "part", ["training", "stores", "evaluation", "runtime", "figures", "sources"]
)
def test_defaults_that_are_stated_change_no_key(part: str) -> None:
    bare = validate(yaml.safe_load(MINIMAL))
    written = {**yaml.safe_load(MINIMAL), part: stated(bare[part])}
    assert validate(written) == bare
    run = "gpt2/blocks.8.resid_pre/topk/d6144-k16-seed0"
    for plan in (Plan(validate(written)), Plan(validate(stated(bare)))):
        assert plan.key_evaluation(run) == Plan(bare).key_evaluation(run)
        assert plan.key_report() == Plan(bare).key_report()


def assert_kept(stated: Any, found: Any) -> None:
    """Every stated value is there as it was stated."""
    if isinstance(stated, dict):
        for name, value in stated.items():
            if name != "preset":
                assert_kept(value, found[name])
        return
    assert found == stated
    assert repr(found) == repr(stated)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_a_file_states_is_left_as_it_is(path: Path) -> None:
    assert_kept(read_yaml(path), load_params(path))


def test_every_key_is_described() -> None:
    assert len(keys()) > 250
    assert not [key.name for key in keys() if len(key.meaning.split()) < 2]


def test_every_key_of_the_shipped_files_is_described() -> None:
    known = {key.path for key in keys()}
    placeholders = {
        ("sources",),
        ("stores",),
        ("complexity",),
        ("saes",),
        ("evaluation", "labelled_sets"),
        ("evaluation", "also_on"),
    }

    def below(value: Any, path: tuple[str, ...]) -> None:
        if path == ("saes", "NAME", "options"):
            return
        if path:
            assert path in known, path
        if isinstance(value, dict):
            for name, one in value.items():
                below(one, (*path, "NAME" if path in placeholders else name))

    for path in FILES:
        below(load_params(path), ())


def test_the_page_of_parameters_is_current() -> None:
    page = (ROOT / "docs" / "parameters.md").read_text()
    assert page == as_markdown(), "run `make docs`"


def test_a_part_of_the_parameters_is_printed() -> None:
    text = as_text("stores")
    assert (
        "stores.NAME.chunk_rows\n    Rows read at once.\n    whole number at least 1; rows; default 4096"
        in text
    )
    assert "sources" not in text
    with pytest.raises(UserError, match="store: expected the start of a key"):
        as_text("store")


def test_the_schema_is_part_of_the_package() -> None:
    assert (importlib.resources.files("saeflow.config") / "params.schema.yaml").is_file()


def mistaken() -> Any:
    params: Any = copy.deepcopy(yaml.safe_load(MINIMAL))
    params["stores"]["gpt2"] |= {"chunk_rows": 0, "dtype": "float8"}
    params["training"] = {"batch_size": 2048, "lr": "fast"}
    params["saes"]["topk"]["options"]["kk"] = 3
    return params


def test_all_mistakes_are_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(mistaken()))
    monkeypatch.setattr(sys, "argv", ["saeflow", "validate", "--params", str(path)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.removeprefix(f"error: {path}: ").split(":")[0] for line in lines] == [
        "saes.topk.options", "stores.gpt2.chunk_rows", "stores.gpt2.dtype", "training", "training.lr",
    ]  # fmt: skip


def test_mistakes_that_a_schema_cannot_see_are_said_at_once_too() -> None:
    params: Any = yaml.safe_load(MINIMAL)
    params["stores"]["gpt2"] |= {"shard_rows": 5000, "block_contexts": 33}
    params["sources"]["gpt2"]["hook_points"] *= 2
    with pytest.raises(UserError) as caught:
        validate(params)
    assert [line.split(":")[0] for line in caught.value.lines] == [
        "stores.gpt2.shard_rows", "sources.gpt2.hook_points", "stores.gpt2.block_contexts",
    ]  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_entry_repeats_a_default_of_its_variant(path: Path) -> None:
    repeated = [
        f"{name}.{option}"
        for name, entry in read_yaml(path)["saes"].items()
        if "preset" not in entry.get("options", {"preset": ""})
        for option, default in defaults(variants()[entry["variant"]]).items()
        if entry["options"].get(option, ...) == default
    ]
    assert not repeated
