"""TopK at the mean L0 that another SAE chose, beside it (Sparsemax SAE: the k it finds guides TopK)."""

import itertools
from collections.abc import Mapping
from typing import Any

import pandas as pd

from saeflow.figures import captions
from saeflow.figures.figure import PaperTable, TableFigure, without_data
from saeflow.figures.needs import Need
from saeflow.tables import compare
from saeflow.tables.load import Tables


def draw(tables: Tables, options: Mapping[str, Any]) -> PaperTable:
    """Make the table."""
    guides = tables.options[
        (tables.options["option"] == "guide") & (tables.options["chosen"] != "null")
    ]
    if guides.empty:
        raise without_data("table_guided_k", "an entry with options: {k: {mean_l0_of: RUN}}")
    wide = tables.wide.set_index(["trained", "evaluated_on"])
    runs = [*guides["run"], *guides["chosen"]]
    shown = tables.wide[tables.wide["trained"].isin(runs)]
    compare.check_budgets(tables, shown, options)
    metrics = [name for name in ("nmse", "ce_degradation", "zero_shot") if name in wide]
    lines = []
    for run, guide in zip(guides["run"], guides["chosen"], strict=True):
        for on, name in itertools.product(wide.loc[run].index, (guide, run)):
            row = wide.loc[(name, on)]
            own = {"source": row["source"], "evaluated_on": on}
            own |= {"entry": row["entry"], "setting": row["setting"]}
            known = {
                "k": row["k"],
                "l0_mean": row["l0_mean"],
                **{metric: row[metric] for metric in metrics},
            }
            role = {"role": "guide" if name == guide else "guided", "seed": int(row["seed"])}
            lines.append({**own, **role, **known})
    caption = (
        "SAEs that find their own sparsity (guide), and TopK trained with k at the guide's mean L0 on training activations, rounded "
        f"(guided). {captions.budget_sentence(shown)}"
    )
    return PaperTable(pd.DataFrame(lines), caption)


FIGURE = TableFigure(
    title="TopK at the k that another SAE found",
    draw=draw,
    needs=Need(
        "an entry with options: {k: {mean_l0_of: RUN}}",
        lambda asked: any(run.guide for run in asked.runs),
    ),
)
