"""Accuracy through the n most frequent concepts, by labelled set and as mean over sets (Sparsemax SAE, vision)."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from saeflow.figures import captions
from saeflow.figures.figure import PaperTable, TableFigure, ordered, without_data
from saeflow.figures.needs import LABELLED
from saeflow.tables import compare
from saeflow.tables.load import Tables
from saeflow.tables.numbers import natural


def draw(tables: Tables, options: Mapping[str, Any]) -> PaperTable:
    """Make the table; seeds of a setting are averaged."""
    rows = tables.classification
    rows = rows[compare.is_sae(rows) & (rows["concepts"] == "on") & (rows["labels"] == "true")]
    if rows.empty:
        raise without_data("table_top_n", "labelled images")
    shown = tables.wide[tables.wide["run"].isin(rows["run"])]
    compare.check_budgets(tables, shown, options)
    keys = ["source", "entry", "setting", "protocol"]
    by_set = rows.groupby([*keys, "set", "n"], as_index=False)["accuracy"].mean()
    mean = (
        by_set.groupby([*keys, "n"], as_index=False)["accuracy"].mean().assign(set="mean of sets")
    )
    if rows["set"].nunique() > 1:
        by_set = pd.concat([by_set, mean])
    every = by_set[by_set["protocol"] == "all"]
    held = by_set[by_set["protocol"] != "all"]
    wide = held.pivot(index=[*keys, "set"], columns="n", values="accuracy").reset_index()
    counts = sorted(set(held["n"]), key=natural)
    whole = every.rename(columns={"accuracy": "all"})[["source", "entry", "setting", "set", "all"]]
    data = wide.merge(whole, on=["source", "entry", "setting", "set"], how="left")
    data = data[[*keys[:3], "set", "protocol", *counts, "all"]]
    clean = rows.groupby("set")["clean_accuracy"].first()
    caption = (
        "Zero-shot accuracy (mean over classes) with only the n most frequent concepts on. leak_free: concepts of all classes, "
        "chosen on the training half; paper: concepts of the image's true class, chosen on the tested images. Without an SAE: "
        f"{captions.listed(f'{value:.3f} ({name})' for name, value in clean.items())}. {captions.budget_sentence(shown)}"
    )
    return PaperTable(ordered(data, [*keys[:3], "set", "protocol"]), caption)


FIGURE = TableFigure(
    title="Classification through the top n concepts, in numbers",
    draw=draw,
    needs=LABELLED,
)
