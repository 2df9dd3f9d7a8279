"""CSV and text files of tables: written whole or not at all, read as text."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from saeflow.files import atomic_file, missing_file

Row = dict[str, str]


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    """Write a CSV file (RFC 4180 but for line ends, which are newlines), atomically."""
    with atomic_file(path) as staged, staged.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[Row]:
    """Read a CSV file as text.

    Raises:
        UserError: it is missing.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        raise missing_file(path) from None


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically."""
    with atomic_file(path) as staged:
        staged.write_text(text, encoding="utf-8")
