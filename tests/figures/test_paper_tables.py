"""The papers' tables: their numbers from the long tables, by hand."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from saeflow.errors import UserError
from saeflow.figures import TABLES, draw
from saeflow.figures.figure import PaperTable
from saeflow.tables.load import load_tables
from saeflow.tables.schema import columns_of

from .conftest import SYNTHETIC, TEXT, Maker, in_its_environment, sweep_line, write

STRICT = {"allow_unequal_budgets": False}
ENTRIES = [
    ("topk", "topk", 0.9, (8, 32)),
    ("relu", "relu", 1.2, None),
    ("sparsemax", "sparsemax", 1.0, None),
]


@pytest.fixture(scope="module")
def folder(make_tables: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_tables(
        tmp_path_factory.mktemp("tables"), entries=ENTRIES, seeds=2, sizes=(1152, 2304)
    )
    guide, guided = (
        f"{TEXT[0]}/{TEXT[1]}/{name}-seed0" for name in ("relu/d2304-l10.1", "topk/d2304-k32")
    )
    rows = list(csv.DictReader((path / "options.csv").open()))
    for row in rows:
        if row["run"] == guided and row["option"] == "guide":
            row["chosen"] = guide
        elif row["option"] == "guide":
            row["chosen"] = "null"
    with (path / "options.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write(path / "sweeps.csv", columns_of("sweeps"), [sweep_line(TEXT, 0, is_chosen=1)])
    return path


def metric(folder: Path, run: str, name: str) -> float:
    rows = pd.read_csv(folder / "metrics.csv")
    return float(rows[(rows["run"] == run) & (rows["metric"] == name)]["value"].iloc[0])


@pytest.mark.parametrize("name", list(TABLES))
def test_a_table_is_csv_markdown_latex_and_a_caption(
    name: str, folder: Path, tmp_path: Path
) -> None:
    draw(name, folder, STRICT, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "caption.md", f"{name}.csv", f"{name}.md", f"{name}.tex"
    }  # fmt: skip
    data = pd.read_csv(tmp_path / f"{name}.csv")
    text = (tmp_path / f"{name}.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == len(data) + 2 > 2
    assert {line.count(" | ") for line in lines} == {len(data.columns) - 1}
    latex = (tmp_path / f"{name}.tex").read_text()
    assert latex.count(r"\\") == len(data) + 1
    assert not re.search(r"(?<!\\)[%#_]", latex)


def test_tables_take_the_packages_of_their_environment_alone(folder: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; import saeflow.cli; from saeflow.figures import TABLES, draw\n"
        "for name in TABLES:\n"
        f"    draw(name, Path(sys.argv[1]), {STRICT!r}, Path(sys.argv[2]) / name)"
    )
    in_its_environment(code, str(folder), str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == set(TABLES)


def test_sizes_are_means_over_seeds(folder: Path) -> None:
    data = TABLES["table_dictionary_size"].draw(load_tables(folder), STRICT).data
    line = data[
        (data["source"] == TEXT[0]) & (data["entry"] == "topk/k8") & (data["d_sae"] == 1152)
    ]
    for column in ("nmse", "ce_degradation", "l0_mean"):
        values = [
            metric(folder, f"{TEXT[0]}/{TEXT[1]}/topk/d1152-k8-seed{i}", column) for i in (0, 1)
        ]
        assert line[column].iloc[0] == pytest.approx(sum(values) / 2), column
    assert set(data["d_sae"]) == {1152, 2304}


def test_an_ablation_compares_one_size(folder: Path) -> None:
    data = TABLES["table_ablation"].draw(load_tables(folder), STRICT).data
    assert set(data["setting"].str.partition("-")[0]) == {"d2304"}
    assert len(data) == data["setting"].nunique() * data["source"].nunique()
    line = data[data["source"] == TEXT[0]].iloc[0]
    runs = [f"{TEXT[0]}/{TEXT[1]}/sparsemax/{line['setting']}-seed{i}" for i in (0, 1)]
    for column in ("nmse", "l0_mean", "ce_degradation"):
        values = [metric(folder, run, column) for run in runs]
        assert line[column] == pytest.approx(sum(values) / 2), column


def test_accuracy_is_that_of_the_classification(folder: Path) -> None:
    data = TABLES["table_top_n"].draw(load_tables(folder), STRICT).data
    line = data[(data["setting"] == "d2304-k8") & (data["protocol"] == "paper")]
    rows = pd.read_csv(folder / "classification.csv", dtype={"n": str})
    rows = rows[rows["run"].str.contains("topk/d2304-k8-") & (rows["protocol"] == "paper")]
    for n in ("1", "50"):
        held = rows[(rows["n"] == n) & (rows["concepts"] == "on") & (rows["labels"] == "true")]
        assert line[n].iloc[0] == pytest.approx(held["accuracy"].mean())
    assert line["all"].iloc[0] == pytest.approx(0.7)


def test_the_guide_stands_above_what_it_guides(folder: Path) -> None:
    data = TABLES["table_guided_k"].draw(load_tables(folder), STRICT).data
    assert data["role"].tolist() == ["guide", "guided"]
    assert data["entry"].tolist() == ["relu", "topk"]
    guide = f"{TEXT[0]}/{TEXT[1]}/relu/d2304-l10.1-seed0"
    assert data["l0_mean"].iloc[0] == pytest.approx(metric(folder, guide, "l0_mean"))
    assert data["k"].iloc[1] == 32
    assert data["seed"].tolist() == [0, 0]
    printed = TABLES["table_guided_k"].printed(PaperTable(data, "")).body
    assert [line[list(data).index("seed")] for line in printed] == ["0", "0"]


def test_cost_is_against_topk_of_the_same_size(folder: Path, tmp_path: Path) -> None:
    data = TABLES["table_training_cost"].draw(load_tables(folder), STRICT).data
    assert (data["against_topk"] == 1).all()  # the fabricated runs are equally fast
    assert data["hours_of_1e9"].iloc[0] == pytest.approx(1e9 / 40_000 / 3600)
    slower = tmp_path / "tables"
    shutil.copytree(folder, slower)
    steps = pd.read_csv(slower / "training.csv", dtype=str)
    topk = steps["entry"] == "topk"
    aligned = steps[topk].assign(entry="topk-aligned", tokens_per_s="20000")
    aligned["run"] = aligned["run"].str.replace("/topk/", "/topk-aligned/")
    fixed = steps[topk].assign(entry="random-decoder")
    fixed["run"] = fixed["run"].str.replace("/topk/", "/random-decoder/")
    pd.concat((steps, aligned, fixed)).to_csv(slower / "training.csv", index=False)
    data = TABLES["table_training_cost"].draw(load_tables(slower), STRICT).data
    # The median of as many runs with 20 000 tokens/s as with 40 000 is 30 000; the random decoder is no TopK.
    assert (data["against_topk"] == np.where(data["entry"] == "topk-aligned", 1.5, 0.75)).all()
    assert set(data["entry"]) == {"topk", "topk-aligned", "relu", "sparsemax", "random-decoder"}


def test_the_share_of_interpretable_latents_is_counted(folder: Path) -> None:
    data = TABLES["table_interpretability"].draw(load_tables(folder), STRICT).data
    assert (data["interpretable"] == 0.5).all()
    assert data["balanced_accuracy"].iloc[0] == pytest.approx((0.3 + 0.9) / 2)
    assert data["probe_k5"].iloc[0] == pytest.approx(0.7)


def test_absorption_is_the_mean_over_letters_with_its_warning(folder: Path) -> None:
    table = TABLES["table_absorption"].draw(load_tables(folder), STRICT)
    assert (table.data["absorption_fraction"] == 0.25).all()
    assert (table.data["letters"] == 21).all()
    assert "meaningless for models below about 1 B parameters" in table.caption


def test_tables_without_their_runs_are_refused(make_tables: Maker, tmp_path: Path) -> None:
    tables = make_tables(
        tmp_path, panels=[SYNTHETIC], entries=[("topk", "topk", 0.9, (8,))], seeds=1
    )
    for name, needs in (
        ("table_dictionary_size", "several d_sae"), ("table_ablation", "variant sparsemax"),
        ("table_guided_k", "mean_l0_of"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=needs):
            draw(name, tables, STRICT, tmp_path / name)
