"""Table of interpretability: the share of latents whose firing a scorer predicts from text, and sparse probes."""

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
    rows = tables.detection
    if rows.empty:
        raise without_data(
            "table_interpretability", "evaluation.interpretability with detection, of text"
        )
    shown = tables.wide[tables.wide["run"].isin(rows["run"])]
    compare.check_budgets(tables, shown, options)
    keys = ["source", "entry", "setting"]
    grouped = rows.groupby(keys)
    data = grouped[["balanced_accuracy", "auc", "shuffled", "interpretable"]].mean()
    data.insert(0, "judged", grouped["latent"].nunique())
    probes_of = tables.probing[tables.probing["method"] == "latents"]
    by_k = probes_of.pivot_table(index=keys, columns="k", values="accuracy")
    data = data.join(
        by_k.add_prefix("probe_k").rename(columns=lambda name: name.removesuffix(".0"))
    )
    caption = (
        "Detection: from windows of training text on which a latent fires and others, a scorer says of held-out windows whether it fires "
        "(balanced accuracy and AUC, mean over the sampled latents; shuffled: with shuffled answers). The scorer is naive Bayes on the "
        "marked token and the one before it, unless evaluation.interpretability.detection.scorer names another. interpretable: share of the judged latents at or above the threshold. probe: accuracy of sparse "
        f"probes with k latents, mean over questions. {captions.budget_sentence(shown)}"
    )
    return PaperTable(ordered(data.reset_index(), keys), caption)


FIGURE = TableFigure(
    title="Latents whose firing is predicted from text",
    draw=draw,
    columns={"judged": Column(definition="Latents that are judged.", kind="count")},
    needs=Need(
        "evaluation.interpretability with detection", lambda asked: asked.interprets("detection")
    ),
)
