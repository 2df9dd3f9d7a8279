"""Our synthetic worlds against those of `sae_lens.synthetic`: the same structure exactly, the same rows within statistical error."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from saeflow.evaluation.recovery import Recovery
from saeflow.exchange import import_sae
from saeflow.saes import load
from saeflow.sources import kind_of, open_source, prepare_inputs
from saeflow.sources.base import generator
from saeflow.sources.firing import Hierarchy
from saeflow.sources.gated_firing import Firing, compensated, zipf_probabilities
from saeflow.sources.near_orthogonal import orthogonalised
from saeflow.sources.saved_world import read_world

N, D_IN, D_SAE, ROWS = 120, 24, 40, 60_000
PUBLISHED = "like the benchmark's"
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
WORLDS = {PUBLISHED: CONFIG, "of other settings": LOOSE}
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
    sizes = {"d_in": D_IN, "d_sae": D_SAE, "samples": 256 * 40}
    jobs.append({"do": "train", "folder": str(folder), "world": str(folder / PUBLISHED), **sizes})
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
    world = read_world(drawn / PUBLISHED)
    theirs = load_file(drawn / PUBLISHED / "drawn.safetensors")["latents"] > 0
    entries = Firing(world).draw(ROWS, generator(1, 0, 0))
    ours = np.zeros((ROWS, N), dtype=bool)
    ours[entries.rows, entries.features] = True
    for fires in (ours, theirs):
        for parent in range(24):
            siblings = fires[:, world.parents == parent].sum(axis=1)
            assert siblings.max() == 1
            assert not (siblings > fires[:, parent]).any()


@pytest.mark.parametrize("name", ["btk", "mat", "mp", "standard", "jumprelu"])
def test_published_saes_are_measured_on_their_own_world(
    drawn: Path, name: str, tmp_path: Path
) -> None:
    """SAEs as SynthSAEBench publishes them do the same here, and score on the saved world what SAELens says of them."""
    about = {
        "name": f"w/features/{name}/i", "entry": name, "source": "w", "hook_point": "features", "seed": 0,
    }  # fmt: skip
    import_sae(drawn / name, "saelens", about, tmp_path)
    sae = load(tmp_path)
    there = {key: torch.from_numpy(part) for key, part in load_file(drawn / f"{name}.safetensors").items()}  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(there["x"]), there["latents"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(sae(there["x"]), there["x_hat"], atol=1e-4, rtol=1e-4)
    params = {
        "kind": "synthetic_world", "hook_points": ["features"], "d_in": D_IN, "seed": 0,
        "world": {"folder": str(drawn / PUBLISHED)},
    }  # fmt: skip
    inputs = tmp_path / "w" / "inputs"
    inputs.mkdir(parents=True)
    prepare_inputs(params, {"train": 1, "evaluation": 20_000}, tmp_path, inputs)
    block = open_source(params, tmp_path / "w", "cpu").block("evaluation", 0, 157)
    x = block.activations["features"]
    features = kind_of(params).inputs(params, inputs, tmp_path).true_features
    assert features is not None
    recovery = Recovery(torch.from_numpy(features), sae.directions())
    with torch.no_grad():
        latents = sae.encode(x)
        recovery.add(latents, block.columns["true_indices"])
        error = (x - sae.decode(latents)).square().sum() / (x - x.mean(0)).square().sum()
    metrics = recovery.metrics()
    stated = json.loads((drawn / name / "eval_stats.json").read_text())
    assert metrics["mcc"] == pytest.approx(stated["mcc"], abs=1e-5)
    assert metrics["true_l0_mean"] == pytest.approx(stated["true_l0"], rel=0.03)
    if name in ("btk", "mat"):  # SAELens measures them with k a batch, as they were trained
        assert stated["sae_l0"] == 4
        return
    assert float((latents != 0).sum(1).double().mean()) == pytest.approx(stated["sae_l0"], rel=0.05)
    assert 1 - float(error) == pytest.approx(stated["explained_variance"], abs=0.02)
