"""The documents are those of the metric table, the schemas and the figures."""

import re
from pathlib import Path

from saeflow.figures import FIGURES, TABLES
from saeflow.tables.document import document
from saeflow.tables.metrics import BETWEEN_SEEDS, METRICS
from saeflow.tables.schema import TABLES as SCHEMAS

ROOT = Path(__file__).parents[2]


def test_docs_tables_is_up_to_date() -> None:
    page = (ROOT / "docs/tables.md").read_text(encoding="utf-8")
    assert page == document(), "run `make docs`"


def test_every_table_column_and_metric_is_described() -> None:
    page = document()
    assert re.findall(r"^## (\w+)\.csv$", page, re.MULTILINE) == list(SCHEMAS)
    named = set(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE))
    assert named >= {*METRICS, *BETWEEN_SEEDS}
    assert named >= {
        name for table in SCHEMAS.values() for name in table.columns if name != "k_target"
    }


def test_docs_figures_names_every_figure_and_nothing_else() -> None:
    page = (ROOT / "docs/figures.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`[^|]*) \|", page, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert named == {*FIGURES, *TABLES}
