"""The tables of one job's results: what was measured of one or several runs, as CSV files in the job's folder."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saeflow.tables.files import Row, write_csv
from saeflow.tables.metrics import BETWEEN_SEEDS, check
from saeflow.tables.numbers import number
from saeflow.tables.runs import identify, setting_of, with_target
from saeflow.tables.schema import IDS, columns_of, tables_of


@dataclass(frozen=True)
class Evaluation:
    """The measurements of one run on one source.

    Attributes:
        evaluated_on: the source.
        metrics: by name, entries of METRICS.
        histograms: by name, (left, right, count) of each bin.
        tables: by name, rows of further tables of the job `evaluate`, without id columns.
        sums: by name, (units,) what each document, image or sample adds to the sums that metrics are ratios of; no table.
    """

    evaluated_on: str
    metrics: Mapping[str, float]
    histograms: Mapping[str, Any]
    tables: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    sums: Mapping[str, Any] = field(default_factory=dict)


def write_evaluation(folder: Path, results: Iterable[tuple[Mapping[str, Any], Evaluation]]) -> None:
    """Write the tables of the job `evaluate` for one or several runs.

    Args:
        folder: written.
        results: id columns and measurements; a run comes once for each source it is measured on.

    Raises:
        ValueError: a metric has no entry in METRICS, or a value that it cannot have.
    """
    rows: dict[str, list[Row]] = {name: [] for name in tables_of("evaluate")}
    for ids, found in results:
        check(found.metrics)
        measured: dict[str, Iterable[Mapping[str, Any]]] = {
            "metrics": (
                {"metric": name, "value": float(value)} for name, value in found.metrics.items()
            ),
            "histograms": (
                {"histogram": name, "left": left, "right": right, "count": count}
                for name, bins in found.histograms.items()
                for left, right, count in bins
            ),
            **found.tables,
        }
        known = {name: ids[name] for name in IDS} | {"evaluated_on": found.evaluated_on}
        for name, lines in measured.items():
            rows[name] += _written(known, lines)
    for name, lines in rows.items():
        _write(folder, name, lines)


def write_of_run(
    folder: Path, table: str, config: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]
) -> None:
    """Write one table of the job `interpret` for one run.

    Args:
        folder: written: TABLE.csv.
        table: its name.
        config: the run's config.json.
        lines: rows without id columns.
    """
    _write(folder, table, _written(with_target(identify(config)), lines))


def write_of_seeds(
    folder: Path, config: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]
) -> None:
    """Write stability.csv of one setting.

    Args:
        folder: written.
        config: config.json of one of its runs.
        lines: seed_a, seed_b, metric (of BETWEEN_SEEDS) and value.

    Raises:
        ValueError: a metric has no entry in BETWEEN_SEEDS, or a value that it cannot have.
    """
    lines = list(lines)
    for line in lines:
        check({line["metric"]: line["value"]}, BETWEEN_SEEDS)
    ids = identify(config) | {"setting": setting_of(config["name"])}
    known = {name: ids[name] for name in columns_of("stability") if name in ids}
    _write(folder, "stability", _written(known, lines))


def write_lines(folder: Path, table: str, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write TABLE.csv from lines that have all of the table's columns."""
    _write(folder, table, _written({}, lines))


def _written(known: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> list[Row]:
    return [{name: number(value) for name, value in {**known, **line}.items()} for line in lines]


def _write(folder: Path, table: str, rows: Iterable[Row]) -> None:
    write_csv(folder / f"{table}.csv", columns_of(table), rows)
