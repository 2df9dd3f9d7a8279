"""One rule for numbers in print: significant digits, few decimals, no negative zero."""

import math

import numpy as np
import pytest

from saeflow.tables.numbers import decimals, fixed, significant


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (31.96, "32.0"), (12345.6, "12,346"), (0.12345, "0.123"), (7.25, "7.25"), (-0.0021, "-0.0021"),
        (-1e-9, "0.0000"), (0.0, "0.00"), (9.996, "10.0"), (0.09996, "0.100"), (999.6, "1,000"), (1.0, "1.00"),
    ],
)  # fmt: skip
def test_numbers_have_three_significant_digits_and_at_most_four_decimals(
    value: float, text: str
) -> None:
    assert significant(value) == text


def test_no_rounding_is_off_by_more_than_half_of_the_last_digit() -> None:
    """Against the value itself: the printed number is within half a unit of its third digit, or of 1e-4."""
    rng = np.random.default_rng(0)
    for value in (10 ** rng.uniform(-6, 7, 2000) * rng.choice([-1, 1], 2000)).tolist():
        printed = float(significant(value).replace(",", ""))
        exponent = math.floor(math.log10(abs(value)))
        unit = min(max(10.0 ** (exponent - 2), 1e-4), 1.0)
        assert abs(printed - value) <= 0.5001 * unit * (
            10 if abs(printed) >= 10 ** (exponent + 1) else 1
        )


def test_a_deviation_has_as_many_decimals_as_its_mean() -> None:
    assert fixed(0.1527525, decimals(0.2333)) == "0.153"
    assert fixed(0.04, decimals(31.96)) == "0.0"
