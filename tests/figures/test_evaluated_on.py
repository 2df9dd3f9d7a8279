"""Figures and tables of SAEs that were measured on other sources as well."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from matplotlib import pyplot

from saeflow.figures import FIGURES, TABLES, load_tables
from saeflow.figures.report.results import sections
from saeflow.tables.compare import check_budgets
from saeflow.tables.files import read_csv
from saeflow.tables.summary import summarise

from .conftest import EXTRA, SYNTHETIC, TEXT, Maker

STRICT = {"allow_unequal_budgets": False}
OTHER = "wikitext"
ENTRIES = [
    ("topk", "topk", 0.9, (8, 32)), ("soft-topk", "soft_topk", 0.8, (8, 32)),
    ("sparsemax", "sparsemax", 1.0, None),
]  # fmt: skip
WITHOUT_ROWS = ("table_absorption", "table_guided_k", "table_sweep")
"""Tables that these runs have nothing for."""


@pytest.fixture(scope="module")
def one(make_tables: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    return make_tables(
        folder, panels=[TEXT, SYNTHETIC], entries=ENTRIES, seeds=2, sizes=(1152, 2304)
    )


@pytest.fixture(scope="module")
def two(one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tables and measurements on another source: all twice as large, on fewer rows."""
    folder = tmp_path_factory.mktemp("two") / "tables"
    shutil.copytree(one, folder)
    for name in ("metrics", "histograms", *EXTRA):
        table = pd.read_csv(folder / f"{name}.csv", dtype=str, keep_default_na=False)
        other = table.assign(evaluated_on=OTHER)
        if name == "metrics":
            other["value"] = (2 * other["value"].astype(float)).map("{:.12g}".format)
            other.loc[other["metric"] == "rows", "value"] = "100"
        pd.concat([table, other]).to_csv(folder / f"{name}.csv", index=False, lineterminator="\n")
    lines = pd.DataFrame(summarise(read_csv(folder / "metrics.csv")))
    lines.to_csv(folder / "summary.csv", index=False, lineterminator="\n")
    return folder


@pytest.mark.parametrize("name", [n for n in (*FIGURES, *TABLES) if n not in WITHOUT_ROWS])
def test_every_figure_takes_them(name: str, two: Path) -> None:
    made = {**FIGURES, **TABLES}[name].draw(load_tables(two), STRICT)
    assert len(made.data)
    pyplot.close("all")


@pytest.mark.parametrize(("figure", "metric"), [("fvu_l0", "fvu"), ("ce_l0", "ce_degradation")])
def test_each_source_is_a_panel_of_its_own_numbers(
    figure: str, metric: str, one: Path, two: Path
) -> None:
    alone = FIGURES[figure].draw(load_tables(one), STRICT).data
    drawing = FIGURES[figure].draw(load_tables(two), STRICT)
    data = drawing.data
    is_other = data["evaluated_on"] == OTHER
    own, other = (data[held].reset_index(drop=True) for held in (~is_other, is_other))
    pd.testing.assert_frame_equal(own[alone.columns], alone)
    assert other[metric].to_numpy() == pytest.approx(2 * own[metric].to_numpy())
    seeds = f"{metric}_seed_mean"
    assert other[seeds].to_numpy() == pytest.approx(2 * own[seeds].to_numpy())
    titles = [ax.get_title() for ax in drawing.figure.axes]
    assert f"{TEXT[0]} on {OTHER}, {TEXT[1]}" in titles
    assert f"{TEXT[0]}, {TEXT[1]}" in titles


def test_tables_have_a_column_only_where_there_is_another_source(one: Path, two: Path) -> None:
    for name in ("table_dictionary_size", "table_ablation"):
        alone = TABLES[name].draw(load_tables(one), STRICT).data
        both = TABLES[name].draw(load_tables(two), STRICT).data
        assert "evaluated_on" not in alone
        own, other = (
            both[held] for held in (both["evaluated_on"] != OTHER, both["evaluated_on"] == OTHER)
        )
        assert len(own) == len(other) == len(alone)
        assert own["nmse"].to_numpy() == pytest.approx(alone["nmse"].to_numpy())
        assert other["nmse"].to_numpy() == pytest.approx(2 * alone["nmse"].to_numpy())


def test_scores_are_of_the_own_sources_contexts(one: Path, two: Path) -> None:
    """Contexts of another source have the same numbers, and no score."""
    alone, both = (FIGURES["k_complexity"].draw(load_tables(p), STRICT).data for p in (one, two))
    pd.testing.assert_frame_equal(alone, both)


def test_the_report_has_a_table_for_each(two: Path) -> None:
    given = (read_csv(two / f"{name}.csv") for name in ("summary", "unmeasured"))
    titles = [section["title"] for section in sections(*given)]
    assert titles[:2] == [f"{TEXT[0]}, {TEXT[1]}", f"{TEXT[0]} on {OTHER}, {TEXT[1]}"]
    assert titles[2:] == [SYNTHETIC[0], f"{SYNTHETIC[0]} on {OTHER}"]


def test_rows_of_one_panel_must_be_equally_many(two: Path) -> None:
    tables = load_tables(two)
    check_budgets(tables, tables.wide, STRICT)  # 100 here, more there
    assert len(tables.wide) == tables.wide["run"].nunique() == 2 * tables.wide["trained"].nunique()
