"""Verdicts on SAEs that find their own number of latents: against rivals at equal L0 and against their own controls."""

from collections.abc import Mapping
from typing import Any

from saeflow.figures.figure import PaperTable, TableFigure, without_data
from saeflow.figures.plots.headline import NEEDS, compared
from saeflow.tables import compare, verdict
from saeflow.tables.load import Tables
from saeflow.tables.runs import variant_label
from saeflow.tables.schema import Column, label

_COLUMNS = [
    "source", "entry", "setting", "against", "measure", "verdict", "l0", "rival_l0", "value", "rival", "difference",
    "low", "high", "seed_noise", "l0_effect", "seeds", "units",
]  # fmt: skip


def draw(tables: Tables, options: Mapping[str, Any]) -> PaperTable:
    """Make the table."""
    rows = verdict.judged(tables)
    if rows.empty:
        raise without_data("table_headline", NEEDS.what)
    compare.check_budgets(tables, compared(tables.wide, rows), options)
    rows["against"] = [
        f"itself, {verdict.CONTROLS[name]}"
        if name in verdict.CONTROLS
        else f"{variant_label(name)} at equal L0"
        for name in rows["rival_variant"]
    ]
    rows["measure"] = rows["metric"].map(label)
    rows = rows.sort_values(["source", "entry", "setting", "metric"], kind="stable")
    caption = (
        "SAEs that find their own number of latents, against TopK and BatchTopK trained at the mean L0 that they found, with "
        "equal tokens and updates, and against themselves with another k. A difference below 0 is a smaller error. Intervals "
        "(95 %) are of the paired difference, over documents, images or samples; seed noise is half the 95 % interval over "
        "seeds (Student's t). `better` and `worse` need a difference that is clear of 0 and larger than seed noise and the "
        "effect of the rest of the difference in L0 together."
    )
    return PaperTable(rows[_COLUMNS].reset_index(drop=True), caption)


FIGURE = TableFigure(
    title="Verdicts at equal L0",
    draw=draw,
    needs=NEEDS,
    columns={
        "against": Column(definition="Rival or control.", kind="word"),
        "measure": Column(definition="The error.", kind="word", label="error"),
        "verdict": Column(definition="What the difference shows.", kind="word"),
        "rival_l0": Column(definition="Mean L0 of the rival.", label="rival's L0"),
        "rival": Column(definition="The rival's value.", label="rival's value"),
        "seed_noise": Column(
            definition="Half the 95 % interval of the mean difference over seeds.",
            label="seed noise",
        ),
        "l0_effect": Column(
            definition="What the difference in L0 may explain.", label="effect of L0"
        ),
    },
)
