"""Stored dtypes against numpy and torch."""

import numpy as np
import pytest
import torch

from saeflow.stores.dtypes import DTYPES


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_every_16_bit_pattern_is_finite_or_not_as_torch_says(name: str) -> None:
    dtype = DTYPES[name]
    patterns = np.arange(1 << 16, dtype=np.uint16).view(dtype.storage)
    expected = torch.isfinite(dtype.decode(patterns)).numpy()
    found = [dtype.is_finite(patterns[i : i + 1]) for i in range(1 << 16)]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
@pytest.mark.parametrize("name", sorted(DTYPES))
def test_one_bad_value_among_many_is_seen(name: str, value: float) -> None:
    x = torch.randn(50, 7)
    stored = DTYPES[name].encode(x)
    assert DTYPES[name].is_finite(stored)
    x[31, 4] = value
    assert not DTYPES[name].is_finite(DTYPES[name].encode(x))


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_the_largest_values_are_finite(name: str) -> None:
    limits = torch.finfo(DTYPES[name].torch)
    assert DTYPES[name].is_finite(
        DTYPES[name].encode(torch.tensor([limits.max, limits.min, limits.tiny, -0.0]))
    )


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_values_come_back_as_torch_rounds_them(name: str) -> None:
    x = torch.randn(1000, 3) * 10.0 ** torch.randint(-4, 4, (1000, 3))
    back = DTYPES[name].decode(DTYPES[name].encode(x))
    assert back.dtype == DTYPES[name].torch
    assert torch.equal(back, x.to(back.dtype))


def test_no_rows_are_finite() -> None:
    assert DTYPES["float32"].is_finite(np.empty((0, 4), np.float32))
