"""Our synthetic worlds against those of `sae_lens.synthetic`: the same structure exactly, the same rows within statistical error."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from saeflow.sources.base import generator
from saeflow.sources.firing import Hierarchy
from saeflow.sources.gated_firing import Firing, compensated, zipf_probabilities
from saeflow.sources.near_orthogonal import orthogonalised
from saeflow.sources.saved_world import read_world

N, D_IN, ROWS = 120, 24, 60_000
FIRING = {"exponent": 0.5, "max_prob": 0.4, "min_prob": 0.01}
FOREST = {"roots": 6, "branching": 3, "depth": 2}
CONFIG: dict[str, Any] = {
    "num_features": N, "hidden_dim": D_IN, "seed": 7, "bias": 0.5, "dtype": "float32",
    "firing_probability": {"generator_name": "zipfian", **FIRING},
    "hierarchy": {
        "total_root_nodes": 6, "branching_factor": 3, "max_depth": 2, "mutually_exclusive_portion": 1.0,
        "compensate_probabilities": True, "scale_children_by_parent": True,
    },
    "orthogonalization": {"num_steps": 5, "lr": 0.01, "chunk_size": 64},
    "correlation": {"rank": 4, "correlation_scale": 0.3, "seed": None},
    "mean_firing_magnitudes": {"generator_name": "linear", "start": 5.0, "end": 4.0},
    "std_firing_magnitudes": {"generator_name": "folded_normal", "mean": 0.5, "std": 1.5, "min_value": None, "max_value": None},
}  # fmt: skip
"""As SynthSAEBench-16k's, smaller; correlations and deviations are larger, so that they show."""
LOOSE = CONFIG | {
    "hierarchy": CONFIG["hierarchy"] | {
        "mutually_exclusive_portion": 0.5, "compensate_probabilities": False, "scale_children_by_parent": False,
        "branching_factor": [2, 4],
    },
    "correlation": None, "bias": False,
    "std_firing_magnitudes": {"generator_name": "folded_normal", "mean": 0.1, "std": 0.5, "min_value": 0.2, "max_value": 0.6},
    "mean_firing_magnitudes": {"generator_name": "exponential", "start": 3.0, "end": 1.0},
}  # fmt: skip
WORLDS = {"like the benchmark's": CONFIG, "of other settings": LOOSE}
MOST_ERRORS = 5.0
"""Standard errors; one of 10^6 comparisons passes it by chance, and fewer than 10^5 are made."""


@pytest.fixture(scope="module")
def drawn(foreign: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Worlds and rows of SAELens."""
    folder = tmp_path_factory.mktemp("worlds")
    jobs: list[dict[str, Any]] = []
    for name, config in WORLDS.items():
        jobs.append({"do": "world", "folder": str(folder / name), "config": config, "rows": ROWS})
    features = np.random.default_rng(0).standard_normal((N, D_IN)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    save_file({"features": features}, folder / "features.safetensors")
    law = {"firing": FIRING, "hierarchy": CONFIG["hierarchy"], "n": N, "steps": 30, "lr": 0.01}
    jobs.append({"do": "laws", "folder": str(folder), **law})
    foreign(folder, jobs, "synthetic_worlds.py")
    return folder


def test_structure_is_that_of_saelens(drawn: Path) -> None:
    theirs = load_file(drawn / "laws.safetensors")
    parents = Hierarchy(**FOREST, exclusive=True).parents(N)
    np.testing.assert_array_equal(parents, theirs["parents"])
    base = zipf_probabilities(N, exponent=0.5, p_max=0.4, p_min=0.01)
    np.testing.assert_allclose(base, theirs["probabilities"], rtol=2e-6)
    np.testing.assert_allclose(
        compensated(base, parents, parents), theirs["compensated"], rtol=5e-6
    )
    start = load_file(drawn / "features.safetensors")["features"]
    ours = orthogonalised(start, steps=30, lr=0.01)
    assert np.abs(ours - start).max() > 0.1
    np.testing.assert_allclose(ours, theirs["features"], atol=2e-4)


@pytest.mark.parametrize("name", WORLDS)
def test_a_saved_world_is_read_as_saelens_reads_it(drawn: Path, name: str) -> None:
    there = load_file(drawn / name / "drawn.safetensors")
    world = read_world(drawn / name)
    np.testing.assert_array_equal(world.means, there["means"])
    np.testing.assert_array_equal(world.stds, there["stds"])
    np.testing.assert_allclose(there["latents"] @ world.features + world.bias, there["x"], atol=1e-4)  # fmt: skip


def agree(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Means over rows of two samples differ by less than MOST_ERRORS standard errors, each of them."""
    spread = ours.var(axis=0) / len(ours) + theirs.var(axis=0) / len(theirs)
    rare = (ours != 0).sum(axis=0) + (theirs != 0).sum(axis=0) < 100
    difference = np.abs(ours.mean(axis=0) - theirs.mean(axis=0))
    assert (difference <= MOST_ERRORS * np.sqrt(spread) + 1e-12)[~rare].all()
    assert (~rare).mean() > 0.3


@pytest.mark.parametrize("name", WORLDS)
def test_rows_have_the_moments_of_those_that_saelens_draws(drawn: Path, name: str) -> None:
    theirs = load_file(drawn / name / "drawn.safetensors")["latents"]
    world = read_world(drawn / name)
    entries = Firing(world).draw(ROWS, generator(0, 0, 0))
    ours = np.zeros((ROWS, N), dtype=np.float32)
    ours[entries.rows, entries.features] = entries.values
    fires = [(latents > 0).astype(np.float64) for latents in (ours, theirs)]
    agree(*fires)  # firing probabilities
    agree(ours.astype(np.float64), theirs.astype(np.float64))  # coefficients
    agree(np.square(ours, dtype=np.float64), np.square(theirs, dtype=np.float64))
    counts = [fired.sum(axis=1)[:, None] for fired in fires]
    agree(*(np.hstack([count, count**2, count**3]) for count in counts))  # L0 and its spread
    norms = [np.linalg.norm(part @ world.features + world.bias, axis=1) for part in (ours, theirs)]
    agree(*(np.stack([norm, norm**2], axis=1).astype(np.float64) for norm in norms))
    together = [fired.T @ fired / ROWS for fired in fires]  # pairs
    spread = sum(pair * (1 - pair) / ROWS for pair in together)
    common = together[0] + together[1] > 200 / ROWS
    difference = np.abs(together[0] - together[1])
    assert (difference <= MOST_ERRORS * np.sqrt(spread))[common].all()
    assert common.sum() > 300


def test_siblings_that_exclude_each_other_never_fire_together(drawn: Path) -> None:
    world = read_world(drawn / "like the benchmark's")
    theirs = load_file(drawn / "like the benchmark's" / "drawn.safetensors")["latents"] > 0
    entries = Firing(world).draw(ROWS, generator(1, 0, 0))
    ours = np.zeros((ROWS, N), dtype=bool)
    ours[entries.rows, entries.features] = True
    for fires in (ours, theirs):
        for parent in range(24):
            siblings = fires[:, world.parents == parent].sum(axis=1)
            assert siblings.max() == 1
            assert not (siblings > fires[:, parent]).any()
