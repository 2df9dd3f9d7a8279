"""The form of numbers: exact in files, rounded in print by one rule; and the order of names that hold numbers."""

import math
import re

_MOST_DECIMALS = 4


def number(value: float | int | str | None) -> str:
    """Return a value as CSV files hold it: integers whole, other numbers with 12 significant digits.

    Raises:
        ValueError: it is NaN or infinite.
    """
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number for a table, got {value}")
    return f"{value + 0.0:.12g}"  # + 0.0: no negative zero


def significant(value: float, digits: int = 3) -> str:
    """Return a number as Markdown, LaTeX and HTML print it.

    It has `digits` significant digits but at most four decimals, its integer part whole, thousands separated.
    """
    return fixed(value, decimals(value, digits))


def decimals(value: float, digits: int = 3) -> int:
    """Return the decimals with which a number has so many significant digits, at most four."""
    exponent = math.floor(math.log10(abs(value))) if value else 0
    if value and float(f"{abs(value):.{digits - 1}e}") >= 10 ** (exponent + 1):  # 9.996 is 10.0
        exponent += 1
    return min(max(digits - 1 - exponent, 0), _MOST_DECIMALS)


def fixed(value: float, places: int) -> str:
    """Return a number with so many decimals, thousands separated, without a sign where all digits are 0."""
    text = f"{value:,.{places}f}"
    return text.lstrip("-") if not text.strip("-0.,") else text


def natural(text: str) -> list[tuple[int, float, str]]:
    """Return a sort key that puts k8 before k32."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(0, float(part), "") if i % 2 else (1, 0.0, part) for i, part in enumerate(parts)]
