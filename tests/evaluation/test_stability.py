"""Agreement of two seeds: by construction, against brute force and scipy, on trained SAEs."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from saeflow.evaluation.rows import EvaluatedRows, RowSelection
from saeflow.evaluation.stability import compare_dictionaries, compare_seeds
from saeflow.saes.batch_topk import BatchTopK, BatchTopKOptions

EVERY = RowSelection(positions="all", norm_limit=None)


def directions(seed: int, rows: int = 30) -> torch.Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))


ALIVE = (np.ones(30, bool), np.ones(30, bool))


def test_the_same_dictionary_in_another_order_agrees_wholly() -> None:
    a = directions(0)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    found = compare_dictionaries(a, 2 * a[order], ALIVE)
    assert set(found) == {
        "max_cosine_ab",
        "max_cosine_ba",
        "matched_cosine",
        "matched_cosine_alive",
    }
    assert all(value == pytest.approx(1) for value in found.values())


def test_cosines_are_those_of_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saeflow.evaluation.stability._AT_ONCE", 7)  # several blocks
    a, b = directions(0), directions(1)
    found = compare_dictionaries(a, b, ALIVE, most_matched=29)
    similar = np.array(
        [[float(x @ y / x.norm() / y.norm()) for y in b.double()] for x in a.double()]
    )
    assert found["max_cosine_ab"] == pytest.approx(similar.max(1).mean())
    assert found["max_cosine_ba"] == pytest.approx(similar.max(0).mean())
    mutual = [
        (i, j)
        for i in range(30)
        for j in range(30)
        if similar[i].argmax() == j and similar[:, j].argmax() == i
    ]
    assert found["mutual_share"] == pytest.approx(len(mutual) / 30)
    assert found["mutual_max_cosine"] == pytest.approx(np.mean([similar[p] for p in mutual]))
    assert "matched_cosine" not in found


def test_dead_latents_are_left_out_of_the_living_only() -> None:
    a, b = directions(0), directions(0)
    b[20:] = directions(5, 10)
    alive = np.arange(30) < 20
    found = compare_dictionaries(a, b, (alive, alive))
    assert found["matched_cosine_alive"] == pytest.approx(1)
    assert found["matched_cosine"] < 0.97


def sae(seed: int, threshold: float) -> BatchTopK:
    made = BatchTopK(6, 30, BatchTopKOptions(k=3, auxk_weight=0, threshold_start_step=0))
    with torch.no_grad():
        made.W_dec.copy_(directions(seed))
        made.W_enc.copy_(directions(seed).t())
        made.threshold.fill_(threshold)
    return made.eval()


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_numbers_of_active_latents_are_compared_row_by_row(
    memory_store: type, batch_size: int
) -> None:
    x = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)
    saes = {4: sae(0, 0.5), 1: sae(1, 0.8), 2: sae(2, 0.1)}
    lines = compare_seeds(saes, EvaluatedRows(memory_store(x), EVERY, batch_size, "cpu"))
    assert {(line["seed_a"], line["seed_b"]) for line in lines} == {(1, 2), (1, 4), (2, 4)}
    with torch.no_grad():
        l0 = {seed: (one.encode(torch.tensor(x)) != 0).sum(1) for seed, one in saes.items()}
    for line in lines:
        if line["metric"] == "spearman_l0":
            expected = spearmanr(l0[line["seed_a"]], l0[line["seed_b"]])[0]
            assert line["value"] == pytest.approx(expected, abs=1e-12)
    assert not any(line["metric"] == "spearman_k_hat" for line in lines)
