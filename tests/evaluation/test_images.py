"""Per-image measures, correlations and local dimension, against other libraries and planted data."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LinearRegression

from saeflow.errors import UserError
from saeflow.evaluation.by_dimension import PerRow
from saeflow.evaluation.correlation import correlation, partial_correlation
from saeflow.evaluation.dimension import local_dimensions, write_dimensions
from saeflow.evaluation.images import PerGroup, PerImage
from saeflow.evaluation.measure import Seen
from saeflow.evaluation.reconstruction import Reconstruction
from saeflow.evaluation.rows import RowStatistics

RNG = np.random.default_rng(0)
IMAGES, TOKENS, WIDTH = 30, 5, 6


def seen_in_parts(
    columns: dict[str, np.ndarray], latents: torch.Tensor, x: torch.Tensor
) -> list[Seen]:
    """Shuffled rows in three parts."""
    order = RNG.permutation(len(x))
    found = []
    for part in np.array_split(order, 3):
        z = latents[part]
        found.append(
            Seen(
                part, x[part], x[part] * 0.9, z, (z != 0).sum(1), z.sum(1), {},
                lambda name, part=part: columns[name][part],
            )
        )  # fmt: skip
    return found


@pytest.fixture
def rows() -> tuple[pd.DataFrame, torch.Tensor, torch.Tensor]:
    frame = pd.DataFrame(
        {
            "context": np.repeat(np.arange(IMAGES), TOKENS),
            "position": np.tile(np.arange(TOKENS), IMAGES),
            "label": np.repeat(RNG.integers(0, 4, IMAGES), TOKENS),
            "objects": np.repeat(RNG.integers(0, 6, IMAGES), TOKENS),
        }
    )
    latents = torch.from_numpy(RNG.random((len(frame), 8)) * (RNG.random((len(frame), 8)) < 0.4))
    return frame, latents, torch.from_numpy(RNG.normal(size=(len(frame), WIDTH)))


def test_an_images_l0_is_the_mean_over_its_tokens(rows: Any) -> None:
    frame, latents, x = rows
    columns = {name: frame[name].to_numpy() for name in frame}
    per_image = PerImage(IMAGES, columns, among=10)
    for seen in seen_in_parts(columns, latents, x):
        per_image.update(seen)
    frame["l0"], frame["k"] = (latents != 0).sum(1).numpy(), latents.sum(1).numpy()
    expected = frame.groupby("context")[["l0", "k", "objects", "label"]].mean()
    lines = pd.DataFrame(per_image.lines(12))
    assert len(lines) == 12
    assert lines["l0"].tolist() == pytest.approx(expected["l0"][:12].tolist())
    assert lines["k_hat"].tolist() == pytest.approx(expected["k"][:12].tolist())
    metrics = per_image.metrics()
    for name, column in (("l0", "l0"), ("k_hat", "k")):
        value = expected[column].corr(expected["objects"], method="spearman")
        assert metrics[f"spearman_{name}_objects"] == pytest.approx(value)
    fires = (latents != 0).numpy()[: 10 * TOKENS].reshape(10, TOKENS, 8).sum(1)
    assert np.array_equal(per_image.fires_on, fires)
    assert per_image.energy == pytest.approx(latents.square().sum(0).numpy())


def test_each_kind_of_token_has_its_own_mean(rows: Any) -> None:
    frame, latents, x = rows
    columns = {name: frame[name].to_numpy() for name in frame}
    first = frame["position"].to_numpy() == 0
    means = {"cls": x[first].mean(0), "patches": x[~first].mean(0)}
    statistics = {kind: RowStatistics(0, 0, mean) for kind, mean in means.items()}
    per_group = PerGroup({"cls": "first", "patches": "rest"}, statistics)
    for seen in seen_in_parts(columns, latents, x):
        per_group.update(seen)
    got = per_group.result().metrics
    for kind, mask in (("cls", first), ("patches", ~first)):
        whole = Reconstruction(means[kind])
        whole.add(x[mask], x[mask] * 0.9)
        for name in ("fvu", "nmse", "cosine"):
            assert got[f"{name}_{kind}"] == pytest.approx(whole.metrics()[name])
        assert got[f"l0_{kind}"] == pytest.approx(
            (latents[mask] != 0).sum(1).double().mean().item()
        )


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


def test_rows_follow_their_dimension() -> None:
    dimension = RNG.integers(2, 9, 50).astype(np.float32)
    dimension[3] = np.nan
    norm = RNG.random(50).astype(np.float32)
    per_row = PerRow({"mle-20": dimension, "norm": norm})
    latents = torch.zeros(60, 10)
    for i, count in enumerate(np.nan_to_num(dimension).astype(int)):
        latents[i, :count] = 1
    columns: dict[str, np.ndarray] = {}
    for seen in seen_in_parts(columns, latents, torch.zeros(60, 2)):
        per_row.update(seen)
    (line,) = per_row.lines()
    assert (line["estimator"], line["neighbours"], line["rows"]) == ("mle", 20, 49)
    assert line["spearman_l0"] == pytest.approx(1)
    assert line["spearman_k_hat"] == pytest.approx(1)
    assert line["partial_l0"] == pytest.approx(1)
    bins = pd.DataFrame(per_row.bins())
    assert bins["rows"].tolist() == [5] * 9 + [4]
    known = np.sort(dimension[np.isfinite(dimension)])
    assert bins["dimension"].tolist() == pytest.approx(
        [part.mean() for part in np.array_split(known, 10)]
    )
    assert bins["l0"].tolist() == pytest.approx(bins["dimension"].tolist())


@pytest.mark.parametrize("true", [2, 5])
def test_the_dimension_of_a_plane_is_found(true: int) -> None:
    x = RNG.random((800, true)) @ RNG.normal(size=(true, 20))
    x[5] = x[6]  # equal rows have no distance
    for name, values in local_dimensions(x, 60).items():
        assert values.shape == (800,)
        assert np.nanmean(values) == pytest.approx(true, rel=0.25), name


def test_too_large_a_neighbourhood_is_refused(tmp_path: Any) -> None:
    class Store:
        rows = 100

    with pytest.raises(UserError, match="expected less than half of the 80 sampled rows, found 40"):
        write_dimensions(Store(), {"rows": 80, "neighbours": [10, 40]}, tmp_path)
