"""Absorption of first letters, mean over letters and seeds (SAEBench)."""

from collections.abc import Mapping
from typing import Any

from saeflow.figures import captions
from saeflow.figures.figure import PaperTable, TableFigure, ordered, without_data
from saeflow.figures.needs import Need
from saeflow.tables import compare
from saeflow.tables.load import Tables
from saeflow.tables.schema import Column


def draw(tables: Tables, options: Mapping[str, Any]) -> PaperTable:
    """Make the table; seeds of a setting are averaged."""
    rows = tables.absorption
    rows = rows[rows["letter"] == "mean"]
    if rows.empty:
        raise without_data(
            "table_absorption", "evaluation.interpretability with absorption, of text"
        )
    shown = tables.wide[tables.wide["run"].isin(rows["run"])]
    compare.check_budgets(tables, shown, options)
    keys = ["source", "entry", "setting"]
    names = [
        "d_sae",
        "counted",
        "probe_f1",
        "split_latents",
        "absorption_fraction",
        "full_absorption",
    ]
    data = rows.groupby(keys, as_index=False)[names].mean().rename(columns={"counted": "letters"})
    caption = (
        "Absorption of first letters. The measure is meaningless for models below about 1 B parameters and dictionaries below 16k "
        "latents: such models hardly know how words are spelled. letters: those that a logistic probe of the activation tells "
        "(with too few of them, the rest is empty); split latents: latents of a letter; absorption fraction: share of a letter's "
        "direction that other latents write in place of its own; full absorption: share of the words on which its own are silent and "
        f"another writes it. Means over letters and seeds. {captions.budget_sentence(shown)}"
    )
    return PaperTable(ordered(data, keys), caption)


FIGURE = TableFigure(
    title="Absorption of first letters",
    draw=draw,
    columns={"letters": Column(definition="Letters that the probe finds.", kind="count")},
    needs=Need(
        "evaluation.interpretability with absorption", lambda asked: asked.interprets("absorption")
    ),
)
