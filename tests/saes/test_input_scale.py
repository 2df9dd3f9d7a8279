"""The input scale: what training sees of raw activations."""

from dataclasses import dataclass
from math import sqrt

import numpy as np
import pytest
import torch
from torch import Tensor

from saeflow.config.schema import params_schema
from saeflow.errors import UserError
from saeflow.saes import InputScale
from saeflow.saes.input_scale import KINDS

D_IN = 6


@dataclass
class Moments:
    """Moments of a store's rows."""

    d_in: int
    scale: float
    mean: Tensor


@pytest.fixture
def rows() -> np.ndarray:
    random = np.random.default_rng(3)
    return 5 * random.standard_normal((500, D_IN)) + 4 * random.standard_normal(D_IN)


@pytest.fixture
def store(rows: np.ndarray) -> Moments:
    scale = sqrt((rows**2).sum(1).mean() / D_IN)
    return Moments(D_IN, scale, torch.from_numpy(rows.mean(0)))


def seen(kind: str, rows: np.ndarray, store: Moments) -> np.ndarray:
    return InputScale.of(kind, store)(torch.from_numpy(rows)).double().numpy()


@pytest.mark.parametrize(("kind", "mean_square"), [("unit", 1), ("dimension", D_IN)])
def test_unit_and_dimension_say_the_mean_squared_norm(
    kind: str, mean_square: float, rows: np.ndarray, store: Moments
) -> None:
    x = seen(kind, rows, store)
    assert (x**2).sum(1).mean() == pytest.approx(mean_square, rel=1e-6)
    ratio = rows / x
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)  # divided by one number, not shifted


def test_raw_is_what_the_store_holds(rows: np.ndarray, store: Moments) -> None:
    np.testing.assert_array_equal(seen("raw", rows, store), rows.astype(np.float32))


def test_centred_takes_the_mean_away_and_keeps_the_scale_of_the_whole(
    rows: np.ndarray, store: Moments
) -> None:
    """(row - mean) / sqrt(mean ||row||^2): the share of the mean is missing from the squared norm."""
    x = seen("centred", rows, store)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-6)
    share = (rows.mean(0) ** 2).sum() / (rows**2).sum(1).mean()
    assert 0.2 < share < 0.9
    assert (x**2).sum(1).mean() == pytest.approx(1 - share, rel=1e-5)


def test_half_precision_is_widened_before_it_is_divided(rows: np.ndarray, store: Moments) -> None:
    x = torch.from_numpy(rows).to(torch.bfloat16)
    inputs = InputScale.of("unit", store)
    assert torch.equal(inputs(x), inputs(x.float()))
    assert inputs(x).dtype == torch.float32


def test_the_schema_knows_the_same_scales() -> None:
    schema = params_schema()
    assert schema["properties"]["training"]["properties"]["input_scale"]["enum"] == list(KINDS)


def test_an_unknown_scale_is_named(store: Moments) -> None:
    with pytest.raises(UserError, match=r"input_scale: expected one of unit, .*found 'sqrt'"):
        InputScale.of("sqrt", store)
