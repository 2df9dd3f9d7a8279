"""Defaults stand in one place, every key is described, and all mistakes are said at once."""

import copy
import importlib.resources
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from saeflow.cli import main
from saeflow.config import ROOT, expand_runs, load_params, read_yaml, validate
from saeflow.config.describe import as_markdown, as_text, keys
from saeflow.config.options import defaults
from saeflow.config.variants import variants
from saeflow.errors import UserError
from saeflow.jobs import Jobs
from saeflow.plan import Plan

PAGE = (ROOT / "docs" / "own-data.md").read_text()
MINIMAL = re.search(r"## A whole parameter file\n.*?```yaml\n(.*?)```", PAGE, re.DOTALL)[1]
FILES = [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]


def test_the_parameter_file_of_the_documentation_is_whole_in_thirty_lines() -> None:
    assert len(MINIMAL.splitlines()) <= 30
    plan = Plan(validate(yaml.safe_load(MINIMAL)))
    assert len(plan.runs) == 4
    training = plan.runs["gpt2/blocks.8.resid_pre/topk/d6144-k16-seed0"].training
    assert (training.betas, training.lr, training.grad_clip) == ((0.9, 0.999), "auto", 1.0)
    store = plan.params["stores"]["gpt2"]
    assert store["shard_rows"] % store["chunk_rows"] == 0


@pytest.mark.parametrize(
    ("source", "filled"),
    [
        (
            {
                "kind": "synthetic", "d_in": 16, "n_features": 32, "l0_law": {"kind": "constant", "mean": 3},
                "frequency_exponent": 0, "coefficient": {"kind": "normal", "mean": 1, "std": 0.2}, "noise_std": 0,
            },
            {"hook_points": ["features"], "skip_first": False, "max_norm_multiple": None, "seed": 0},
        ),
        (
            {
                "kind": "vision", "model": {"hub": "openai/clip-vit-base-patch16", "revision": 40 * "a"},
                "hook_points": ["vision.blocks.2.resid_post"], "evaluation_share": 0.1, "tokens": "cls",
                "images": {"dataset": "a/b", "revision": 40 * "b", "split": "train", "image_column": "image", "streaming": True},
            },
            {
                "unreadable_share": 0, "max_norm_multiple": 10,
                "images": {"name": None, "label_column": None, "shuffle_seed": None},
            },
        ),
    ],
)  # fmt: skip
def test_a_source_has_the_defaults_of_its_kind(source: Any, filled: Any) -> None:
    params: Any = yaml.safe_load(MINIMAL)
    hook_point = source.get("hook_points", ["features"])[0]
    params["sources"], params["stores"] = {"one": source}, {"one": params["stores"]["gpt2"]}
    for entry in params["saes"].values():
        entry["store"] = f"one/{hook_point}"
    found = validate(params)["sources"]["one"]
    assert_kept(filled, found)
    assert_kept(source, found)
    assert "prepend_bos" not in found


def test_an_entry_has_the_training_of_all_where_it_states_none() -> None:
    params: Any = yaml.safe_load(MINIMAL)
    params["training"]["lr"] = 0.001
    params["saes"]["topk"]["grad_clip"] = None
    runs = expand_runs(validate(params))
    assert {run.training.lr for run in runs} == {0.001}
    assert {(run.entry, run.training.grad_clip) for run in runs} == {
        ("topk", None),
        ("jumprelu", 1.0),
    }


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
    jobs = Jobs(Plan(bare))
    expected = jobs.evaluation(run).key, jobs.report().key
    for params in (written, stated(bare)):
        jobs = Jobs(Plan(validate(params)))
        assert (jobs.evaluation(run).key, jobs.report().key) == expected


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


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("sources", "gpt2", "kind"), "sources.gpt2: the key kind is missing"),
        (("saes", "topk", "variant"), "saes.topk: the key variant is missing"),
    ],
)
def test_a_missing_key_that_decides_what_else_is_allowed_is_the_only_mistake(
    path: tuple[str, str, str], line: str
) -> None:
    params: Any = yaml.safe_load(MINIMAL)
    del params[path[0]][path[1]][path[2]]
    with pytest.raises(UserError) as caught:
        validate(params)
    assert [one.split(". Add it")[0] for one in caught.value.lines] == [line]
