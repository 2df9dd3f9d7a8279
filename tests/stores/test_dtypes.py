"""Stored dtypes against numpy and torch."""

import struct
from fractions import Fraction

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
    divisor = 1.01 if name == "int8" else 1  # 127 scales may round to above the largest float32
    assert DTYPES[name].is_finite(
        DTYPES[name].encode(torch.tensor([[limits.max, limits.min, limits.tiny, -0.0]]) / divisor)
    )


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_values_come_back_as_torch_rounds_them(name: str) -> None:
    x = torch.randn(1000, 3) * 10.0 ** torch.randint(-4, 4, (1000, 3))
    back = DTYPES[name].decode(DTYPES[name].encode(x))
    assert back.dtype == DTYPES[name].torch
    assert torch.equal(back, x.to(back.dtype))


def test_int8_rows_are_whole_numbers_of_a_127th_of_their_largest() -> None:
    """Value by value, against Python's own arithmetic: exact fractions of the float32 scale, ties to even."""
    x = torch.randn(40, 5) * 10.0 ** torch.randint(-6, 6, (40, 1))
    x[3], x[4, 2:] = 0, 0
    x[5] = torch.tensor([127.0, 0.5, 1.5, -2.5, 2.5])  # scale 1: ties
    stored = DTYPES["int8"].encode(x)
    assert (stored.dtype, stored.shape) == (np.uint8, (40, 9))
    back = DTYPES["int8"].decode(stored)
    assert (back.dtype, back.shape) == (torch.float32, (40, 5))
    for row, given, found in zip(x.tolist(), stored, back.tolist(), strict=True):
        (scale,) = struct.unpack("<f", given[5:].tobytes())
        largest = max(map(abs, row))
        assert scale == struct.unpack("<f", struct.pack("<f", largest / 127))[0]
        for value, step, decoded in zip(row, given[:5].view(np.int8).tolist(), found, strict=True):
            exact = Fraction(value) / Fraction(scale) if scale else Fraction(0)
            assert abs(step) <= 127
            assert abs(exact - step) <= Fraction(1, 2) + Fraction(1, 10**5)
            assert decoded == struct.unpack("<f", struct.pack("<f", step * scale))[0]
    assert stored[5, :5].view(np.int8).tolist() == [127, 0, 2, -2, 2]
    assert not back[3].any()


def test_no_rows_are_finite() -> None:
    assert DTYPES["float32"].is_finite(np.empty((0, 4), np.float32))
