"""Controls of an SAE that knows the true k, on data where k matters and where it does not."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saeflow.evaluation.controls import Controls, mean_k, threshold_for
from saeflow.evaluation.intervals import PerUnit
from saeflow.evaluation.measure import measure_rows
from saeflow.evaluation.rows import EvaluatedRows, RowSelection
from saeflow.operators import keep_topk

WIDTH, ROWS = 16, 600
SETTINGS = {"resamples": 300, "seed": 0}
ALL = RowSelection(positions="all", norm_limit=None)


class Oracle:
    """Rows are non-negative codes plus noise; the k of a row is the number of its large entries."""

    def pre_activations(self, x: Tensor) -> Tensor:
        return x

    def allowed_k(self, x: Tensor) -> Tensor:
        return (x > 0.5).sum(1).double() + 0.25

    def encode(self, x: Tensor) -> Tensor:
        return keep_topk(x.relu(), self.allowed_k(x).floor().long())

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def rows(counts: np.ndarray) -> np.ndarray:
    """(ROWS, WIDTH) with so many entries near 1, all others near 0."""
    random = np.random.default_rng(1)
    ranks = random.random((len(counts), WIDTH)).argsort(1).argsort(1)
    return (ranks < counts[:, None]) * random.uniform(
        0.7, 1.3, (len(counts), WIDTH)
    ) + random.uniform(0, 0.2, (len(counts), WIDTH))


def lines(store: Any, batch_size: int = 100) -> dict[tuple[str, str], dict[str, Any]]:
    evaluated = EvaluatedRows(store, ALL, batch_size, "cpu")
    contexts = PerUnit(np.arange(ROWS // 4), SETTINGS)
    controls = Controls(Oracle(), evaluated, contexts, SETTINGS)
    found = measure_rows(Oracle(), evaluated, [contexts, controls]).tables["controls"]
    return {(line["control"], line["metric"]): line for line in found}


@pytest.fixture
def varying(memory_store: Any) -> Any:
    counts = np.random.default_rng(2).integers(1, 9, ROWS)
    return memory_store(rows(counts), context=np.arange(ROWS) // 4)


def test_the_true_k_beats_another_rows_and_the_mean(varying: Any) -> None:
    found = lines(varying)
    for control in ("shuffled_k", "k_by_norm", "mean_k"):
        fvu = found[control, "fvu"]
        assert fvu["difference_low"] > 0.01
        assert fvu["difference_low"] < fvu["difference"] < fvu["difference_high"]
        assert found[control, "l0_mean"]["difference"] == pytest.approx(0, abs=0.02)
    assert found["batch_threshold", "l0_mean"]["difference"] == 0


def test_where_k_is_constant_it_gains_nothing(memory_store: Any) -> None:
    store = memory_store(rows(np.full(ROWS, 4)), context=np.arange(ROWS) // 4)
    found = lines(store)
    for control in ("shuffled_k", "k_by_norm", "mean_k"):
        for metric in ("fvu", "nmse", "l0_mean"):
            line = found[control, metric]
            assert line["difference"] == line["difference_low"] == line["difference_high"] == 0


def test_controls_are_what_they_say(varying: Any) -> None:
    """Row by row, by sorting."""
    x = varying.x
    k = (x > 0.5).sum(1).numpy()
    random = np.random.default_rng(SETTINGS["seed"])
    shuffled = random.permutation(k.astype(np.int32))
    mean = mean_k(k, random)
    longest_first = np.sort(k)[::-1]
    norms = np.array([float((row**2).sum()) for row in x.double().numpy()])
    of_norm = np.array([longest_first[int((norms > own).sum())] for own in norms])
    everything = np.sort(x.numpy().ravel())[::-1]
    threshold = everything[k.sum()]
    found = lines(varying)
    for control, kept in {
        "own": [np.argsort(-row)[:n] for row, n in zip(x.numpy(), k, strict=True)],
        "shuffled_k": [np.argsort(-row)[:n] for row, n in zip(x.numpy(), shuffled, strict=True)],
        "k_by_norm": [np.argsort(-row)[:n] for row, n in zip(x.numpy(), of_norm, strict=True)],
        "mean_k": [np.argsort(-row)[:n] for row, n in zip(x.numpy(), mean, strict=True)],
        "batch_threshold": [np.flatnonzero(row > threshold) for row in x.numpy()],
    }.items():
        code = np.zeros_like(x.numpy(), dtype=np.float64)
        for row, chosen in enumerate(kept):
            code[row, chosen] = x.numpy()[row, chosen]
        values = x.double().numpy()
        error = ((values - code) ** 2).sum()
        expected = error / ((values - values.mean(0)) ** 2).sum()
        assert found[control, "fvu"]["value"] == pytest.approx(expected, rel=1e-6)
        assert found[control, "nmse"]["value"] == pytest.approx(error / (values**2).sum(), rel=1e-6)


def test_batch_size_changes_nothing(varying: Any) -> None:
    for a, b in zip(lines(varying, 100).values(), lines(varying, 37).values(), strict=True):
        assert a["value"] == pytest.approx(b["value"], rel=1e-9)
        assert a["difference_high"] == pytest.approx(b["difference_high"], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("active", [0, 1, 7, 500, 4799, 4800, 10_000])
def test_the_threshold_has_exactly_so_many_above(active: int) -> None:
    values = torch.randn(800, 12, generator=torch.Generator().manual_seed(0)).double().exp().float()
    values[:400] *= -1

    def batches() -> Iterator[Tensor]:
        yield from values.split(130)

    threshold = threshold_for(batches, active)
    assert int((values > threshold).sum()) == min(active, 4800)
    least = threshold_for(lambda: iter([torch.full((3, 3), 0.5)]), 4)
    assert least == 0.5  # ties: none of the equal ones


def test_the_mean_k_has_as_many_in_all() -> None:
    k = np.random.default_rng(0).integers(0, 30, 1001).astype(np.int32)
    same = mean_k(k, np.random.default_rng(1))
    assert same.sum() == k.sum()
    assert same.max() - same.min() <= 1


def test_where_the_norm_tells_k_it_is_as_good(memory_store: Any) -> None:
    """Rows whose norm grows with their count: the control hands out the k's that the SAE chose itself."""
    counts = np.random.default_rng(2).integers(1, 9, ROWS)
    x = (np.arange(WIDTH)[None] < counts[:, None]) * 1.0
    found = lines(memory_store(x, context=np.arange(ROWS) // 4))
    assert found["k_by_norm", "fvu"]["difference"] == pytest.approx(0, abs=1e-12)
    assert found["shuffled_k", "fvu"]["difference_low"] > 0.01
