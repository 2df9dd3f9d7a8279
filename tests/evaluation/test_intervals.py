"""Intervals against plain loops over drawn units, and against the theory of means."""

from typing import Any

import numpy as np
import pytest
import torch

from saeflow.evaluation.intervals import (
    PerUnit,
    bounds,
    by_unit,
    interval_lines,
    ratios,
    resample,
    total,
)
from saeflow.evaluation.reconstruction import Reconstruction

RNG = np.random.default_rng(0)
SETTINGS = {"resamples": 200, "seed": 3}


@pytest.fixture
def rows() -> dict[str, Any]:
    """Rows of 30 contexts of different sizes in any order; context 7 has none."""
    context = RNG.choice([i for i in range(30) if i != 7], 400)
    x = torch.from_numpy(RNG.normal(size=(400, 6)) + 1)
    latents = torch.from_numpy(RNG.random((400, 9)) * (RNG.random((400, 9)) < 0.3))
    return {"context": context, "x": x, "x_hat": x * 0.7 + 0.1, "l0": (latents != 0).sum(1)}


def per_context(rows: dict[str, Any], batches: int, units: np.ndarray | None = None) -> PerUnit:
    each = np.arange(30) if units is None else units
    found, rebuilt = PerUnit(each, SETTINGS), Reconstruction(rows["x"].mean(0))
    for part in np.array_split(np.arange(400), batches):
        terms = rebuilt.add(rows["x"][part], rows["x_hat"][part])
        found.add_rows(rows["context"][part], terms, rows["l0"][part])
    return found


def test_sums_of_contexts_give_the_metrics_of_the_split(rows: dict[str, Any]) -> None:
    rebuilt = Reconstruction(rows["x"].mean(0))
    rebuilt.add(rows["x"], rows["x_hat"])
    found = ratios(total(per_context(rows, 7).sums))
    expected = rebuilt.metrics()
    for metric in ("fvu", "nmse", "cosine"):
        assert found[metric] == pytest.approx(expected[metric], rel=1e-12)
    assert found["l0_mean"] == pytest.approx(float(rows["l0"].double().mean()))


def test_batches_change_nothing(rows: dict[str, Any]) -> None:
    one, many = (interval_lines(per_context(rows, n).sums, SETTINGS) for n in (1, 9))
    for a, b in zip(one, many, strict=True):
        assert a["metric"] == b["metric"]
        assert [a[k] for k in ("value", "low", "high")] == pytest.approx(
            [b[k] for k in ("value", "low", "high")], rel=1e-9
        )


def test_a_resample_is_the_metric_of_its_contexts(rows: dict[str, Any]) -> None:
    """Against rows copied out, context by context, as often as it was drawn."""
    sums = per_context(rows, 3).sums
    drawn = ratios(resample(sums, SETTINGS))
    random = np.random.default_rng(SETTINGS["seed"])
    present = sorted(set(rows["context"]))
    assert len(sums["rows"]) == len(present) == 29
    mean = rows["x"].mean(0)
    for number in range(20):
        chosen = random.integers(29, size=29)
        taken = np.concatenate([np.flatnonzero(rows["context"] == present[i]) for i in chosen])
        x, x_hat = rows["x"][taken], rows["x_hat"][taken]
        error = (x - x_hat).square().sum()
        assert drawn["fvu"][number] == pytest.approx(float(error / (x - mean).square().sum()))
        assert drawn["nmse"][number] == pytest.approx(float(error / x.square().sum()))
        assert drawn["l0_mean"][number] == pytest.approx(float(rows["l0"][taken].double().mean()))


def test_an_interval_is_as_wide_as_the_theory_of_means_says() -> None:
    values = np.random.default_rng(5).normal(size=2000)
    sums = {"l0": values, "rows": np.ones(2000)}
    low, high = bounds(ratios(resample(sums, {"resamples": 2000, "seed": 0}))["l0_mean"], 2000)
    half = 1.96 * values.std() / np.sqrt(2000)
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_lines_name_their_units(rows: dict[str, Any]) -> None:
    lines = interval_lines(per_context(rows, 2).sums, SETTINGS)
    assert [line["metric"] for line in lines] == ["fvu", "nmse", "cosine", "l0_mean"]
    for line in lines:
        assert line["low"] <= line["value"] <= line["high"]
        assert line["units"] == 29


def test_contexts_of_a_document_are_drawn_together(rows: dict[str, Any]) -> None:
    """Against rows copied out, document by document; documents hold 1 to 6 contexts."""
    documents = np.repeat([4, 9, 2, 30, 7, 1, 12, 5], [1, 2, 3, 4, 5, 6, 6, 3])
    sums = per_context(rows, 3, documents).sums
    drawn = ratios(resample(sums, SETTINGS))
    random = np.random.default_rng(SETTINGS["seed"])
    present = sorted(set(documents))
    for number in range(20):
        chosen = random.integers(8, size=8)
        taken = np.concatenate(
            [np.flatnonzero(documents[rows["context"]] == present[i]) for i in chosen]
        )
        error = (rows["x"][taken] - rows["x_hat"][taken]).square().sum()
        assert drawn["nmse"][number] == pytest.approx(
            float(error / rows["x"][taken].square().sum())
        )
    of_contexts = per_context(rows, 3).all
    expected = {name: by_unit({"sum": v}, documents)["sum"] for name, v in of_contexts.items()}
    for name, values in per_context(rows, 5, documents).saved.items():
        if name == "unit":
            assert values.tolist() == present
        else:
            assert values == pytest.approx(expected[name])


def test_documents_that_differ_widen_the_interval_of_their_contexts() -> None:
    """40 documents of 25 equal contexts: an interval over contexts would be 5 times too narrow."""
    values = np.repeat(np.random.default_rng(1).normal(size=40), 25)
    sums = {"l0": values, "rows": np.ones(1000)}
    documents = np.arange(1000) // 25
    settings = {"resamples": 2000, "seed": 0}
    widths = {}
    for name, held in {"contexts": sums, "documents": by_unit(sums, documents)}.items():
        low, high = bounds(ratios(resample(held, settings))["l0_mean"], len(held["l0"]))
        assert low is not None
        assert high is not None
        widths[name] = high - low
    assert widths["documents"] / widths["contexts"] == pytest.approx(5, rel=0.15)


def test_one_document_has_no_interval_and_the_log_says_so(
    rows: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    found = interval_lines(per_context(rows, 2, np.zeros(30, int)).sums, SETTINGS)
    assert all(line["low"] is line["high"] is None for line in found)
    assert {line["units"] for line in found} == {1}
    assert "no interval" in caplog.text
