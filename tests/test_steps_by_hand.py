"""The steps from a source to a store, given options instead of the workflow's task."""

import json
from pathlib import Path
from typing import Any

import pytest

from saeflow import provenance
from saeflow.cli import main
from saeflow.cli.arguments import stated
from saeflow.config import ROOT, load_params

SOURCE = {
    "kind": "synthetic", "d_in": 8, "n_features": 16, "l0_law": {"kind": "constant", "mean": 3},
    "frequency_exponent": 0, "coefficient": {"kind": "normal", "mean": 1, "std": 0.2}, "noise_std": 0,
    "hook_points": ["features"], "skip_first": False, "max_norm_multiple": None, "seed": 0,
    "coherence": None, "hierarchy": None, "correlation": None, "row_norm": None,
}  # fmt: skip
STORE = {
    "train_rows": 256, "evaluation_rows": 128, "dtype": "float32", "chunk_rows": 64, "shard_rows": 128,
    "codec": "none", "block_contexts": 1, "seed": 0,
}  # fmt: skip
RUNTIME = {"device": "cpu", "precision": "fp32"}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["saeflow", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def assert_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], wrong: str, folder: Path
) -> None:
    said = capsys.readouterr().err
    assert said.startswith(f"error: {wrong}")
    assert len(said.splitlines()) == 1
    assert not folder.exists()


def task(out: Path, params: dict[str, Any], **reads: Path) -> str:
    shared = {"params": params, "reads": {role: str(path) for role, path in reads.items()}}
    job = {"out": str(out), "key": "", "params": {}, "reads": {}}
    return json.dumps({"shared": shared, "jobs": [job]})


def test_options_make_the_store_that_tasks_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEFLOW_RUNTIME", json.dumps(RUNTIME))
    source, store = json.dumps(SOURCE), json.dumps(STORE)
    rows = {"train": 256, "evaluation": 128}
    by_hand = tmp_path / "by_hand"
    of_split = ("--source", source, "--store", store, "--split", "train", "--folder", by_hand)
    steps: list[tuple[object, ...]] = [
        ("prepare", "--source", source, "--rows", json.dumps(rows), "--folder", by_hand),
        ("extract", *of_split, "--threads", 1, "--out", by_hand / "part"),
        ("merge", by_hand / "part", "--name", "s", *of_split, "--out", by_hand / "store"),
    ]
    by_task = tmp_path / "by_task"
    inputs, params = (
        by_task / "inputs",
        {"source": SOURCE, "store": STORE, "split": "train", "name": "s"},
    )
    made = task(by_task / "store", params, inputs=inputs)
    steps += [
        ("prepare", task(inputs, {"source": SOURCE, "rows": rows})),
        ("extract", made, "--threads", 1, "--out", by_task / "part"),
        ("merge", made, by_task / "part"),
    ]
    assert [run(monkeypatch, *step) for step in steps] == [0] * len(steps)
    content = [provenance.read_record(folder / "store")["content"] for folder in (by_hand, by_task)]
    assert content[0] == content[1]


def test_an_entry_given_by_hand_has_the_defaults_of_a_parameter_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text at the default for what is shared and for contexts of one document, as `params.yaml` would read it."""
    params = load_params(ROOT / "presets" / "tiny.yaml")
    (source,) = (one for one in params["sources"].values() if one["kind"] == "text")
    needed = ("kind", "model", "hook_points", "text", "evaluation_share", "context_length")
    short = {name: source[name] for name in needed} | {"forward_batch": 4.0}
    (filled,) = stated(source=json.dumps(short))
    assert set(filled) == set(source)
    assert (filled["shared_run"], filled["contexts_per_document"]) == (13, 8)
    assert type(filled["forward_batch"]) is int
    without = {name: value for name, value in SOURCE.items() if name not in ("coherence", "seed")}
    folder = tmp_path / "by_hand"
    command = ("prepare", "--source", json.dumps(without), "--rows", '{"train": 256}')
    assert run(monkeypatch, *command, "--folder", folder) == 0
    record = provenance.read_record(folder / "inputs")
    assert record["params"]["source"]["seed"] == 0


@pytest.mark.parametrize(
    ("entry", "wrong"),
    [
        ({**SOURCE, "d_inn": 8}, "--source: unknown key d_inn. Known keys: "),
        ({**SOURCE, "d_in": "wide"}, "--source.d_in: expected a whole number, found 'wide'."),
        ({"kind": "text"}, "--source: the keys context_length, evaluation_share, hook_points, model, text are missing"),
        ([], "--source: expected a mapping, found []."),
    ],
)  # fmt: skip
def test_a_mistake_in_an_entry_given_by_hand_is_one_line(
    entry: Any,
    wrong: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "by_hand"
    command = ("prepare", "--source", json.dumps(entry), "--rows", '{"train": 256}')
    assert run(monkeypatch, *command, "--folder", folder) == 2
    assert_refused_in_one_line(capsys, wrong, folder)


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (("fetch", "--model", "{}", "--out"), "--model: the keys hook_points, model are missing"),
        (("fetch", "--model", '{"model": {}, "hook_points": ["blocks.1.resid_post"]}', "--out"), "--model.model: "),
        (("fetch", "--model", '{"model": {"folder": "x"}, "hook_points": ["block"]}', "--out"), "--model.hook_points"),
        (("fetch", "--model", '{"model": {"folder": "x"}, "hook_points": []}', "--out"), "--model.hook_points"),
        (("prepare", "--source", json.dumps(SOURCE), "--rows", '{"test": 9}', "--folder"), "--rows: unknown key test. Known keys: "),
        (("prepare", "--source", json.dumps(SOURCE), "--rows", '{"train": "9x"}', "--folder"), "--rows.train: expected a whole number, found '9x'."),
        (("prepare", "--source", json.dumps(SOURCE), "--rows", "{}", "--folder"), "--rows: "),
        (("prepare", "--source", json.dumps(SOURCE), "--rows", "[]", "--folder"), "--rows: expected a mapping, found []."),
    ],
)  # fmt: skip
def test_a_mistake_in_other_options_is_one_line(
    arguments: tuple[str, ...],
    wrong: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "by_hand"
    assert run(monkeypatch, *arguments, folder) == 2
    assert_refused_in_one_line(capsys, wrong, folder)


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (("fetch",), "--model, --out"),
        (("prepare", "--source", "{}", "--rows", "{}"), "--folder"),
        (("label", "--labelled", "{}", "--folder", "x"), "--out"),
        (("extract", "--threads", "1", "--out", "x", "--store", "{}"), "--source, --folder"),
        (("merge", "part", "--source", "{}"), "--store, --folder, --out"),
    ],
)
def test_a_missing_option_is_named(
    arguments: tuple[str, ...],
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SAEFLOW_RUNTIME", json.dumps(RUNTIME))
    assert run(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: expected a TASK, or --")
    assert said.endswith(f"missing: {missing}.\n")
