"""Local intrinsic dimension, its control and what follows it, against other libraries and planted data."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import rankdata, spearmanr
from sklearn.linear_model import LinearRegression

from saeflow.errors import UserError
from saeflow.evaluation import manifolds
from saeflow.evaluation.by_dimension import PerRow
from saeflow.evaluation.correlation import (
    correlation,
    multiplicities,
    partial_correlation,
    resampled_correlations,
    resampled_partial,
    resampled_ranks,
)
from saeflow.evaluation.dimension import (
    agreement,
    control,
    local_dimensions,
    write_dimensions,
)
from saeflow.evaluation.measure import Seen

RNG = np.random.default_rng(0)
BOOTSTRAP = {"resamples": 40, "seed": 3}
PATCHES = 4


def seen_in_parts(columns: dict[str, np.ndarray], latents: torch.Tensor) -> list[Seen]:
    """Shuffled rows in three parts; k is the sum of the latents."""
    x = torch.zeros(len(latents), 2)
    found = []
    for part in np.array_split(RNG.permutation(len(x)), 3):
        z = latents[part]
        column = lambda name, part=part: columns[name][part]  # noqa: E731
        found.append(Seen(part, x[part], x[part], z, (z != 0).sum(1), z.sum(1), {}, column))
    return found


def observed(
    dimensions: dict[str, np.ndarray],
    l0: np.ndarray,
    columns: dict[str, np.ndarray],
    groups: dict[str, Any],
    bootstrap: dict[str, int] | None = None,
) -> PerRow:
    """The observer of an SAE that has so many latents of 1 in each row."""
    units = np.arange(int(columns["context"].max()) + 1)
    per_row = PerRow(dimensions, tuple(columns), groups, units, bootstrap)
    latents = torch.zeros(len(l0), int(l0.max()))
    for row, count in enumerate(l0):
        latents[row, : int(count)] = 1
    for seen in seen_in_parts(columns, latents):
        per_row.update(seen)
    return per_row


def of_images(images: int) -> dict[str, np.ndarray]:
    """Columns of images with a CLS token and patches, some of them on an object."""
    position = np.tile(np.arange(1 + PATCHES), images)
    cover = np.where(position == 0, -1, RNG.integers(-1, 2, len(position)))
    return {
        "context": np.repeat(np.arange(images), 1 + PATCHES), "position": position, "cover": cover,
    }  # fmt: skip


def test_partial_correlation_is_that_of_the_residuals() -> None:
    norm = RNG.normal(size=400)
    a, b = norm + RNG.normal(size=400), norm + RNG.normal(size=400)
    ranks = pd.DataFrame({"a": a, "b": b, "n": norm}).rank()
    left, right = (
        ranks[name] - LinearRegression().fit(ranks[["n"]], ranks[name]).predict(ranks[["n"]])
        for name in ("a", "b")
    )
    expected = np.corrcoef(left, right)[0, 1]
    assert partial_correlation(a, b, norm) == pytest.approx(expected)
    assert correlation(a, b) > 0.3 > abs(expected) + 0.05
    assert partial_correlation(a, b, np.ones(400)) == pytest.approx(correlation(a, b))
    assert correlation(np.ones(9), RNG.normal(size=9)) is None


def test_ranks_of_a_resample_are_those_of_its_rows() -> None:
    values = RNG.integers(0, 6, 60).astype(float)
    times = RNG.integers(0, 3, (5, 60)).astype(np.float32)
    ranks = resampled_ranks(values, times)
    for row, held in zip(ranks, times.astype(int), strict=True):
        np.testing.assert_allclose(np.repeat(row, held), rankdata(np.repeat(values, held)))


def test_correlations_of_a_resample_are_those_of_its_rows() -> None:
    norm = RNG.normal(size=80)
    a, b = np.round(norm + RNG.normal(size=80)), norm + RNG.normal(size=80)
    times = RNG.integers(0, 4, (6, 80)).astype(np.float32)
    ranks = {name: resampled_ranks(x, times) for name, x in (("a", a), ("b", b), ("n", norm))}
    ab, an, bn = (
        resampled_correlations(ranks[one], ranks[other], times) for one, other in ("ab", "an", "bn")
    )
    partial = resampled_partial(ab, an, bn)
    for number, held in enumerate(times.astype(int)):
        parts = [np.repeat(x, held) for x in (a, b, norm)]
        assert ab[number] == pytest.approx(spearmanr(*parts[:2]).statistic, abs=1e-5)
        assert partial[number] == pytest.approx(partial_correlation(*parts), abs=1e-4)
    constant = resampled_ranks(np.ones(80), times)
    nothing = resampled_correlations(ranks["a"], constant, times)
    assert np.isnan(nothing).all()
    np.testing.assert_allclose(resampled_partial(ab, nothing, nothing), ab)


def test_rows_of_a_unit_are_drawn_together() -> None:
    units = np.array([7, 7, 2, 5, 5, 5])
    times = multiplicities(units, {"resamples": 200, "seed": 0})
    assert times.shape == (200, 6)
    assert (times[:, 0] == times[:, 1]).all()
    assert (times[:, 3] == times[:, 5]).all()
    assert (times[:, [0, 2, 3]].sum(1) == 3).all()  # as many units as there are
    assert len(np.unique(times, axis=0)) > 5


def test_rows_follow_their_dimension() -> None:
    dimension = RNG.integers(2, 9, 50).astype(np.float32)
    dimension[3] = np.nan
    norm = RNG.random(50).astype(np.float32)
    columns = {"context": np.arange(60), "position": np.zeros(60, int)}
    l0 = np.concatenate([np.nan_to_num(dimension), np.full(10, 2)])
    per_row = observed({"mle-20": dimension, "norm": norm}, l0, columns, {})
    (line,) = per_row.lines()
    assert (line["region"], line["estimator"], line["neighbours"]) == ("all", "mle", 20)
    assert (line["rows"], line["units"]) == (49, 49)
    for name in ("spearman_l0", "spearman_k_hat", "partial_l0"):
        assert line[name] == pytest.approx(1)
    assert "spearman_l0_low" not in line
    bins = pd.DataFrame(per_row.bins())
    assert bins["rows"].tolist() == [5] * 9 + [4]
    known = np.sort(dimension[np.isfinite(dimension)])
    assert bins["dimension"].tolist() == pytest.approx(
        [part.mean() for part in np.array_split(known, 10)]
    )
    assert bins["l0"].tolist() == pytest.approx(bins["dimension"].tolist())


def test_regions_of_images_are_measured_apart_with_intervals_over_images() -> None:
    columns = of_images(40)
    rows = len(columns["position"])
    norm = RNG.random(rows).astype(np.float32)
    dimension = RNG.random(rows).astype(np.float32)
    l0 = 1 + RNG.integers(0, 9, rows) + np.round(9 * dimension * (columns["cover"] >= 0))
    per_row = observed(
        {"mle-20": dimension, "norm": norm}, l0, columns, {"cls": "first", "patches": "rest"}, BOOTSTRAP
    )  # fmt: skip
    lines = {line["region"]: line for line in per_row.lines()}
    first, covered = columns["position"] == 0, columns["cover"] >= 0
    expected = {
        "all": np.ones(rows, bool), "cls": first, "patches": ~first,
        "object": ~first & covered, "background": ~first & ~covered,
    }  # fmt: skip
    assert list(lines) == list(expected)
    for region, held in expected.items():
        line = lines[region]
        images = columns["context"][held]
        assert (line["rows"], line["units"]) == (held.sum(), len(np.unique(images)))
        assert line["spearman_l0"] == pytest.approx(spearmanr(l0[held], dimension[held]).statistic)
        drawn = [
            spearmanr(np.repeat(l0[held], times), np.repeat(dimension[held], times)).statistic
            for times in multiplicities(images, BOOTSTRAP).astype(int)
        ]
        low, high = np.quantile(drawn, [0.025, 0.975])
        found = line["spearman_l0_low"], line["spearman_l0_high"]
        assert found == pytest.approx((low, high), abs=1e-4)
        assert line["partial_k_hat_low"] < line["partial_k_hat"] < line["partial_k_hat_high"]
    assert lines["object"]["spearman_l0_low"] > lines["background"]["spearman_l0_high"]


def test_positions_of_a_text_are_halved_and_one_unit_has_no_interval() -> None:
    columns = {"context": np.zeros(20, int), "position": np.arange(1, 21)}
    dimension = RNG.random(20).astype(np.float32)
    l0 = 1 + RNG.integers(0, 9, 20)
    norm = np.ones(20, np.float32)
    per_row = observed({"mle-20": dimension, "norm": norm}, l0, columns, {}, BOOTSTRAP)
    lines = {line["region"]: line for line in per_row.lines()}
    assert {name: line["rows"] for name, line in lines.items()} == {
        "all": 20,
        "early": 10,
        "late": 10,
    }
    late = spearmanr(l0[10:], dimension[10:]).statistic
    assert lines["late"]["spearman_l0"] == pytest.approx(late)
    assert "spearman_l0_low" not in lines["all"]


@pytest.mark.parametrize("true", [2, 5])
def test_the_dimension_of_a_plane_is_found(true: int) -> None:
    x = RNG.random((800, true)) @ RNG.normal(size=(true, 20))
    x[5] = x[6]  # equal rows have no distance
    for name, values in local_dimensions(x, 60).items():
        assert values.shape == (800,)
        assert np.nanmean(values) == pytest.approx(true, rel=0.25), name


def test_a_union_has_parts_of_their_dimension_far_apart() -> None:
    x, parts = manifolds.union(801, 40, 0)
    assert x.shape == (801, 40)
    assert list(dict.fromkeys(parts)) == list(manifolds.PARTS)
    centres = []
    for kind, dimension in manifolds.PARTS:
        mine = x[[part == (kind, dimension) for part in parts]]
        assert len(mine) in (200, 201)
        centres.append(mine.mean(0))
        spread = np.linalg.svd(mine - centres[-1], compute_uv=False) / np.sqrt(len(mine))
        across = dimension + 1 if kind == "sphere" else 2 * dimension
        assert (spread > 0.02).sum() == across  # the rest is noise
        radius = np.linalg.norm(mine - centres[-1], axis=1)
        assert radius == pytest.approx(np.ones(len(mine)), abs=0.35)  # the centre is estimated
    for number, centre in enumerate(centres):
        others = np.delete(np.stack(centres), number, 0)
        assert np.linalg.norm(others - centre, axis=1).min() > 6
    narrow = manifolds.union(60, 8, 0)[1]
    assert set(narrow) == {("sphere", 2), ("torus", 4)}
    assert manifolds.union(60, 2, 0)[1] == []


def test_estimators_rank_the_rows_of_a_union_and_are_low_on_a_large_sphere() -> None:
    """Few rows of many dimensions have no near neighbours: both estimators are too low there (Levina and Bickel 2004)."""
    x, parts = manifolds.union(600, 40, 0)
    found = {f"{name}-40": values for name, values in local_dimensions(x, 40).items()}
    lines = pd.DataFrame(control(found, parts))
    assert (lines.loc[lines["manifold"] == "union", "spearman"] > 0.85).all()
    bias = lines.set_index(["manifold", "true_dimension", "estimator"])["bias"]
    for name in ("mle", "twonn"):
        assert abs(bias["sphere", 2, name]) < 0.5
        assert bias["sphere", 8, name] < -0.5


def test_the_control_states_bias_and_rank_correlation() -> None:
    parts = [("sphere", 2)] * 5 + [("torus", 4)] * 5
    values = np.array([2.5] * 5 + [3.0] * 4 + [np.nan])
    lines = control({"mle-20": values, "twonn-20": -values}, parts)
    assert lines[:3] == [
        {"estimator": "mle", "neighbours": 20, "manifold": "sphere", "true_dimension": 2, "rows": 5, "bias": 0.5},
        {"estimator": "mle", "neighbours": 20, "manifold": "torus", "true_dimension": 4, "rows": 4, "bias": -1.0},
        {"estimator": "mle", "neighbours": 20, "manifold": "union", "rows": 9, "spearman": pytest.approx(1)},
    ]  # fmt: skip
    assert lines[5]["spearman"] == pytest.approx(-1)
    assert control({}, []) == []


def test_agreement_is_the_rank_correlation_of_each_pair() -> None:
    a, b, c = RNG.normal(size=(3, 50))
    b[4] = np.nan
    lines = agreement({"mle-20": a, "mle-50": b, "twonn-20": c})
    assert len(lines) == 3
    pair = lines[0]
    assert (pair["neighbours"], pair["other_neighbours"], pair["rows"]) == (20, 50, 49)
    known = np.isfinite(b)
    assert pair["spearman"] == pytest.approx(spearmanr(a[known], b[known]).statistic)


class Store:
    """Rows of a plane of three dimensions."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def read(self, start: int, stop: int) -> torch.Tensor:
        plane = np.random.default_rng(1).normal(size=(self.rows, 3))
        return torch.from_numpy(np.pad(plane, ((0, 0), (0, 7)))[start:stop])


def test_a_store_gets_estimates_and_what_they_are_worth(tmp_path: Path) -> None:
    place = {"source": "toy", "hook_point": "features"}
    write_dimensions(Store(100), place, {"rows": 100, "neighbours": [10, 40]}, tmp_path)
    tables = {}
    for name in ("dimension_agreement", "dimension_control"):
        with (tmp_path / f"{name}.csv").open() as file:
            tables[name] = list(csv.DictReader(file))
        assert {line["source"] for line in tables[name]} == {"toy"}
    assert len(tables["dimension_agreement"]) == 6
    # a part of the union has 33 rows, too few for 40 neighbours
    assert {line["neighbours"] for line in tables["dimension_control"]} == {"10"}


def test_too_large_a_neighbourhood_is_refused(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="expected less than half of the 80 sampled rows, found 40"):
        write_dimensions(Store(100), {}, {"rows": 80, "neighbours": [10, 40]}, tmp_path)
