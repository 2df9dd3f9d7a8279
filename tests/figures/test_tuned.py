"""Figures of tuned SAEs show the chosen trials, and every caption says how SAEs were tuned."""

import csv
from pathlib import Path

import pandas as pd
import pytest

from saeflow.errors import UserError
from saeflow.figures import draw
from saeflow.tables import compare
from saeflow.tables.load import load_tables
from saeflow.tables.runs import setting_words
from saeflow.tables.schema import columns_of
from saeflow.tables.sweeps import UNTUNED, of_chosen, sentence

from .conftest import SYNTHETIC, TEXT, Maker, sweep_line, write

OPTIONS = {"allow_unequal_budgets": False}
CHOSEN = {TEXT: 2, SYNTHETIC: 0}
"""The chosen trial of relu's four on each source."""


LINES = [
    sweep_line(panel, trial, is_chosen=int(trial == chosen))
    for panel, chosen in CHOSEN.items()
    for trial in range(4)
]


@pytest.fixture(scope="module")
def tuned(make_tables: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables whose four settings of relu are trials."""
    folder = make_tables(tmp_path_factory.mktemp("tuned"))
    for path in folder.glob("*.csv"):
        text = path.read_text()
        for trial, l1 in enumerate(("0.1", "0.5", "2", "8")):
            text = text.replace(f"d2304-l1{l1}-", f"d2304-trial{trial}-")
            text = text.replace(f"d2304-l1{l1},", f"d2304-trial{trial},")
        path.write_text(text)
    write(folder / "sweeps.csv", columns_of("sweeps"), LINES)
    return folder


def test_tables_of_figures_hold_the_chosen_trials_alone(tuned: Path) -> None:
    tables = load_tables(tuned)
    assert len(tables.sweeps) == 8
    for name in ("metrics", "training", "options", "intervals", "stability"):
        rows = getattr(tables, name)
        held = rows[rows["entry"] == "relu"]
        assert set(zip(held["source"], held["setting"], strict=True)) == {
            (panel[0], f"d2304-trial{trial}") for panel, trial in CHOSEN.items()
        }, name
        others = rows[rows["entry"] == "topk"]
        assert others["setting"].nunique() == 4
    assert {(row["source"], row["setting"]) for _, row in tables.rivals.iterrows() if row["entry"] == "relu"} == {
        (panel[0], f"d2304-trial{trial}") for panel, trial in CHOSEN.items()
    }  # fmt: skip


def test_a_figure_draws_the_chosen_trials_and_counts_the_others(
    tuned: Path, tmp_path: Path
) -> None:
    draw("fvu_l0", tuned, OPTIONS, tmp_path)
    data = pd.read_csv(tmp_path / "fvu_l0.csv")
    assert set(data.loc[data["entry"] == "relu", "setting"]) == {"d2304-trial0", "d2304-trial2"}
    said = (
        "Tuned: of 4 trials of each of 2 settings the one with the lowest FVU among those of mean L0 22 at "
        "most is shown, and 6 of 8 trials are left out."
    )
    caption = (tmp_path / "caption.md").read_text()
    assert said in caption
    assert caption.endswith("Untuned: 3 other entries of saes.\n")


def test_the_table_of_a_sweep_has_a_line_for_each_setting(tuned: Path, tmp_path: Path) -> None:
    draw("table_sweep", tuned, OPTIONS, tmp_path)
    table = pd.read_csv(tmp_path / "table_sweep.csv").set_index("source")
    assert table["setting"].tolist() == ["d2304", "d2304"]
    line = table.loc["smollm2"]
    assert (line["drawn"], line["trial"], line["trials"]) == ("l1 2", 2, 4)
    assert (line["fvu"], line["untuned_fvu"], line["difference"]) == pytest.approx(
        (0.22, 0.2, 0.02)
    )
    assert "that no trial was chosen on" in (tmp_path / "caption.md").read_text()


def test_a_table_of_a_sweep_without_trials_is_refused(tables: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="table_sweep needs the section sweep"):
        draw("table_sweep", tables, OPTIONS, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "name", ["headline", "table_headline", "fvu_l0", "complexity", "table_probes"]
)
def test_without_a_sweep_every_caption_says_untuned_once(
    name: str, tables: Path, tmp_path: Path
) -> None:
    draw(name, tables, OPTIONS, tmp_path)
    caption = (tmp_path / "caption.md").read_text()
    assert caption.endswith(f" {UNTUNED}\n")
    assert caption.lower().count("untuned") == 1


def test_the_values_that_trials_drew_divide_no_series(tuned: Path, tmp_path: Path) -> None:
    """The trials that are chosen at two k are points of one line, whatever their learning rates."""
    rows = []
    for path in (tuned / "metrics.csv", tuned / "options.csv"):
        with path.open() as file:
            rows.append(list(csv.DictReader(file)))
    names = {"d2304-k8-": "d2304-k8-trial1-", "d2304-k16-": "d2304-k16-trial3-"}
    for table in rows:
        for row in table:
            for old, new in names.items():
                if row["entry"] == "topk":
                    row["run"] = row["run"].replace(old, new)
    lr = [
        {**row, "option": "training.lr", "chosen": f"0.00{len(row['run'])}"}
        for row in rows[1]
        if row["option"] == "k"
    ]
    for path in tuned.glob("*.csv"):
        (tmp_path / path.name).write_text(path.read_text())
    write(tmp_path / "metrics.csv", list(rows[0][0]), rows[0])
    write(tmp_path / "options.csv", list(rows[1][0]), rows[1] + lr)
    write(tmp_path / "sweeps.csv", columns_of("sweeps"), [])
    wide = load_tables(tmp_path).wide
    held = wide[
        (wide["entry"] == "topk") & wide["setting"].str.contains("trial") & compare.is_sae(wide)
    ]
    assert held["setting"].nunique() == 2
    assert held["series"].nunique() == 1


def test_words_of_captions() -> None:
    assert sentence([], ["relu"]) == UNTUNED
    assert sentence([], []) == ""
    far = [
        sweep_line(TEXT, trial, is_chosen=int(trial == 2), is_within=0, selection_l0=40 + trial)
        for trial in range(4)
    ]
    assert (
        "No trial came down to this L0, and the nearest is shown: relu (smollm2, L0 42)."
        in sentence(far, ["topk"])
    )
    assert "Untuned" not in sentence(far, ["relu"])
    assert setting_words("d2304-k8-trial3") == "k = 8, trial = 3"


def test_rows_of_chosen_trials_alone_are_summarised() -> None:
    rows = [
        {"run": f"{panel[0]}/{panel[1]}/relu/d2304-trial{trial}-seed{seed}", "source": panel[0], "hook_point": panel[1], "entry": "relu"}
        for panel in CHOSEN for trial in range(4) for seed in (0, 1)
    ]  # fmt: skip
    other = [{**rows[0], "entry": "topk"}]
    kept = of_chosen(rows + other, LINES)
    assert [row["run"].rpartition("/")[2] for row in kept] == [
        "d2304-trial2-seed0", "d2304-trial2-seed1", "d2304-trial0-seed0", "d2304-trial0-seed1", "d2304-trial0-seed0",
    ]  # fmt: skip
    assert of_chosen(rows, []) == rows
