"""Features of gated worlds fire as a slow sampler of every feature lets them, and as often as SynthSAEBench says."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm

from saeflow.config import ROOT, load_params
from saeflow.sources.gated_firing import (
    Firing,
    World,
    compensated,
    random_loadings,
    zipf_probabilities,
)
from saeflow.sources.near_orthogonal import orthogonalised
from saeflow.sources.synthetic_world import drawn_world

ROWS = 20_000
# 0 has the exclusive children 1 to 3, 1 the free ones 4 and 5; 6 and 7 have no parent and exclude each other, 8 is free.
PARENTS = [-1, 0, 0, 0, 1, 1, -1, -1, -1]
GROUPS = [-1, 0, 0, 0, -1, -1, 9, 9, -1]
IS_SCALED = [False, True, True, True, False, True, False, False, False]


def small_world(**change: Any) -> World:
    rng = np.random.default_rng(0)
    loadings, own = random_loadings(9, 2, 0.5, rng)
    arrays: dict[str, Any] = {
        "features": np.eye(9), "bias": np.zeros(9), "probabilities": [0.6, 0.7, 0.5, 0.3, 0.6, 0.8, 0.5, 0.4, 0.2],
        "means": np.linspace(2, 1, 9), "stds": np.full(9, 0.8), "parents": np.array(PARENTS, dtype=np.int32),
        "groups": np.array(GROUPS, dtype=np.int32), "is_scaled": np.array(IS_SCALED), "loadings": loadings, "own": own,
        **change,
    }  # fmt: skip
    return World(**{
        name: np.asarray(array, dtype=np.float32) if name not in ("parents", "groups", "is_scaled") else array
        for name, array in arrays.items()
    })  # fmt: skip


def dense(world: World, rows: int, rng: np.random.Generator) -> np.ndarray:
    """Reference: every feature of every row is drawn, then silenced from the roots down, row by row."""
    factors = rng.standard_normal((rows, world.loadings.shape[1]))
    gaussian = factors @ world.loadings.T + world.own * rng.standard_normal((rows, 9))
    fires = norm.cdf(gaussian) > 1 - world.probabilities
    values = np.maximum(world.means + world.stds * rng.standard_normal((rows, 9)), 0) * fires
    for row in values:
        for group in (0, 9):
            rivals = [i for i in range(9) if world.groups[i] == group and row[i] > 0]
            if rivals:
                winner = rng.choice(rivals)
                row[[i for i in rivals if i != winner]] = 0
        for child in range(9):  # parents come before their children
            if (parent := world.parents[child]) >= 0:
                gate = row[parent] / world.means[parent] if world.is_scaled[child] else row[parent] > 0  # fmt: skip
                row[child] *= gate
    return values


def drawn(world: World, rows: int, rng: np.random.Generator) -> np.ndarray:
    entries = Firing(world).draw(rows, rng)
    assert (entries.values > 0).all()
    assert (np.diff(entries.rows * 9 + entries.features) > 0).all()
    found = np.zeros((rows, 9))
    found[entries.rows, entries.features] = entries.values
    return found


def test_moments_are_those_of_drawing_every_feature() -> None:
    world = small_world()
    ours, theirs = drawn(world, ROWS, np.random.default_rng(1)), dense(world, ROWS, np.random.default_rng(2))  # fmt: skip
    both = []
    for values in (ours, theirs):
        fires = values > 0
        pairs = np.einsum("ri,rj->rij", fires, fires).reshape(ROWS, -1)
        both.append(np.hstack([values, values**2, pairs, fires.sum(axis=1)[:, None] ** 2]))
    error = np.sqrt(sum(part.var(axis=0) for part in both) / ROWS)
    assert (np.abs(both[0].mean(axis=0) - both[1].mean(axis=0)) <= 4.5 * error).all()


def test_independent_features_fire_with_their_probabilities_and_a_certain_one_always() -> None:
    free = {"parents": np.full(9, -1), "groups": np.full(9, -1), "stds": np.zeros(9)}
    p = [1.0, 0.9, 0.5, 0.2, 0.1, 0.05, 0.01, 0.5, 0.5]
    world = small_world(**free, probabilities=p, loadings=np.zeros((9, 0)), own=np.ones(9))
    found = drawn(world, ROWS, np.random.default_rng(3))
    np.testing.assert_allclose((found > 0).mean(axis=0), p, atol=4.5 * np.sqrt(0.25 / ROWS), rtol=0)
    assert (found[:, 0] == 2).all()
    assert set(np.unique(found[:, 8])) == {0.0, 1.0}


def test_compensation_by_hand() -> None:
    """A child of p .1 under .4 with exclusive siblings of .06 in all: .1 / .4 (1 + .06 / .4)."""
    given = np.array([0.4, 0.1, 0.04, 0.02, 0.05, 0.3])
    parents, groups = np.array([-1, 0, 0, 0, 1, -1]), np.array([-1, 0, 0, 0, -1, -1])
    raised = compensated(given, parents, groups)
    by_hand = [0.4, 0.25 * 1.15, 0.1 * 1.3, 0.05 * 1.35, 0.5, 0.3]
    np.testing.assert_allclose(raised, by_hand)
    assert compensated(np.array([0.1, 0.2]), np.array([-1, 0]), np.array([-1, -1]))[1] == 1


def test_probabilities_fall_from_the_largest_to_the_least() -> None:
    p = zipf_probabilities(4, exponent=1.0, p_max=0.5, p_min=0.2)
    np.testing.assert_allclose(p, 0.2 + 0.3 * (np.array([1, 1 / 2, 1 / 3, 1 / 4]) - 1 / 4) / 0.75)
    assert zipf_probabilities(1, exponent=1.0, p_max=0.5, p_min=0.2).tolist() == [0.5]


def test_loadings_leave_a_hundredth_of_a_feature_its_own() -> None:
    loadings, own = random_loadings(400, 3, 0.6, np.random.default_rng(0))
    square = np.square(loadings).sum(axis=1)
    np.testing.assert_allclose(square + own**2, 1, atol=1e-6)
    assert square.max() == pytest.approx(0.99, abs=1e-6)
    assert loadings[square < 0.98].std() < 0.6  # the long ones were shortened
    few = random_loadings(4000, 3, 0.1, np.random.default_rng(0))[0]
    assert few.std() == pytest.approx(0.1, rel=0.03)


def test_orthogonalisation_takes_the_steps_of_torch() -> None:
    start = np.random.default_rng(0).standard_normal((40, 12)).astype(np.float32)
    start /= np.linalg.norm(start, axis=1, keepdims=True)
    rows = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.Adam([rows], lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        products = rows @ rows.T
        norms = products.diagonal()
        loss = (products - torch.diag(norms)).square().sum() + 40 * (norms - 1).square().sum()
        loss.backward()
        optimizer.step()
    expected = torch.nn.functional.normalize(rows, dim=1).detach().numpy()
    np.testing.assert_allclose(orthogonalised(start, steps=20, lr=0.01), expected, atol=1e-4)


def test_the_preset_has_the_l0_that_the_benchmark_states() -> None:
    """About 34 active features, and 25 of the first 4096 (docs/synth_sae_bench.md of SAELens)."""
    (source,) = load_params(ROOT / "presets/synthsaebench.yaml")["sources"].values()
    law = source["world"] | {"orthogonalise": None}
    world = drawn_world(law, 8, np.random.default_rng(0))
    entries = Firing(world).draw(4096, np.random.default_rng(1))
    assert len(world.features) == 16384
    assert len(entries.rows) / 4096 == pytest.approx(34, abs=1)
    assert (entries.features < 4096).sum() / 4096 == pytest.approx(25, abs=0.6)
