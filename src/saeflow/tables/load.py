"""The tables as figures read them: typed, checked, with the setting and series of every run."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from saeflow.config import trial_of, without_trial
from saeflow.errors import UserError
from saeflow.files import missing_file
from saeflow.tables.collect import CARDS
from saeflow.tables.runs import measurement, setting_of, variant_label
from saeflow.tables.schema import MEASURED_IDS, TABLES, Table
from saeflow.tables.sweeps import Place, left_out, sentence


@dataclass(frozen=True)
class Tables:
    """The tables of one folder, by the names of TABLES.

    To the id columns of runs are added `setting` (the run's name without its seed) and `series` (the setting
    without its k: what one line of a front goes through). Where a run was measured on another source than its own,
    `run` says so too (`measurement`), so that it names one line of a table of measurements; `trained` is its name
    without that. Trials that were not chosen are in `sweeps` alone.
    """

    metrics: pd.DataFrame
    histograms: pd.DataFrame
    training: pd.DataFrame
    complexity: pd.DataFrame
    probes: pd.DataFrame
    classification: pd.DataFrame
    contexts: pd.DataFrame
    dimension: pd.DataFrame
    dimension_bins: pd.DataFrame
    dimension_agreement: pd.DataFrame
    dimension_control: pd.DataFrame
    intervals: pd.DataFrame
    controls: pd.DataFrame
    stability: pd.DataFrame
    rivals: pd.DataFrame
    sweeps: pd.DataFrame
    options: pd.DataFrame
    probing: pd.DataFrame
    detection: pd.DataFrame
    absorption: pd.DataFrame
    cards: Path
    """Folder with pictures of concepts, by run."""

    @cached_property
    def wide(self) -> pd.DataFrame:
        """One line per run: id columns and a column per metric."""
        ids = [*MEASURED_IDS, "trained", "setting", "series"]
        values = self.metrics.pivot(index="run", columns="metric", values="value").reset_index()
        known = self.metrics[ids].drop_duplicates("run")
        return known.merge(values, on="run", how="left", validate="1:1")

    @cached_property
    def tuning(self) -> str:
        """The sentence of captions on tuning."""
        return sentence(self.sweeps.to_dict("records"), self.options["entry"])


def load_tables(folder: Path) -> Tables:
    """Read the tables that figures are drawn from.

    Raises:
        UserError: a file is missing, lacks a column, or holds what it should not.
    """
    options = _of_runs(folder / "options.csv", TABLES["options"], {})
    kinds = _kinds(options)
    read: dict[str, pd.DataFrame] = {"options": options}
    for name, table in TABLES.items():
        if name in ("options", "summary", "unmeasured"):
            continue
        path = folder / f"{name}.csv"
        read[name] = _of_runs(path, table, kinds) if "run" in table.columns else _read(path, table)
    out = left_out(read["sweeps"].to_dict("records"))
    for name in read if out else ():
        if name != "sweeps":
            read[name] = _without(read[name], out)
    return Tables(cards=folder / CARDS, **read)


def _without(table: pd.DataFrame, out: set[Place]) -> pd.DataFrame:
    """Return the rows of a table that neither are nor compare one of some settings."""
    held = pd.Series(True, index=table.index)
    for side in ("", "rival_"):
        columns = ["source", "hook_point", f"{side}entry", f"{side}setting"]
        if set(columns) <= set(table.columns):
            places = zip(*(table[column] for column in columns), strict=True)
            held &= np.array([place not in out for place in places], bool)
    return table[held]


def _kinds(options: pd.DataFrame) -> dict[str, str]:
    """Return what each run was asked for besides k: runs of one kind differ in k, size and seed only."""
    rest = options[~options["option"].isin(("guide", "k"))]
    return {
        str(run): ", ".join(f"{name} {value}" for name, value in zip(held["option"], held["chosen"], strict=True))
        for run, held in rest.groupby("run")
    }  # fmt: skip


def _of_runs(path: Path, schema: Table, kinds: Mapping[str, str]) -> pd.DataFrame:
    """Read a table of runs, each row once, and add their setting and series."""
    table = _read(path, schema)
    keys = [name for name in schema.needed if name not in ("value", "count")]
    if table.duplicated(keys).any():
        raise UserError(f"{path}: has rows twice. Delete the file and rerun its step.")
    k = "k_target" if "k_target" in table.columns else "k"
    runs = table.drop_duplicates("run")[["run", "entry", "variant", "d_sae", "schedule", k]]
    settings, series = {}, {}
    for row in runs.to_dict("records"):
        run = str(row["run"])
        settings[run] = setting_of(run)
        series[run] = _series(settings[run], row, k, kinds.get(run))
    table["setting"] = table["run"].map(settings).astype(str)
    table["series"] = table["run"].map(series).astype(str)
    if "evaluated_on" in table:
        table["trained"] = table["run"]
        table["run"] = [measurement(row) for row in table[[*MEASURED_IDS]].to_dict("records")]
    return table


def _series(setting: str, row: Mapping[Any, Any], k: str, kind: str | None) -> str:
    """Name a run's series: runs that differ in k (or, where no k is set, in their penalty) and seed only are one."""
    if pd.isna(row[k]):
        return f"{row['entry']}/d{row['d_sae']:g}/{row['schedule']}"
    is_tuned = trial_of(setting) is not None  # the values that are chosen may differ from k to k
    if kind is not None and not is_tuned:  # whichever entry asked for them
        return f"{variant_label(row['variant'], row['entry'])}/d{row['d_sae']:g}/{kind}"
    return f"{row['entry']}/" + re.sub(rf"(^|-)k{row[k]:g}(?=-|$)", "", without_trial(setting))


def _read(path: Path, schema: Table) -> pd.DataFrame:
    words = {name for name, column in schema.columns.items() if column.kind == "word"}
    try:
        header = pd.read_csv(path, nrows=0, dtype=str).columns
        numbers = [column for column in header if column not in words]
        types: dict[str, type] = {column: float if column in numbers else str for column in header}
        table = pd.read_csv(
            path, dtype=types, keep_default_na=False, na_values={column: [""] for column in numbers}
        )
    except FileNotFoundError:
        raise missing_file(path) from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, ValueError) as error:
        raise UserError(
            f"{path}: expected a table of numbers, found {error}. Delete it and rerun its step."
        ) from None
    if missing := [column for column in schema.needed if column not in table.columns]:
        raise UserError(
            f"{path}: expected the column {missing[0]}, found {', '.join(table.columns)}. "
            "Delete the file and rerun its step."
        )
    for name in schema.needed:
        if schema.columns[name].is_required and not np.isfinite(table[name]).all():
            raise UserError(
                f"{path}: expected finite numbers under {name}, found another or none. Delete the file "
                "and rerun its step."
            )
    return table
