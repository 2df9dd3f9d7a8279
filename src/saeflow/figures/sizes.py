"""Runs of several dictionary sizes, as a figure and a table show them."""

import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from saeflow.errors import UserError
from saeflow.figures import style
from saeflow.tables import compare
from saeflow.tables.load import Tables

METRICS = ("nmse", "ce_degradation")


def sized(tables: Tables, options: Mapping[str, Any], figure: str) -> pd.DataFrame:
    """The runs of entries that have several sizes, with `line`: what differs in size and seed only.

    Raises:
        UserError: there are none, or they differ in budget.
    """
    rows = tables.wide[compare.is_sae(tables.wide)].copy()
    rows["line"] = [
        f"{entry}/{re.sub(r'^d[0-9]+-?', '', setting)}"
        for entry, setting in zip(rows["entry"], rows["setting"], strict=True)
    ]
    keys = [*compare.Panel._fields, "line"]
    if len(rows):
        rows = rows[rows.groupby(keys)["d_sae"].transform("nunique") > 1]
    if rows.empty:
        raise UserError(
            f"figures.names: {figure} needs an entry of saes with several d_sae, the tables have none. Give one "
            f"d_sae: [SMALL, LARGE] in params.yaml, or take {figure} out of figures.names."
        )
    compare.check_budgets(tables, rows, options)
    return rows


def l0_sentence(rows: pd.DataFrame) -> str:
    """The span of mean L0 of each variant."""
    spans = []
    for variant, own in rows.groupby("variant", sort=False):
        low, high = own["l0_mean"].min(), own["l0_mean"].max()
        span = f"{low:.3g}" if high - low < 0.05 else f"{low:.3g} to {high:.3g}"
        spans.append(f"{style.look(str(variant)).label} {span}")
    return ", ".join(spans)
