"""Worlds are drawn or read, rows are sums of their features, and files that do not fit are refused in a line."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from saeflow.errors import UserError
from saeflow.sources import check_source, external_inputs, kind_of, open_source, prepare_inputs
from saeflow.sources.saved_world import read_world
from saeflow.sources.synthetic_world import WorldSource

from .fake_hub import NAME, SHA, serving

LAWS: dict[str, Any] = {
    "n_features": 60, "firing": {"exponent": 0.5, "p_max": 0.4, "p_min": 0.02},
    "coefficient": {"mean": {"first": 5.0, "last": 4.0}, "std": {"mean": 0.5, "std": 0.5}},
    "hierarchy": {"roots": 4, "branching": 3, "depth": 2, "exclusive": True, "compensate": True, "scale_children": True},
    "correlation": {"rank": 3, "scale": 0.1}, "orthogonalise": {"steps": 3, "lr": 0.01}, "bias_norm": 0.5,
}  # fmt: skip
PARAMS: dict[str, Any] = {
    "kind": "synthetic_world", "hook_points": ["features"], "d_in": 24, "world": LAWS, "skip_first": False,
    "max_norm_multiple": None, "seed": 0,
}  # fmt: skip
PLAIN = LAWS | {"hierarchy": None, "correlation": None, "orthogonalise": None, "bias_norm": 0.0}


def made(folder: Path, **change: Any) -> WorldSource:
    params = PARAMS | change
    (folder / "inputs").mkdir(parents=True)
    rows = {"train": 1000, "evaluation": 300}
    told = prepare_inputs(params, rows, folder / "model", folder / "inputs")
    source = open_source(params, folder, "cpu")
    assert isinstance(source, WorldSource)
    counts = (source.block("train", 0, 8).columns["true_indices"] >= 0).sum(1)
    assert told["true_l0_mean"] == pytest.approx(counts.mean(), rel=0.15)
    return source


@pytest.mark.parametrize("laws", [LAWS, PLAIN], ids=["all", "none"])
def test_rows_are_sums_of_the_stored_features(laws: dict[str, Any], tmp_path: Path) -> None:
    source = made(tmp_path, world=laws)
    stored = load_file(tmp_path / "inputs/dictionary.safetensors")
    assert np.linalg.norm(stored["bias"]) == pytest.approx(laws["bias_norm"], abs=1e-6)
    np.testing.assert_allclose(np.linalg.norm(stored["features"], axis=1), 1, atol=1e-5)
    assert source.n_contexts("train") == 8
    block = source.block("train", 0, 8)
    indices = block.columns["true_indices"]
    latents = np.zeros((1024, 60))
    for number in range(8):
        entries = source.active("train", number)
        latents[128 * number + entries.rows, entries.features] = entries.values
    for row, found in zip(latents, indices, strict=True):
        assert found[found >= 0].tolist() == np.flatnonzero(row).tolist()
        assert (found[(row > 0).sum() :] == -1).all()
    rebuilt = latents @ stored["features"] + stored["bias"]
    np.testing.assert_allclose(block.activations["features"].numpy(), rebuilt, atol=1e-4)
    assert (stored["stds"] >= 0).all()
    np.testing.assert_allclose(stored["means"][[0, -1]], [5, 4])


def test_blocks_of_any_division_hold_the_same_bits(tmp_path: Path) -> None:
    source = made(tmp_path)
    whole = source.block("train", 0, 8)
    parts = [source.block("train", i, min(i + 3, 8)) for i in range(0, 8, 3)]
    together = torch.cat([part.activations["features"] for part in parts])
    assert torch.equal(together, whole.activations["features"])
    for name, column in whole.columns.items():
        assert np.array_equal(np.concatenate([part.columns[name] for part in parts]), column)
        assert (column.dtype, column.shape[1:]) == source.columns[name]
    other = source.block("evaluation", 0, 1).activations["features"]
    assert not torch.equal(other, whole.activations["features"][:128])


def test_probes_read_the_counts_of_the_stores(tmp_path: Path) -> None:
    source = made(tmp_path)
    inputs = kind_of(PARAMS).inputs(PARAMS, tmp_path / "inputs", tmp_path / "model")
    context, position, count = inputs.true_counts("train", np.array([2, 5]))
    for number in (2, 5):
        columns = source.block("train", number, number + 1).columns
        at = context == number
        assert np.array_equal(position[at], columns["position"])
        assert np.array_equal(count[at], (columns["true_indices"] >= 0).sum(1))
    assert inputs.n_contexts("evaluation") == 3
    features = inputs.true_features
    assert features is not None
    assert features.shape == (60, 24)


# Worlds that SAELens saved.

N, D_IN = 6, 3
SAVED: dict[str, Any] = {
    "num_features": N, "hidden_dim": D_IN, "seed": 3, "bias": 0.0, "hierarchy": {"total_root_nodes": 1},
    "mean_firing_magnitudes": {"generator_name": "linear", "start": 2.0, "end": 1.0}, "std_firing_magnitudes": 0.5,
}  # fmt: skip


def node(index: int | None, *children: Any, exclusive: bool = False, scales: bool = False) -> Any:
    return {
        "feature_index": index, "mutually_exclusive_children": exclusive, "scale_children_by_parent": scales,
        "feature_id": None, "children": list(children),
    }  # fmt: skip


# 0 over a node without a feature, which excludes 1 and 2 and scales them; 2 over 3.
ROOTS = [node(0, node(None, node(1), node(2, node(3)), exclusive=True, scales=True)), node(4)]


def write_saved(folder: Path, config: Any = None, roots: Any = ROOTS, **tensors: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "synthetic_model_config.json").write_text(json.dumps(SAVED | (config or {})))
    (folder / "hierarchy.json").write_text(json.dumps({"roots": roots}))
    arrays = {
        "feature_vectors": np.eye(N, D_IN), "bias": np.zeros(D_IN), "firing_probabilities": np.full(N, 0.5),
        "correlation_factor": np.full((N, 2), 0.1), "correlation_diag": np.full(N, 0.98),
    }  # fmt: skip
    save_file(
        {name: np.asarray(part, dtype=np.float32) for name, part in (arrays | tensors).items()},
        folder / "synthetic_model.safetensors",
    )
    return folder


def test_a_hierarchy_is_read_with_its_nodes_without_a_feature(tmp_path: Path) -> None:
    world = read_world(write_saved(tmp_path))
    assert world.parents.tolist() == [-1, 0, 0, 2, -1, -1]
    assert world.is_scaled.tolist() == [False, True, True, False, False, False]
    assert world.groups[1] == world.groups[2] >= 0
    assert (world.groups[[0, 3, 4, 5]] == -1).all()
    np.testing.assert_allclose(world.own, np.sqrt(0.98), rtol=1e-6)
    np.testing.assert_allclose(world.means, [2, 1.8, 1.6, 1.4, 1.2, 1])
    np.testing.assert_allclose(world.stds, 0.5)


def test_a_saved_world_is_a_source(tmp_path: Path) -> None:
    folder = write_saved(tmp_path / "saved")
    change = {"d_in": D_IN, "world": {"folder": str(folder)}}
    source = made(tmp_path / "source", **change)
    assert np.array_equal(source.world.features, np.eye(N, D_IN))
    (digest,) = external_inputs(PARAMS | change).values()
    write_saved(folder, bias=np.ones(D_IN))
    assert external_inputs(PARAMS | change) != {str(folder): digest}


PREPARE = """
import json, sys
from pathlib import Path
from saeflow.sources import prepare_inputs
prepare_inputs(json.loads(sys.argv[1]), {"train": 1, "evaluation": 1}, Path("none"), Path(sys.argv[2]))
"""


def test_a_world_of_the_hub_is_fetched_by_its_commit(tmp_path: Path) -> None:
    params = PARAMS | {"d_in": D_IN, "world": {"hub": NAME, "revision": SHA}}
    assert external_inputs(params) == {f"hub:{NAME}": SHA}
    inputs = tmp_path / "source" / "inputs"
    inputs.mkdir(parents=True)
    with serving(write_saved(tmp_path / "saved"), "none", "") as address:
        environment = os.environ | {
            "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
        }  # fmt: skip
        command = [sys.executable, "-c", PREPARE, json.dumps(params), str(inputs)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    stored = load_file(inputs / "dictionary.safetensors")
    assert stored["parents"].tolist() == [-1, 0, 0, 2, -1, -1]


FOLDED = {"generator_name": "folded_normal", "mean": 0.0, "std": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": np.zeros(2)}, r"bias: expected shape \[3\], found \[2\]"),
        ({"firing_probabilities": np.full(N, np.nan)}, "firing_probabilities is not finite"),
        ({"config": {"std_firing_magnitudes": FOLDED, "seed": None}}, "seed: expected a number"),
        ({"config": {"std_firing_magnitudes": {"generator_name": "own"}}}, "expected a number or the law"),
        ({"config": {"mean_firing_magnitudes": 0.0}}, "expected numbers above 0 for parents"),
        ({"roots": [node(0, node(0))]}, "at most once, found 0"),
        ({"roots": [node(9)]}, r"each of 0\.\.5 at most once, found 9"),
        ({"roots": [{"children": []}]}, "expected a hierarchy of SAELens"),
        ({"config": {"num_features": "6"}}, "with num_features and hidden_dim"),
    ],
)  # fmt: skip
def test_a_saved_world_that_does_not_fit_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_saved(tmp_path, **change)
    with pytest.raises(UserError, match=message):
        read_world(folder)


@pytest.mark.parametrize("file", ["synthetic_model_config.json", "synthetic_model.safetensors", "hierarchy.json"])  # fmt: skip
def test_a_missing_file_of_a_saved_world_is_named(file: str, tmp_path: Path) -> None:
    folder = write_saved(tmp_path)
    (folder / file).unlink()
    with pytest.raises(UserError, match=rf"{file}: no such file"):
        read_world(folder)


def test_a_damaged_file_of_a_saved_world_is_named(tmp_path: Path) -> None:
    folder = write_saved(tmp_path)
    (folder / "synthetic_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"synthetic_model\.safetensors: damaged"):
        read_world(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hook_points": ["blocks.0.resid_pre"]}, r"expected \[features\]"),
        ({"world": LAWS | {"n_features": 51}}, "it has 52 features, n_features is 51"),
        ({"world": LAWS | {"firing": {"exponent": 1.0, "p_max": 0.1, "p_min": 0.1}}}, "is not below p_max"),
        ({"world": {"folder": "nowhere"}}, "nowhere/synthetic_model_config.json: no such file"),
        ({"world": {"folder": "SAVED"}}, "expected 3, the width of the saved world, found 24"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_is_refused_before_any_job(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    check_source("s", PARAMS, tmp_path)
    params = copy.deepcopy(PARAMS) | change
    if params["world"].get("folder") == "SAVED":
        params["world"] = {"folder": str(write_saved(tmp_path))}
    with pytest.raises(UserError, match=message):
        check_source("s", params, tmp_path)


def test_a_row_with_more_features_than_there_is_room_for_is_refused(tmp_path: Path) -> None:
    source = made(tmp_path)
    source.room = 2
    with pytest.raises(UserError, match="there is room for 2"):
        source.active("train", 0)
