"""Gather the tables of all runs. Bytes depend on the numbers only: runs are in natural order (k8 before k32)."""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from saeflow.errors import UserError
from saeflow.files import read_json, write_json
from saeflow.tables.files import Row, read_csv, write_csv, write_text
from saeflow.tables.numbers import natural, number
from saeflow.tables.render import (
    classification_latex,
    classification_markdown,
    summary_latex,
    summary_markdown,
)
from saeflow.tables.runs import identify, measurement, with_target
from saeflow.tables.schema import TABLES, columns_of, tables_of
from saeflow.tables.summary import summarise
from saeflow.tables.sweeps import of_chosen, sentence

CARDS = "cards"
_PLACE = ("source", "hook_point")


def collect(
    evaluations: Iterable[Path],
    saes: Iterable[Path],
    probes: Iterable[Path],
    folder: Path,
    stabilities: Iterable[Path] = (),
    interpreted: Iterable[Path] = (),
    rivals: Iterable[Path] = (),
    sweeps: Iterable[Path] = (),
    dimensions: Iterable[Path] = (),
) -> None:
    """Gather the tables of all runs.

    Args:
        evaluations: folders with the tables of the job `evaluate`.
        saes: folders of trained SAEs (config.json, steps.csv).
        probes: folders of complexity probes (predictions.csv, quality.json).
        folder: written: every table of TABLES; metrics.json (measurement -> metric -> value); summary and classification
            as .md and .tex too; cards, pictures of concepts.
        stabilities: folders with the stability.csv of a setting.
        interpreted: folders with the tables of the job `interpret`.
        rivals: folders with a rivals.csv.
        sweeps: folders with a sweeps.csv; of the trials there, summaries have those that were chosen.
        dimensions: folders with the tables of the job `dimension`.

    Raises:
        UserError: a file is missing, or two folders hold one run.
    """
    folders, of_latents, of_sources = list(evaluations), list(interpreted), list(dimensions)
    rows: dict[str, list[Row]] = {
        **{name: _of_runs(folders, name) for name in tables_of("evaluate")},
        **{name: _of_runs(of_latents, name) for name in tables_of("interpret")},
        **{name: _in_order(of_sources, name, _PLACE) for name in tables_of("dimension")},
        "stability": _in_order(stabilities, "stability", (*_PLACE, "entry", "setting")),
        "rivals": [row for folder in rivals for row in read_csv(folder / "rivals.csv")],
        "sweeps": [row for folder in sweeps for row in read_csv(folder / "sweeps.csv")],
    }
    tried = rows["sweeps"]
    rows["summary"] = summarise(of_chosen(rows["metrics"], tried))
    rows["training"], rows["options"] = _of_training(list(saes))
    rows["complexity"], rows["probes"] = _of_probes(list(probes))
    for name, lines in rows.items():
        write_csv(folder / f"{name}.csv", _columns(name, lines), lines)
    by_measurement: dict[str, dict[str, float]] = {}
    for row in rows["metrics"]:
        by_measurement.setdefault(measurement(row), {})[row["metric"]] = float(row["value"])
    write_json(folder / "metrics.json", by_measurement)
    classified = of_chosen(rows["classification"], tried)
    tuning = sentence(tried, {row["entry"] for row in rows["options"]})
    for name, text in {
        "classification.md": classification_markdown(classified),
        "classification.tex": classification_latex(classified),
        "summary.md": summary_markdown(rows["summary"], rows["unmeasured"], tuning),
        "summary.tex": summary_latex(rows["summary"], rows["unmeasured"], tuning),
    }.items():
        write_text(folder / name, text)
    _copy_cards(folders, folder / CARDS)


def _columns(table: str, rows: Sequence[Row]) -> list[str]:
    """Return the schema's columns; of an open table those that it needs, and what some row has, as it comes."""
    schema = TABLES[table]
    if not schema.is_open:
        return columns_of(table)
    columns = dict.fromkeys(schema.needed)
    for row in rows:
        columns.update(dict.fromkeys(row))
    return list(columns)


def _of_runs(folders: Iterable[Path], table: str) -> list[Row]:
    """Return the rows of all folders, runs in natural order, rows of a run as they were."""
    by_run: dict[str, list[Row]] = {}
    for folder in folders:
        path = folder / f"{table}.csv"
        rows = read_csv(path)
        found = {row["run"] for row in rows}
        if twice := sorted(found & set(by_run)):
            raise UserError(f"{path}: run {twice[0]} is in another evaluation too. Delete one.")
        for row in rows:
            by_run.setdefault(row["run"], []).append(row)
    return [row for run in sorted(by_run, key=natural) for row in by_run[run]]


def _in_order(folders: Iterable[Path], table: str, columns: Sequence[str]) -> list[Row]:
    """Return the rows of all folders in natural order of some columns, rows that are equal there as they were."""
    rows = [row for folder in folders for row in read_csv(folder / f"{table}.csv")]
    return sorted(rows, key=lambda row: [natural(row[name]) for name in columns])


def _of_training(saes: Iterable[Path]) -> tuple[list[Row], list[Row]]:
    """Return the logged steps and the options of all runs."""
    steps: dict[str, list[Row]] = {}
    options: dict[str, list[Row]] = {}
    for sae in saes:
        config = read_json(sae / "config.json")
        ids = {name: number(value) for name, value in identify(config).items()}
        chosen = {**config["options"], "guide": config.get("guide")}
        chosen |= {f"training.{name}": value for name, value in config["training"].items()}
        options[ids["run"]] = [
            {**ids, "option": name, "chosen": value if isinstance(value, str) else json.dumps(value)}
            for name, value in sorted(chosen.items())
        ]  # fmt: skip
        known = with_target(ids)
        steps[ids["run"]] = [{**known, **row} for row in read_csv(sae / "steps.csv")]
    runs = sorted(steps, key=natural)
    return [row for run in runs for row in steps[run]], [
        row for run in runs for row in options[run]
    ]


def _of_probes(probes: Iterable[Path]) -> tuple[list[Row], list[Row]]:
    """Return scores with predictions, and the quality of each probe on both splits."""
    predictions: list[Row] = []
    qualities: list[Row] = []
    for probe in probes:
        rows = read_csv(probe / "predictions.csv")
        predictions += rows
        quality = read_json(probe / "quality.json")
        known = {name: rows[0][name] for name in ("source", "hook_point", "complexity")}
        for split in ("train", "evaluation"):
            values = {
                **quality[split],
                "ridge": quality["ridge"],
                "at_edge": int(quality["at_edge"]),
            }
            numbers = {name: number(value) for name, value in values.items()}
            qualities.append({**known, "split": split, **numbers})
    return predictions, qualities


def _copy_cards(evaluations: Iterable[Path], folder: Path) -> None:
    """Copy the concept cards of the runs that have them into folders named after the measurements."""
    folder.mkdir()
    for evaluation in evaluations:
        for cards in sorted(evaluation.rglob("cards.json")):
            name = read_csv(evaluation / "metrics.csv")[0]["run"]
            if cards.parent != evaluation:  # of a source of evaluation.also_on
                name += f" on {cards.parent.name}"
            (folder / name).mkdir(parents=True)
            for path in cards.parent.glob("cards.*"):
                shutil.copyfile(path, folder / name / path.name)
