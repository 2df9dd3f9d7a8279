"""docs/tables.md, generated from the metric table and the schemas: `python -m saeflow.tables docs/tables.md`."""

from collections.abc import Iterable, Mapping

from saeflow.tables.metrics import BETWEEN_SEEDS, METRICS, Metric
from saeflow.tables.render import Printed
from saeflow.tables.schema import IDS, STEPS, TABLES, Column, label

_OPENING = """\
# Tables

`results/tables` holds the numbers of all runs, and figures read nothing else. This page is generated from
`src/saeflow/tables/metrics.py` and `src/saeflow/tables/schema.py` by `python -m saeflow.tables docs/tables.md`.

All tables are CSV in UTF-8 with a header. Whole numbers are written whole, other numbers with 12 significant digits; a
cell without a value is empty. Printed tables (Markdown, LaTeX, the report) have three significant digits and at most four
decimals, shares in per cent, and a standard deviation with as many decimals as its mean.

Besides these tables there are `metrics.json` (measurement, metric, value: what `dvc metrics diff` compares), `summary` and
`classification` as Markdown and LaTeX, and `cards`, the pictures of concepts.
"""
_BETTER = {"": "", "lower": "lower is better", "higher": "higher is better"}


def document() -> str:
    """Return docs/tables.md."""
    parts = [
        _OPENING,
        "## Metrics\n\nThe names under `metric` in `metrics.csv`, `intervals.csv` and `controls.csv`. x are the evaluated "
        "activations, e = x - x_hat, m is the mean of the evaluated rows.\n",
        _metrics(METRICS),
        "## Metrics between seeds\n\nThe names under `metric` in `stability.csv`.\n",
        _metrics(BETWEEN_SEEDS),
        "## Columns of runs\n\nTables of runs begin with these columns; where a table has a `k` of its own, the run's is "
        "`k_target`. Tables of measurements have `evaluated_on` as well.\n",
        _columns(IDS),
    ]
    for name, table in TABLES.items():
        has_ids = "run" in table.columns
        own = {
            column: about
            for column, about in table.columns.items()
            if not (has_ids and ((column in IDS and about is IDS[column]) or column == "k_target"))
        }
        parts.append(f"## {name}.csv\n\n{table.about}\n")
        if table.is_open:
            parts.append(
                f"Columns that no run logged are left out. A variant may log more than these {len(STEPS)}.\n"
            )
        parts.append(_columns(own))
    return "\n".join(parts)


def _metrics(metrics: Mapping[str, Metric]) -> str:
    rows = []
    for name, metric in metrics.items():
        low, high = ("" if bound is None else f"{bound:g}" for bound in metric.bounds)
        unit = "share" if metric.percent else metric.unit
        source = f" Source: {metric.source}." if metric.source else ""
        bounds = f"{low or '-∞'} to {high or '∞'}" if low or high else ""
        rows.append(
            [f"`{name}`", metric.label, metric.definition + source, unit, bounds, _BETTER[metric.better]]
        )  # fmt: skip
    return _table(["metric", "label", "definition", "unit", "bounds", "direction"], rows)


def _columns(columns: Mapping[str, Column]) -> str:
    rows = [
        [f"`{name}`", column.label or label(name), column.definition, column.unit]
        for name, column in columns.items()
    ]
    return _table(["column", "label", "definition", "unit"], rows)


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    return Printed(head, len(head), list(rows), "").markdown() + "\n"
