"""Selection of comparable runs: panels of one store and source, equal budgets, one size."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from saeflow.errors import UserError
from saeflow.tables.load import Tables
from saeflow.tables.runs import BASELINES
from saeflow.tables.schema import axis_label


class Panel(NamedTuple):
    """Runs that are compared with each other: of one store, measured on one source's rows."""

    source: str
    hook_point: str
    evaluated_on: str


def is_sae(table: pd.DataFrame) -> pd.Series:
    """Return which rows are of trained SAEs."""
    return ~table["variant"].isin(BASELINES)


def one_panel(table: pd.DataFrame, panel: Panel) -> pd.DataFrame:
    """Return the rows of one panel."""
    held = (table["source"] == panel.source) & (table["hook_point"] == panel.hook_point)
    if "evaluated_on" in table:
        held &= table["evaluated_on"] == panel.evaluated_on
    return table[held]


def panels_of(rows: pd.DataFrame) -> list[Panel]:
    """Return the panels of some rows, in order of name.

    Rows of a table without measurements are of their own source.
    """
    on = rows["evaluated_on"] if "evaluated_on" in rows else rows["source"]
    return sorted(
        {Panel(*held) for held in zip(rows["source"], rows["hook_point"], on, strict=True)}
    )


def panels_with(tables: Tables, metric: str) -> list[Panel]:
    """Return the panels of the SAEs that have a metric, in order of name."""
    rows = tables.metrics
    return panels_of(rows[(rows["metric"] == metric) & is_sae(rows)])


def panel_title(panel: Panel) -> str:
    """Return a panel's name; the synthetic sources' one hook point goes without saying."""
    source = panel.source
    if panel.evaluated_on != source:
        source += f" on {panel.evaluated_on}"
    return source if panel.hook_point == "features" else f"{source}, {panel.hook_point}"


def panel_axis(name: str, panel: Panel) -> str:
    """Return a metric's or column's name with its unit; rows of a synthetic source are samples, not tokens."""
    text = axis_label(name)
    return text.replace("token", "sample") if panel.hook_point == "features" else text


def over_seeds(rows: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Return mean and sample standard deviation of some columns over the seeds of each setting.

    Returns:
        One line per (panel, entry, setting), `COLUMN_seed_mean` and `COLUMN_seed_sd` (NaN for one seed).
    """
    grouped = rows.groupby([*Panel._fields, "entry", "setting"], sort=False)[columns]
    mean = grouped.mean().add_suffix("_seed_mean")
    return mean.join(grouped.std(ddof=1).add_suffix("_seed_sd")).reset_index()


def of_one_size(rows: pd.DataFrame) -> pd.DataFrame:
    """Return baselines, and of each panel's SAEs those with as many latents as most of them have."""
    parts = []
    for panel in panels_of(rows):
        held = one_panel(rows, panel)
        counts = held[is_sae(held)].drop_duplicates("run")["d_sae"].value_counts()
        size = max(counts.index, key=lambda d_sae: (counts[d_sae], d_sae), default=None)
        parts.append(held[~is_sae(held) | (held["d_sae"] == size)])
    return pd.concat(parts) if parts else rows


def check_budgets(tables: Tables, rows: pd.DataFrame, options: Mapping[str, Any]) -> None:
    """Refuse to compare runs whose training or evaluation differs in size.

    SAEs of other libraries, whose training is not known, are shown beside the others all the same.

    Args:
        tables: hold the logged steps that batch sizes are read from.
        rows: lines of `Tables.wide` that one figure shows; runs of one panel are compared with each other.
        options: `figures` of the parameters; `allow_unequal_budgets` draws them all the same.

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
    """Return the tokens per step of each run, from its first and last logged step."""
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
