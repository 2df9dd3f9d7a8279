"""Training throughput by entry, and against TopK of the same size on the same store (AdaptiveK)."""

from collections.abc import Mapping
from typing import Any

from saeflow.figures.figure import PaperTable, TableFigure, ordered, without_data
from saeflow.figures.needs import TRAINED
from saeflow.tables.load import Tables
from saeflow.tables.runs import RANDOM_DECODER
from saeflow.tables.schema import Column


def draw(tables: Tables, options: Mapping[str, Any]) -> PaperTable:
    """Make the table."""
    steps = tables.training
    if steps.empty or "tokens_per_s" not in steps:
        raise without_data("table_training_cost", TRAINED.what)
    keys = ["source", "hook_point", "d_sae"]
    sae = [*keys, "variant", "entry"]
    by_run = steps.groupby([*sae, "run"])["tokens_per_s"].median().reset_index()
    data = by_run.groupby(sae, as_index=False)["tokens_per_s"].median()
    is_topk = (by_run["variant"] == "topk") & ~by_run["entry"].str.contains(RANDOM_DECODER)
    topk = by_run[is_topk].groupby(keys, as_index=False)["tokens_per_s"].median()
    data = data.merge(topk, on=keys, how="left", suffixes=("", "_topk"))
    data["against_topk"] = data.pop("tokens_per_s_topk") / data["tokens_per_s"]
    data["hours_of_1e9"] = 1e9 / data["tokens_per_s"] / 3600
    columns = [
        "source",
        "entry",
        "variant",
        "d_sae",
        "tokens_per_s",
        "against_topk",
        "hours_of_1e9",
    ]
    data = data[columns]
    caption = (
        "Median training throughput over logged steps, as the workflow ran it (jobs beside each other share the machine: compare "
        "with benchmarks/), and its ratio to the median run of TopK of the same size on the same store."
    )
    return PaperTable(ordered(data, ["source", "d_sae", "variant", "entry"]), caption)


FIGURE = TableFigure(
    title="What training costs",
    draw=draw,
    needs=TRAINED,
    columns={
        "against_topk": Column(
            definition="Throughput of TopK over the entry's.", label="time against TopK"
        ),
        "hours_of_1e9": Column(
            definition="Hours for 1e9 tokens at this throughput.", label="hours for 1 G tokens"
        ),
    },
)
