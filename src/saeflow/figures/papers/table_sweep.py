"""Tuned SAEs against themselves untuned: the trial that was chosen beside trial 0, on units that chose neither."""

from collections.abc import Mapping
from typing import Any

from saeflow.config import trial_of, without_trial
from saeflow.figures.figure import PaperTable, TableFigure, ordered, without_data
from saeflow.figures.needs import Need
from saeflow.tables.load import Tables
from saeflow.tables.schema import Column

_NEEDS = Need(
    "the section sweep and an entry of saes with ranges",
    lambda asked: any(trial_of(run.name) is not None for run in asked.runs),
)
_COLUMNS = [
    "source", "hook_point", "entry", "setting", "drawn", "trial", "trials", "l0", "untuned_l0", "fvu", "fvu_low", "fvu_high",
    "untuned_fvu", "difference", "low", "high", "seeds", "selection_units", "units",
]  # fmt: skip


def draw(tables: Tables, options: Mapping[str, Any]) -> PaperTable:
    """Make the table: a line for each setting."""
    rows = tables.sweeps.copy()
    if rows.empty:
        raise without_data("table_sweep", _NEEDS.what)
    rows["setting"] = rows["setting"].map(without_trial)
    keys = ["source", "hook_point", "entry", "setting"]
    untuned = rows[rows["trial"] == 0].set_index(keys)[["fvu", "l0"]].add_prefix("untuned_")
    chosen = rows[rows["is_chosen"] == 1].join(untuned, on=keys)
    caption = (
        "The chosen trial of each tuned setting beside trial 0, which has the values that the entry states. FVU and L0 are of held-out "
        "documents, images or samples that no trial was chosen on; intervals (95 %) resample these, and the difference is paired. A "
        "difference below 0 is what tuning gained; it is 0 where trial 0 was chosen. All trials are in results/tables/sweeps.csv."
    )
    return PaperTable(ordered(chosen[_COLUMNS], keys), caption)


FIGURE = TableFigure(
    title="What tuning gained",
    draw=draw,
    needs=_NEEDS,
    columns={
        "drawn": Column(
            definition="Values of the chosen trial.", kind="word", label="chosen values"
        ),
        "untuned_l0": Column(definition="Mean L0 of trial 0.", label="untuned L0"),
        "untuned_fvu": Column(definition="FVU of trial 0.", label="untuned FVU"),
        "fvu_low": Column(definition="Lower bound.", label="FVU, from"),
        "fvu_high": Column(definition="Upper bound.", label="FVU, to"),
        "difference": Column(definition="FVU less that of trial 0."),
    },
)
