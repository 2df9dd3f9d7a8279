"""Synthetic activations are sums of the stored features, the same bits however they are read."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy.stats import spearmanr

from saeflow.errors import UserError
from saeflow.sources import (
    Source,
    check_source,
    external_inputs,
    open_source,
    prepare_inputs,
)
from saeflow.sources.drawn_rows import ROWS_PER_CONTEXT
from saeflow.sources.synthetic import coefficients

EASY: dict[str, Any] = {
    "kind": "synthetic",
    "hook_points": ["features"],
    "d_in": 24,
    "n_features": 60,
    "coherence": None,
    "frequency_exponent": 0.5,
    "l0_law": {"kind": "constant", "mean": 5},
    "correlation": None,
    "hierarchy": None,
    "coefficient": {"kind": "normal", "mean": 1.0, "std": 0.25},
    "noise_std": 0.05,
    "seed": 0,
    "skip_first": False,
    "max_norm_multiple": None,
}
POISSON = {"kind": "poisson", "mean": 5.0, "smallest": 1, "largest": 16}
BERNOULLI = {"kind": "bernoulli", "mean": 5.0, "p_min": 0.001, "p_max": 0.4, "largest": 20}
FULL: dict[str, Any] = {
    "l0_law": POISSON,
    "correlation": {"rank": 4, "strength": 0.4},
    "hierarchy": {"roots": 4, "branching": 3, "depth": 2, "exclusive": True},
    "coefficient": {"kind": "lognormal", "mean": 1.0, "std": 0.5},
}
CASES = pytest.mark.parametrize("change", [{}, FULL, FULL | {"l0_law": BERNOULLI}], ids=["easy", "full", "bernoulli"])  # fmt: skip


def made(folder: Path, change: dict[str, Any], train: int = 2000, evaluation: int = 300) -> Source:
    params = EASY | change
    (folder / "inputs").mkdir(parents=True, exist_ok=True)
    rows = {"train": train, "evaluation": evaluation}
    prepare_inputs(params, rows, folder / "model", folder / "inputs")
    return open_source(params, folder, "cpu")


@CASES
def test_rows_are_sums_of_the_stored_features_and_noise(
    change: dict[str, Any], tmp_path: Path
) -> None:
    source = made(tmp_path, change)
    features = load_file(tmp_path / "inputs" / "dictionary.safetensors")["features"]
    block = source.block("train", 0, source.n_contexts("train"))
    x = block.activations["features"].numpy()
    assert x.dtype == np.float32
    indices, values = block.columns["true_indices"], block.columns["true_values"]
    clean = np.zeros_like(x)
    for row, (active, weights) in enumerate(zip(indices, values, strict=True)):
        for feature, weight in zip(active, weights, strict=True):
            if feature >= 0:
                assert weight > 0
                clean[row] += weight * features[feature]
            else:
                assert weight == 0
    noise = x - clean
    assert noise.std() == pytest.approx(0.05, rel=0.02)
    assert abs(noise.mean()) < 5 * 0.05 / noise.size**0.5
    norms = np.linalg.norm(noise, axis=1) / 0.05
    assert np.mean(norms**2) == pytest.approx(24, rel=0.02)


@CASES
def test_blocks_of_any_division_hold_the_same_bits(change: dict[str, Any], tmp_path: Path) -> None:
    source = made(tmp_path, change)
    n = source.n_contexts("train")
    whole = source.block("train", 0, n)
    for step in (1, 3, 5):
        parts = [source.block("train", i, min(i + step, n)) for i in range(0, n, step)]
        got = torch.cat([part.activations["features"] for part in parts])
        assert torch.equal(got, whole.activations["features"])
        for name, column in whole.columns.items():
            assert np.array_equal(np.concatenate([part.columns[name] for part in parts]), column)
            assert column.dtype == source.columns[name][0]
            assert column.shape[1:] == source.columns[name][1]


def test_seed_and_split_make_other_data_and_nothing_else_does(tmp_path: Path) -> None:
    def rows(name: str, split: str = "train", **change: Any) -> torch.Tensor:
        return made(tmp_path / name, change).block(split, 0, 2).activations["features"]

    first = rows("a")
    assert torch.equal(rows("b"), first)
    for other in (rows("a", "evaluation"), rows("c", seed=1)):
        assert not torch.isclose(other, first).all(dim=1).any()
    files = [tmp_path / name / "inputs" / "dictionary.safetensors" for name in "abc"]
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    more = made(tmp_path / "d", {}, train=9000).block("train", 0, 2).activations["features"]
    assert torch.equal(more, first)


def test_contexts_cover_the_rows_asked_for(tmp_path: Path) -> None:
    source = made(tmp_path, {}, train=2 * ROWS_PER_CONTEXT + 1, evaluation=ROWS_PER_CONTEXT)
    assert (source.n_contexts("train"), source.n_contexts("evaluation")) == (3, 1)
    columns = source.block("train", 1, 3).columns
    assert columns["context"].tolist() == [1] * ROWS_PER_CONTEXT + [2] * ROWS_PER_CONTEXT
    assert columns["position"].tolist() == list(range(ROWS_PER_CONTEXT)) * 2
    assert source.d_in == {"features": 24}
    assert source.rows_per_context == ROWS_PER_CONTEXT


def counts(source: Source, contexts: int) -> np.ndarray:
    return (source.block("train", 0, contexts).columns["true_indices"] >= 0).sum(axis=1)


def test_the_number_of_active_features_is_known_and_follows_its_law(tmp_path: Path) -> None:
    assert set(counts(made(tmp_path / "a", {}), 10)) == {5}
    varying = counts(made(tmp_path / "b", FULL), 80)
    assert varying.mean() == pytest.approx(5, abs=4 * 5**0.5 / len(varying) ** 0.5)
    assert varying.var() == pytest.approx(5, rel=0.1)


@pytest.mark.parametrize("hierarchy", [None, FULL["hierarchy"]])
def test_bernoulli_firing_has_the_mean_asked_for_even_with_a_hierarchy(
    hierarchy: Any, tmp_path: Path
) -> None:
    source = made(tmp_path, {"l0_law": BERNOULLI, "hierarchy": hierarchy})
    found = counts(source, 100)
    assert found.mean() == pytest.approx(5, rel=0.04)
    assert found.std() > 1


def test_a_child_is_active_only_with_its_parent(tmp_path: Path) -> None:
    source = made(tmp_path, FULL)
    parents = load_file(tmp_path / "inputs" / "dictionary.safetensors")["parents"]
    for active in source.block("train", 0, 10).columns["true_indices"]:
        on = set(active[active >= 0].tolist())
        assert {int(parents[i]) for i in on} - {-1} <= on


@pytest.mark.parametrize("kind", ["normal", "lognormal"])
def test_coefficients_are_positive_with_their_mean_and_deviation(kind: str) -> None:
    law = {"kind": kind, "mean": 2.0, "std": 0.5}
    values = coefficients(law, (400, 500), np.random.default_rng(0))
    assert values.dtype == np.float32
    assert values.min() > 0
    assert values.mean() == pytest.approx(2.0, rel=0.005)
    assert values.std() == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l0_law": {"kind": "constant", "mean": 61}}, r"at most 60 active features \(n_features\), found 61"),
        ({"l0_law": POISSON | {"smallest": 17}}, r"smallest \(17\) is above largest \(16\)"),
        ({"l0_law": BERNOULLI | {"mean": 30}}, r"l0_law\.mean: expected between 0\.06 and 24"),
        ({"hierarchy": FULL["hierarchy"] | {"roots": 5}}, "it has 65 features, n_features is 60"),
        ({"hierarchy": FULL["hierarchy"], "l0_law": POISSON | {"largest": 30}}, "at most 20 active features"),
        ({"hook_points": ["blocks.0.resid_pre"]}, r"expected \[features\]"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_is_refused_before_any_job(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    check_source("s", EASY, tmp_path)
    params = copy.deepcopy(EASY) | change
    with pytest.raises(UserError, match=rf"^sources\.s\..*{message}"):
        check_source("s", params, tmp_path)


def test_inputs_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"structure\.json: no such file"):
        open_source(EASY, tmp_path, "cpu")


def test_nothing_comes_from_outside() -> None:
    assert external_inputs(EASY) == {}


def test_worlds_separate_the_count_from_the_norm(tmp_path: Path) -> None:
    """Norms from the rows themselves, and rows rebuilt from what is stored of their features."""
    varying = {"l0_law": {"kind": "uniform", "smallest": 1, "largest": 9}, "noise_std": 0.0}
    worlds: dict[str, dict[str, Any]] = {
        "as drawn": varying,
        "balanced": varying | {"row_norm": {"kind": "balanced"}},
        "equal": varying | {"row_norm": {"kind": "equal"}},
        "varying": {"noise_std": 0.0, "row_norm": {"kind": "varying", "sigma": 0.5}},
    }
    norms, counts = {}, {}
    for name, change in worlds.items():
        source = made(tmp_path / name.replace(" ", "-"), change, train=6000)
        block = source.block("train", 0, source.n_contexts("train"))
        x = block.activations["features"].double().numpy()
        indices, values = block.columns["true_indices"], block.columns["true_values"]
        features = load_file(
            tmp_path / name.replace(" ", "-") / "inputs" / "dictionary.safetensors"
        )
        rebuilt = np.einsum("rk,rkd->rd", values * (indices >= 0), features["features"][indices])
        np.testing.assert_allclose(x, rebuilt, atol=1e-5)
        norms[name], counts[name] = np.linalg.norm(x, axis=1), (indices >= 0).sum(1)
    told = {name: spearmanr(norms[name], counts[name])[0] for name in ("as drawn", "balanced")}
    assert told["as drawn"] > 0.8
    assert abs(told["balanced"]) < 0.25
    for count in range(1, 10):
        rows = norms["balanced"][counts["balanced"] == count]
        assert np.square(rows).mean() == pytest.approx(1 + 0.25**2, rel=0.25)
    assert norms["equal"] == pytest.approx(1, abs=1e-6)
    assert len(np.unique(counts["equal"])) == 9
    assert set(counts["varying"]) == {5}
    plain = made(tmp_path / "plain", {"noise_std": 0.0}, train=6000)
    unscaled = plain.block("train", 0, plain.n_contexts("train")).activations["features"]
    factor = norms["varying"] / np.linalg.norm(unscaled.double().numpy(), axis=1)
    assert factor.mean() == pytest.approx(1, abs=4 * factor.std() / 6000**0.5)
    assert np.log(factor).std() == pytest.approx(0.5, abs=0.03)
