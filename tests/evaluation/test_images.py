"""Per-image measures, against other libraries and planted data."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

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
