"""The tables as figures read them: runs, their settings and series, and whether they may be compared."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from saeflow.errors import UserError
from saeflow.evaluation.tables import (
    CARDS,
    COMPLEXITY_COLUMNS,
    EXTRA,
    HISTOGRAM_COLUMNS,
    IDS,
    MEASURED_IDS,
    METRIC_COLUMNS,
    OF_LATENTS,
    OPTION_COLUMNS,
    OPTIONS,
    PROBE_COLUMNS,
    STABILITY,
    STABILITY_COLUMNS,
    measurement,
    natural,
    setting_of,
    with_target,
)
from saeflow.figures import style

UNTRAINED = ("identity", "mean", "pca")
TYPES: dict[str, type] = {
    **dict.fromkeys(
        (*MEASURED_IDS, "metric", "histogram", "complexity", "split", "set", "protocol"), str
    ),
    **dict.fromkeys(
        (
            "labels",
            "concepts",
            "n",
            "estimator",
            "control",
            "setting",
            "option",
            "chosen",
            "task",
            "method",
            "letter",
            "latents",
        ),
        str,
    ),
    **dict.fromkeys(("d_sae", "k", "k_target", "tokens", "seed"), float),
}

MEASURED = ("value", "left", "right", "count", "step", "tokens_seen")


class Panel(NamedTuple):
    """Runs that are compared with each other: of one store, measured on one source's rows."""

    source: str
    hook_point: str
    evaluated_on: str


@dataclass(frozen=True)
class Tables:
    """The tables of one folder, one line per run and metric (or bin, or logged step).

    To the id columns are added `setting` (the run's name without its seed) and `series` (the setting
    without its k: what one line of a front goes through). Where a run was measured on another source than its own,
    `run` says so too (`measurement`), so that it names one line of a table of measurements; `trained` is its name
    without that.
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
    intervals: pd.DataFrame
    controls: pd.DataFrame
    stability: pd.DataFrame
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

    def panels(self, metric: str) -> list[Panel]:
        """The panels of the SAEs that have a metric, in order of name."""
        rows = self.metrics[
            (self.metrics["metric"] == metric) & ~self.metrics["variant"].isin(UNTRAINED)
        ]
        return panels_of(rows)


def load_tables(folder: Path) -> Tables:
    """Read the tables that figures are drawn from.

    Raises:
        UserError: a file is missing, or lacks a column.
    """
    options = _runs(folder / OPTIONS, OPTION_COLUMNS, {})
    kinds = _kinds(options)
    training_ids = tuple("k_target" if column == "k" else column for column in IDS)
    return Tables(
        metrics=_runs(folder / "metrics.csv", METRIC_COLUMNS, kinds),
        histograms=_runs(folder / "histograms.csv", HISTOGRAM_COLUMNS, kinds),
        training=_runs(folder / "training.csv", (*training_ids, "step", "tokens_seen"), kinds),
        complexity=_read(folder / "complexity.csv", COMPLEXITY_COLUMNS),
        probes=_read(folder / "probes.csv", PROBE_COLUMNS),
        **{
            name: _runs(folder / f"{name}.csv", (*MEASURED_IDS, *EXTRA[name]), kinds)
            for name in EXTRA
        },
        stability=_read(folder / STABILITY, STABILITY_COLUMNS),
        options=options,
        **{
            Path(name).stem: _runs(
                folder / name, (*with_target(dict.fromkeys(IDS)), *columns), kinds
            )
            for name, columns in OF_LATENTS.items()
        },
        cards=folder / CARDS,
    )


def _kinds(options: pd.DataFrame) -> dict[str, str]:
    """By run, what it was asked for beside k: runs of one kind differ in k, size and seed only."""
    rest = options[~options["option"].isin(("guide", "k"))]
    return {
        str(run): ", ".join(f"{name} {value}" for name, value in zip(held["option"], held["chosen"], strict=True))
        for run, held in rest.groupby("run")
    }  # fmt: skip


def _runs(path: Path, columns: tuple[str, ...], kinds: Mapping[str, str]) -> pd.DataFrame:
    """A table of runs, each row once, with their setting and series."""
    table = _read(path, columns)
    if table.duplicated([c for c in columns if c not in ("value", "count")]).any():
        raise UserError(f"{path}: has rows twice. Delete the file and rerun its step.")
    k = "k" if "k_target" not in table.columns else "k_target"
    runs = table.drop_duplicates("run")[["run", "entry", "variant", "d_sae", "schedule", k]]
    settings, series = {}, {}
    for row in runs.to_dict("records"):
        setting = setting_of({"run": str(row["run"])})
        settings[row["run"]] = setting
        series[row["run"]] = _series(setting, row, k, kinds.get(str(row["run"])))
    table["setting"] = table["run"].map(settings).astype(str)
    table["series"] = table["run"].map(series).astype(str)
    if "evaluated_on" in table:
        table["trained"] = table["run"]
        table["run"] = [measurement(row) for row in table[[*MEASURED_IDS]].to_dict("records")]
    return table


def _read(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    try:
        header = pd.read_csv(path, nrows=0, dtype=str).columns
        types = {column: TYPES.get(column, float) for column in header}
        numbers = [column for column in header if types[column] is float]
        table = pd.read_csv(
            path, dtype=types, keep_default_na=False, na_values={column: [""] for column in numbers}
        )
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file. Run the step that makes it (snakemake {path})."
        ) from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, ValueError) as error:
        raise UserError(
            f"{path}: expected a table of numbers, found {error}. Delete it and rerun its step."
        ) from None
    if missing := [column for column in columns if column not in table.columns]:
        raise UserError(
            f"{path}: expected the column {missing[0]}, found {', '.join(table.columns)}. "
            "Delete the file and rerun its step."
        )
    for column in columns:
        if column in MEASURED and not np.isfinite(table[column]).all():
            raise UserError(
                f"{path}: expected finite numbers under {column}, found another or none. Delete the file "
                "and rerun its step."
            )
    return table


def _series(setting: str, row: Mapping[Any, Any], k: str, kind: str | None) -> str:
    """Runs that differ in k (or, where no k is set, in their penalty) and seed only are one series."""
    if pd.isna(row[k]):
        return f"{row['entry']}/d{row['d_sae']:g}/{row['schedule']}"
    if kind is not None:  # whichever entry asked for them
        return f"{style.look(row['variant'], row['entry']).label}/d{row['d_sae']:g}/{kind}"
    return f"{row['entry']}/" + re.sub(rf"(^|-)k{row[k]:g}(?=-|$)", "", setting)


def one_panel(table: pd.DataFrame, panel: Panel) -> pd.DataFrame:
    """The rows of one panel."""
    held = (table["source"] == panel.source) & (table["hook_point"] == panel.hook_point)
    if "evaluated_on" in table:
        held &= table["evaluated_on"] == panel.evaluated_on
    return table[held]


def is_sae(table: pd.DataFrame) -> pd.Series:
    """Which rows are of trained SAEs."""
    return ~table["variant"].isin(UNTRAINED)


def panel_title(panel: Panel) -> str:
    """A panel's name; the synthetic sources' one hook point goes without saying."""
    source = panel.source
    if panel.evaluated_on != source:
        source += f" on {panel.evaluated_on}"
    return source if panel.hook_point == "features" else f"{source}, {panel.hook_point}"


def panels_of(rows: pd.DataFrame) -> list[Panel]:
    """The panels of some rows, in order of name; rows of a table without measurements are of their own source."""
    on = rows["evaluated_on"] if "evaluated_on" in rows else rows["source"]
    return sorted(
        {Panel(*held) for held in zip(rows["source"], rows["hook_point"], on, strict=True)}
    )


def metric_label(metric: str, panel: Panel) -> str:
    """A metric's name with its unit; rows of a synthetic source are samples, not tokens."""
    label = style.metric_label(metric)
    return label.replace("token", "sample") if panel.hook_point == "features" else label


def check_budgets(tables: Tables, rows: pd.DataFrame, options: Mapping[str, Any]) -> None:
    """Refuse to compare runs whose training or evaluation differs in size.

    Args:
        rows: lines of `Tables.wide` that one figure shows; runs of one panel are compared with each other.
        options: `figures` of the parameters; `allow_unequal_budgets` draws them all the same.

    SAEs of other libraries, whose training is not known, are shown beside the others all the same.

    Raises:
        UserError: runs differ in training tokens, batch size (and so updates) or evaluated rows.
    """
    if options["allow_unequal_budgets"]:
        return
    batches = _batch_sizes(tables.training)
    for panel in panels_of(rows):
        held = one_panel(rows, panel)
        saes = held[is_sae(held) & held["tokens"].notna()]
        where = f"{panel.source}/{panel.hook_point}"
        by_run = saes.set_index("trained")
        _refuse_unequal(where, "training tokens", by_run["tokens"].to_dict())
        known = {run: batches[run] for run in by_run.index if run in batches}
        _refuse_unequal(where, "tokens per update", known)
        _refuse_unequal(where, "evaluated rows", held.set_index("run")["rows"].dropna().to_dict())


def _batch_sizes(training: pd.DataFrame) -> dict[str, float]:
    """Tokens per step of each run, from its first and last logged step."""
    found = {}
    for run, steps in training.groupby("run"):
        first, last = steps.iloc[0], steps.iloc[-1]
        if last["step"] > first["step"]:
            taken = last["step"] - first["step"]
            found[str(run)] = (last["tokens_seen"] - first["tokens_seen"]) / taken
    return found


def _refuse_unequal(where: str, what: str, by_run: Mapping[Any, float]) -> None:
    groups: dict[float, list[str]] = {}
    for run, value in by_run.items():
        groups.setdefault(value, []).append(str(run))
    if len(groups) > 1:
        shown = "; ".join(
            f"{value:g} for {', '.join(runs[:3])}"
            + (f" and {len(runs) - 3} more" if len(runs) > 3 else "")
            for value, runs in sorted(groups.items())
        )
        raise UserError(
            f"{where}: expected runs of one figure to have equal {what}, found {shown}. Give them the "
            "same in params.yaml, or set figures.allow_unequal_budgets to true."
        )


@dataclass(frozen=True)
class Series:
    """Runs that one line goes through."""

    rows: pd.DataFrame
    look: style.Look
    label: str


def series_of(rows: pd.DataFrame) -> list[Series]:
    """Split the runs of one panel into series, in the legend's order, each with a label of its own.

    A label is the variant's name; where the panel shows several series of a variant, what they
    differ in is added: what the entry's name adds to the variant's, d_sae, schedule, else the setting.
    """
    keyed = sorted(
        rows.groupby("series", sort=False),
        key=lambda item: (
            style.rank(item[1]["variant"].iloc[0], item[1]["entry"].iloc[0]),
            natural(item[1]["entry"].iloc[0]),
            natural(str(item[0])),
        ),
    )
    looks = [style.look(held["variant"].iloc[0], held["entry"].iloc[0]) for _, held in keyed]
    found = []
    for i, (_, held) in enumerate(keyed):
        twins = [j for j, chosen in enumerate(looks) if chosen == looks[i]]
        label = _label(_first(held), [_first(keyed[j][1]) for j in twins], looks[i])
        found.append(Series(held, looks[i], label))
    return found


def _first(held: pd.DataFrame) -> pd.Series:
    """The run that names a series: one whose entry is called what its variant is, where there is one."""
    own = held[[not _own_name(row) for _, row in held.iterrows()]]
    return (own if len(own) else held).iloc[0]


def _own_name(row: pd.Series) -> str:
    """What an entry's name says beside source and variant: `mlp` of the source scenes' scenes-sparsemax-mlp."""
    name = str(row["entry"]).removeprefix(f"{row['source']}-")
    variant = str(row["variant"]).replace("_", "-")
    return "" if name == variant else name.removeprefix(f"{variant}-")


def _label(row: pd.Series, twins: list[pd.Series], chosen: style.Look) -> str:
    parts = [chosen.label]
    if _own_name(row) and len({twin["entry"] for twin in twins}) > 1:
        parts = [f"{chosen.label} ({_own_name(row)})"]
    if len({twin["d_sae"] for twin in twins}) > 1:
        parts.append(f"{row['d_sae']:g} latents")
    same = [
        twin for twin in twins if (twin["entry"], twin["d_sae"]) == (row["entry"], row["d_sae"])
    ]
    if len({twin["schedule"] for twin in same}) > 1:
        parts.append(str(row["schedule"]))
    if len([twin for twin in same if twin["schedule"] == row["schedule"]]) > 1:
        parts.append(re.sub(r"(^|-)(d|k)\d+(?=-|$)", "", str(row["setting"])).strip("-"))
    return ", ".join(parts)


def over_seeds(rows: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Mean and sample standard deviation of some columns over the seeds of each setting.

    Returns:
        One line per (panel, entry, setting), `COLUMN_seed_mean` and `COLUMN_seed_sd` (NaN for one seed).
    """
    grouped = rows.groupby([*Panel._fields, "entry", "setting"], sort=False)[columns]
    mean = grouped.mean().add_suffix("_seed_mean")
    return mean.join(grouped.std(ddof=1).add_suffix("_seed_sd")).reset_index()


def each_setting(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Settings of a series in natural order (k8 before k32): runs of one size and k, whichever entry asked for them."""
    k = "k_target" if "k_target" in rows else "k"
    known = rows.drop_duplicates("run").to_dict("records")
    settings = {
        row["run"]: row["setting"] if pd.isna(row[k]) else f"d{row['d_sae']:g}-k{row[k]:g}"
        for row in known
    }
    of_row = rows["run"].map(settings)
    for setting in sorted(set(settings.values()), key=natural):
        yield setting, rows[of_row == setting]


def of_one_size(rows: pd.DataFrame) -> pd.DataFrame:
    """Baselines, and of each panel's SAEs those with as many latents as most of them have."""
    parts = []
    for panel in panels_of(rows):
        held = one_panel(rows, panel)
        counts = held[is_sae(held)].drop_duplicates("run")["d_sae"].value_counts()
        size = max(counts.index, key=lambda d_sae: (counts[d_sae], d_sae), default=None)
        parts.append(held[~is_sae(held) | (held["d_sae"] == size)])
    return pd.concat(parts) if parts else rows


def entry_labels(rows: pd.DataFrame) -> list[str]:
    """A label for each row: its entry and setting; its size and seed too, where the entry or setting has several."""
    sizes = rows.groupby("entry")["d_sae"].transform("nunique")
    has_seeds = rows.duplicated(["entry", "setting"], keep=False)
    labels = []
    for (_, row), n_sizes, several in zip(rows.iterrows(), sizes, has_seeds, strict=True):
        size = f"{row['d_sae']:,.0f} latents" if n_sizes > 1 else ""
        seed = f"seed {row['seed']:g}" if several else ""
        parts = [str(row["entry"]), size, setting_label(row), seed]
        labels.append(", ".join(filter(None, parts)))
    return labels


def setting_label(row: Mapping[Any, Any] | pd.Series, k: str = "k") -> str:
    """What tells a setting from the others of its series: its k, or its penalty."""
    if not pd.isna(row[k]):
        return f"k = {row[k]:g}"
    rest = re.sub(r"^d\d+-?", "", str(row["setting"]))
    return re.sub(r"^(l1|target_l0|k_max|score_scale|alpha)(?=[\d.])", r"\1 = ", rest)
