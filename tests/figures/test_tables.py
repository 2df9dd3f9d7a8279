"""Tables as figures read them, and runs that may not be compared."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from saeflow.errors import UserError
from saeflow.figures.series import each_setting, entry_labels, series_of
from saeflow.tables import compare
from saeflow.tables.compare import check_budgets
from saeflow.tables.load import load_tables

from .conftest import ENTRIES, SYNTHETIC, TEXT, Maker

STRICT = {"allow_unequal_budgets": False}


def test_a_series_goes_through_every_k_or_penalty_and_seed(tables: Path) -> None:
    wide = load_tables(tables).wide
    found = series_of(compare.one_panel(wide[compare.is_sae(wide)], compare.Panel(*TEXT, TEXT[0])))
    assert [series.label for series in found] == ["ReLU", "TopK", "BatchTopK", "Random decoder"]
    assert all(len(series.rows) == 4 * 2 for series in found)
    assert found[0].rows["k"].isna().all()
    assert sorted(found[1].rows["k"].unique()) == [8, 16, 32, 64]


def test_two_entries_of_a_variant_are_told_apart(make_tables: Maker, tmp_path: Path) -> None:
    entries = [("topk", "topk", 1.0, (8,)), ("topk-annealed", "topk", 1.0, (8,))]
    wide = load_tables(make_tables(tmp_path, panels=[TEXT], entries=entries)).wide
    found = series_of(wide[compare.is_sae(wide)])
    assert [series.label for series in found] == ["TopK", "TopK (annealed)"]
    assert found[0].look == found[1].look


def test_entries_that_differ_in_k_only_are_one_series(make_tables: Maker, tmp_path: Path) -> None:
    entries = [("topk", "topk", 1.0, (8, 32)), ("topk-guided", "topk", 1.0, (19,))]
    wide = load_tables(make_tables(tmp_path, panels=[TEXT], entries=entries)).wide
    (found,) = series_of(wide[compare.is_sae(wide)])
    assert found.label == "TopK"
    settings = [(name, set(rows["k"]), len(rows)) for name, rows in each_setting(found.rows)]
    assert settings == [("d2304-k8", {8}, 2), ("d2304-k19", {19}, 2), ("d2304-k32", {32}, 2)]


def test_the_size_of_most_saes_is_shown(make_tables: Maker, tmp_path: Path) -> None:
    entries = [("topk", "topk", 1.0, (8, 32)), ("relu", "relu", 1.0, None)]
    wide = load_tables(make_tables(tmp_path, panels=[TEXT], entries=entries)).wide
    larger = wide[(wide["variant"] == "topk")].assign(d_sae=9999)
    kept = compare.of_one_size(pd.concat([wide, larger]))
    assert set(kept.loc[compare.is_sae(kept), "d_sae"]) == {2304}
    assert len(kept) == len(wide)


def test_runs_of_other_tokens_are_refused_by_name(make_tables: Maker, tmp_path: Path) -> None:
    folder = make_tables(
        tmp_path, panels=[TEXT], tokens=lambda entry, seed: 200_000 if entry == "relu" else 100_000
    )
    tables = load_tables(folder)
    with pytest.raises(
        UserError, match=r"equal training tokens.*topk.*200000 for .*relu/d2304-l10\.1"
    ):
        check_budgets(tables, tables.wide, STRICT)
    check_budgets(tables, tables.wide, {"allow_unequal_budgets": True})


def test_sources_may_have_budgets_of_their_own(
    tables: Path, make_tables: Maker, tmp_path: Path
) -> None:
    loaded = load_tables(tables)
    rows = loaded.wide.copy()
    rows.loc[(rows["source"] == SYNTHETIC[0]) & compare.is_sae(rows), "tokens"] = 1
    check_budgets(loaded, rows, STRICT)
    rows.loc[rows["run"] == rows["run"].iloc[0], "tokens"] = 2
    with pytest.raises(UserError, match="training tokens"):
        check_budgets(loaded, rows, STRICT)


def test_runs_of_other_batches_or_rows_are_refused(tables: Path) -> None:
    loaded = load_tables(tables)
    run = loaded.training["run"].iloc[0]
    loaded.training.loc[loaded.training["run"] == run, "tokens_seen"] *= 2
    with pytest.raises(UserError, match=r"equal tokens per update.*2048 for"):
        check_budgets(loaded, loaded.wide, STRICT)
    loaded = load_tables(tables)
    rows = loaded.wide.copy()
    rows.loc[rows["variant"] == "pca", "rows"] -= 1
    with pytest.raises(UserError, match=r"equal evaluated rows.*11899 for .*pca"):
        check_budgets(loaded, rows, STRICT)


def test_an_entry_called_nan_stays_a_name(make_tables: Maker, tmp_path: Path) -> None:
    folder = make_tables(
        tmp_path, panels=[TEXT], entries=[("nan", "topk", 1.0, (8,)), *ENTRIES[:1]]
    )
    assert "nan" in set(load_tables(folder).wide["entry"])


def test_what_is_wrong_with_a_table_is_said_in_one_line(tables: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"options\.csv: no such file"):
        load_tables(tmp_path)
    shutil.copy(tables / "options.csv", tmp_path)
    with pytest.raises(UserError, match=r"metrics\.csv: no such file"):
        load_tables(tmp_path)
    text = (tables / "metrics.csv").read_text()
    (tmp_path / "metrics.csv").write_text(text.replace("metric,value", "metric,worth", 1))
    with pytest.raises(UserError, match="expected the column value"):
        load_tables(tmp_path)
    first = text.splitlines()[1]
    for broken, message in [
        (first.rpartition(",")[0] + ",high", "expected a table of numbers"),
        (first.rpartition(",")[0] + ",inf", "expected finite numbers under value"),
        ("smollm2/blocks", "expected finite numbers under value"),
        (first, "has rows twice"),
    ]:
        (tmp_path / "metrics.csv").write_text(text + broken + "\n")
        with pytest.raises(UserError, match=rf"metrics\.csv: .*{message}"):
            load_tables(tmp_path)


def test_labels_name_entries_sizes_and_seeds_only_where_there_are_several() -> None:
    lines = [
        ("soft_topk", "world-soft-topk", "d64-k8", 64, 8, 0), ("soft_topk", "world-soft-topk", "d128-k8", 128, 8, 0),
        ("soft_topk", "world-soft-topk", "d128-k8", 128, 8, 1), ("adaptive_k", "adaptive-k", "d64-k_max30", 64, None, 0),
        ("topk", "topk", "d64-k8", 64, 8, 0), ("topk", "world-wide", "d64-k8", 64, 8, 0),
    ]  # fmt: skip
    columns = ["variant", "entry", "setting", "d_sae", "k", "seed"]
    rows = pd.DataFrame(lines, columns=columns).assign(source="world")
    assert entry_labels(rows) == [
        "SoftSAE, 64 latents, k = 8", "SoftSAE, 128 latents, k = 8, seed 0", "SoftSAE, 128 latents, k = 8, seed 1",
        "AdaptiveK, k_max = 30", "TopK, k = 8", "TopK (wide), k = 8",
    ]  # fmt: skip
