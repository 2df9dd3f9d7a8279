"""The decoder projection against a sort of all projections."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saeflow.evaluation import decoder_projection
from saeflow.evaluation.decoder_projection import DecoderProjection


def measured(directions: Tensor, b_dec: Tensor | None, x: Tensor, batch: int = 7) -> dict[str, Any]:
    sae = SimpleNamespace(directions=lambda: directions, b_dec=b_dec)
    observer = DecoderProjection(sae, len(x))
    for part in x.split(batch):
        observer.update(SimpleNamespace(x=part))  # type: ignore[arg-type]
    return observer.result().metrics


def by_sorting(directions: Tensor, b_dec: Tensor, x: Tensor) -> float:
    """Definition of the released code (chanind/sparse-but-wrong-paper), written with numpy."""
    rows, W = x.double().numpy(), directions.double().numpy()
    W = W / np.linalg.norm(W, axis=1, keepdims=True)
    ordered = np.sort(((rows - b_dec.double().numpy()) @ W.T).ravel())[::-1]
    spread = np.sqrt((np.linalg.norm(rows - rows.mean(0), axis=1) ** 2).mean())
    return float(ordered[len(W) // 4 * len(rows)] / spread)


def test_it_is_the_quantile_of_all_projections() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(100, 6, generator=generator) + 1
    W, b = torch.randn(20, 6, generator=generator), torch.randn(6, generator=generator)
    expected = by_sorting(W, b, x)
    assert measured(W, b, x)["decoder_projection"] == pytest.approx(expected, rel=1e-5)
    assert measured(W, b, 10 * x) != measured(W, b, x)
    assert measured(W, 10 * b, 10 * x)["decoder_projection"] == pytest.approx(expected, rel=1e-5)


def test_rows_are_evenly_spaced_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_projection, "MOST_ROWS", 30)
    generator = torch.Generator().manual_seed(1)
    x, W = torch.randn(100, 6, generator=generator), torch.randn(20, 6, generator=generator)
    expected = by_sorting(W, torch.zeros(6), x[::4])
    assert measured(W, None, x)["decoder_projection"] == pytest.approx(expected, rel=1e-5)


def test_without_enough_positive_projections_it_is_absent() -> None:
    x = torch.rand(10, 6) + 0.1
    assert measured(-torch.rand(20, 6), None, x) == {}


def test_a_decoder_that_mixes_features_projects_more() -> None:
    """Features that are each on in a tenth of the rows; each row of the mixed decoder has a part of a frequent one."""
    generator = torch.Generator().manual_seed(2)
    features = torch.linalg.qr(torch.randn(40, 40, generator=generator)).Q
    on = torch.rand(2000, 40, generator=generator) < 0.1
    on[:, 0] = torch.rand(2000, generator=generator) < 0.5
    x = (on * (1 + 0.2 * torch.randn(2000, 40, generator=generator))) @ features
    right, mixed = features, features + 0.3 * features[0]
    found = [measured(W, None, x)["decoder_projection"] for W in (right, mixed)]
    assert found[1] > 2 * found[0]
