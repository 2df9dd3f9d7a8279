"""NMSE and cross-entropy degradation by size of the dictionary (Sparsemax SAE, text)."""

from collections.abc import Mapping
from typing import Any

from saeflow.figures import captions
from saeflow.figures.figure import PaperTable, TableFigure, ordered
from saeflow.figures.needs import SIZES
from saeflow.figures.sizes import METRICS, l0_sentence, sized
from saeflow.tables.load import Tables


def draw(tables: Tables, options: Mapping[str, Any]) -> PaperTable:
    """Make the table; seeds of a setting are averaged."""
    rows = sized(tables, options, "table_dictionary_size")
    metrics = ["l0_mean", *(metric for metric in METRICS if metric in rows)]
    keys = ["source", "evaluated_on", "line", "d_sae"]
    data = rows.groupby(keys, as_index=False)[metrics].mean()
    data = data.rename(columns={"line": "entry"})
    data["entry"] = data["entry"].str.rstrip("/")
    caption = (
        f"Error and rise of the model's cross-entropy (nats/token) by number of latents. Mean L0: {l0_sentence(rows)}. "
        f"{captions.budget_sentence(rows)} {captions.rows_sentence(rows, cross_entropy=True)}"
    )
    return PaperTable(ordered(data, ["source", "evaluated_on", "entry", "d_sae"]), caption)


FIGURE = TableFigure(
    title="The size of the dictionary, in numbers",
    draw=draw,
    needs=SIZES,
)
