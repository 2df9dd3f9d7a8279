"""Tables: long rows, what is gathered from them, and that bytes depend on the numbers only."""

import csv
import io
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from saeflow.errors import UserError
from saeflow.tables.collect import collect
from saeflow.tables.evaluations import Evaluation, write_evaluation
from saeflow.tables.numbers import natural, number
from saeflow.tables.render import (
    classification_latex,
    classification_markdown,
    escape_latex,
    summary_latex,
)
from saeflow.tables.runs import describe_schedule, identify
from saeflow.tables.schema import columns_of


def config(entry: str, k: int | None, seed: int, **changes: Any) -> dict[str, Any]:
    label = f"d64-k{k}" if k else "d64-l10.5"
    return {
        "name": f"text/blocks.1.resid_post/{entry}/{label}-seed{seed}", "source": "text",
        "hook_point": "blocks.1.resid_post", "entry": entry, "variant": "topk", "d_sae": 64,
        "seed": seed, "options": {"k": k} if k else {"l1": 0.5}, "training": {"tokens": 1000},
        "d_in": 8, **changes,
    }  # fmt: skip


POLICY = {
    "rows": 1000.0, "excluded_rows_fraction": 0.125, "first_position_excluded": 1.0,
    "max_norm_multiple": 10.0, "ce_tokens": 508.0, "ce_first_position_kept": 1.0,
    "ce_contexts": 4.0, "ce_share": 0.25, "ce_uniform": 10.8, "ce_zero": 9.0,
}  # fmt: skip


def write_run(root: Path, values: dict[str, Any], metrics: dict[str, float]) -> tuple[Path, Path]:
    """Folders of an evaluation and of its SAE."""
    folders = root / "evaluations" / values["name"], root / "saes" / values["name"]
    for folder in folders:
        folder.mkdir(parents=True)
    bins = {"l0": [(8.0, 9.0, 1000)]}
    write_evaluation(
        folders[0], [(identify(values), Evaluation(values["source"], POLICY | metrics, bins))]
    )
    (folders[1] / "config.json").write_text(json.dumps(values))
    (folders[1] / "steps.csv").write_text("step,tokens_seen,loss,k\n0,10,3.5,64\n9,100,1.25,8\n")
    return folders


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


@pytest.fixture
def runs(tmp_path: Path) -> list[tuple[Path, Path]]:
    """Three seeds of one setting, another k, and a baseline."""
    made = [
        write_run(tmp_path, config("topk", 8, seed), {"fvu": fvu, "l0_mean": 8.0})
        for seed, fvu in [(0, 0.1), (1, 0.2), (2, 0.4)]
    ]
    made.append(write_run(tmp_path, config("topk", 32, 0), {"fvu": 0.05, "l0_mean": 31.5}))
    baseline = config("pca", 8, 0, variant="pca", name="text/blocks.1.resid_post/pca/k8")
    made.append(write_run(tmp_path, baseline, {"fvu": 0.6, "l0_mean": 8.0}))
    return made


def gather(runs: list[tuple[Path, Path]], folder: Path) -> Path:
    folder.mkdir()
    collect([run[0] for run in runs], [run[1] for run in runs[:4]], [], folder)
    return folder


def test_long_table_has_the_ids_of_each_run(runs: list[tuple[Path, Path]], tmp_path: Path) -> None:
    rows = rows_of(gather(runs, tmp_path / "tables") / "metrics.csv")
    assert list(rows[0]) == columns_of("metrics")
    fvu = {row["run"]: row for row in rows if row["metric"] == "fvu"}
    row = fvu["text/blocks.1.resid_post/topk/d64-k8-seed1"]
    assert (row["entry"], row["k"], row["seed"], row["tokens"]) == ("topk", "8", "1", "1000")
    assert row["schedule"] == "constant"
    assert float(row["value"]) == 0.2
    assert len(fvu) == 5


def test_order_of_the_arguments_changes_no_byte(
    runs: list[tuple[Path, Path]], tmp_path: Path
) -> None:
    one, two = gather(runs, tmp_path / "one"), tmp_path / "two"
    two.mkdir()
    collect([run[0] for run in runs[::-1]], [run[1] for run in runs[3::-1]], [], two)
    names = sorted(path.name for path in one.iterdir() if path.is_file())
    assert names == [
        "absorption.csv", "classification.csv", "classification.md", "classification.tex", "complexity.csv", "contexts.csv", "controls.csv", "detection.csv", "dimension.csv", "dimension_agreement.csv", "dimension_bins.csv", "dimension_control.csv",
        "histograms.csv", "intervals.csv",
        "metrics.csv", "metrics.json", "options.csv", "probes.csv", "probing.csv", "rivals.csv", "stability.csv", "summary.csv", "summary.md", "summary.tex", "sweeps.csv", "training.csv", "unmeasured.csv",
    ]  # fmt: skip
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_summary_is_the_mean_and_deviation_over_seeds(
    runs: list[tuple[Path, Path]], tmp_path: Path
) -> None:
    lines = rows_of(gather(runs, tmp_path / "tables") / "summary.csv")
    assert [(line["entry"], line["k"], line["seeds"]) for line in lines] == [
        ("topk", "8", "3"), ("topk", "32", "1"), ("pca", "8", "1"),
    ]  # fmt: skip
    assert float(lines[0]["fvu_mean"]) == pytest.approx(statistics.mean([0.1, 0.2, 0.4]))
    assert float(lines[0]["fvu_sd"]) == pytest.approx(statistics.stdev([0.1, 0.2, 0.4]))
    assert lines[1]["fvu_sd"] == ""
    assert lines[0]["kl_mean"] == ""
    assert lines[0]["rows"] == "1000"


def test_settings_that_differ_in_an_option_are_not_taken_for_seeds(tmp_path: Path) -> None:
    first = config("relu", None, 0)
    second = config("relu", None, 0, name=first["name"].replace("l10.5", "l10.9"))
    made = [write_run(tmp_path, values, {"fvu": 0.1}) for values in (first, second)]
    folder = tmp_path / "tables"
    folder.mkdir()
    collect([run[0] for run in made], [], [], folder)
    assert [line["setting"] for line in rows_of(folder / "summary.csv")] == [
        "d64-l10.5", "d64-l10.9",
    ]  # fmt: skip


def test_printed_tables_state_the_row_policy(runs: list[tuple[Path, Path]], tmp_path: Path) -> None:
    folder = gather(runs, tmp_path / "tables")
    for name in ("summary.md", "summary.tex"):
        text = (folder / name).read_text()
        assert "Rows: 1000, first positions left out, rows above 10 x the median" in text
        assert "(12.5" in text
        assert "keeping the activation of each first position" in text
    assert (
        "| topk | k = 8 | constant | 3 | 8.00 ± 0.00 | 0.233 ± 0.153 |"
        in (folder / "summary.md").read_text()
    )


@pytest.mark.parametrize(("clean", "is_told"), [(10.7, False), (10.8, True)])
def test_a_model_no_better_than_a_uniform_guess_is_told_under_the_table(
    clean: float, is_told: bool, tmp_path: Path
) -> None:
    made = [write_run(tmp_path, config("topk", 8, 0), {"fvu": 0.1, "ce_clean": clean})]
    text = (gather(made, tmp_path / "tables") / "summary.md").read_text()
    assert (
        "own loss is no less than that of a uniform guess (10.8 against 10.8" in text
    ) == is_told


def test_latex_is_balanced_and_escaped(runs: list[tuple[Path, Path]], tmp_path: Path) -> None:
    text = (gather(runs, tmp_path / "tables") / "summary.tex").read_text()
    assert r"blocks.1.resid\_post" in text
    assert not re.search(r"(?<!\\)[_%#]", text)
    columns = text.split(r"\begin{tabular}{")[1].split("}")[0]
    for row in re.findall(r"^(.*) \\\\$", text, re.MULTILINE):
        assert len(re.split(r"(?<!\\)&", row)) == len(columns)
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 1
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 2, 1]


def test_every_special_character_of_latex_is_escaped() -> None:
    assert escape_latex("a_b&50%{#}$~^\\") == (
        r"a\_b\&50\%\{\#\}\$\textasciitilde{}\textasciicircum{}\textbackslash{}"
    )
    assert summary_latex([]) == ""


def test_metrics_json_is_nested_for_dvc(runs: list[tuple[Path, Path]], tmp_path: Path) -> None:
    held = json.loads((gather(runs, tmp_path / "tables") / "metrics.json").read_text())
    assert held["text/blocks.1.resid_post/topk/d64-k32-seed0"]["fvu"] == 0.05


def test_training_table_holds_every_logged_step(
    runs: list[tuple[Path, Path]], tmp_path: Path
) -> None:
    table = pd.read_csv(gather(runs, tmp_path / "tables") / "training.csv")
    assert len(table) == 8
    last = table[(table.k_target == 32) & (table.step == 9)].iloc[0]
    assert (last.loss, last.k, last.tokens_seen, last.entry) == (1.25, 8, 100, "topk")


def test_a_run_that_is_there_twice_is_refused(
    runs: list[tuple[Path, Path]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is in another evaluation too"):
        gather([*runs, runs[0]], tmp_path / "tables")


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        collect([tmp_path / "nothing"], [], [], tmp_path)


def test_numbers_survive_and_have_one_form() -> None:
    assert [number(v) for v in (3, 3.0, 0.1, 1 / 3, -0.0, None, "x")] == [
        "3", "3", "0.1", "0.333333333333", "0", "", "x",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="finite"):
        number(float("nan"))


def test_natural_order_reads_numbers() -> None:
    assert sorted(["k32", "k8", "k8.5", "a", "k"], key=natural) == ["a", "k", "k8", "k8.5", "k32"]


def test_schedules_are_told_apart() -> None:
    assert describe_schedule({"k": 8}) == "constant"
    assert describe_schedule({"k": 8, "k_schedule": {"kind": "constant"}}) == "constant"
    linear = {"kind": "linear", "from": 576, "until": 0.01}
    assert describe_schedule({"k": 8, "k_schedule": linear}) == "linear 576 until 0.01"
    step = {"kind": "step", "from": 64, "until": 0.5, "steps": 4}
    assert describe_schedule({"l1_schedule": step}) == "step 64 until 0.5 in 4 steps"


def test_gathering_tables_loads_no_torch() -> None:
    code = "import sys, saeflow.tables.collect; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_accuracies_are_one_table_a_protocol() -> None:
    shared = {
        "source": "scenes", "hook_point": "vision.blocks.2.resid_post", "set": "a_b", "classes": "4",
        "images": "40", "clean_accuracy": "0.9", "entry": "topk", "variant": "topk",
    }  # fmt: skip
    rows = []
    for seed in (0, 1):
        run = shared | {"run": f"scenes/vision.blocks.2.resid_post/topk/d8-k2-seed{seed}"}
        whole = {"protocol": "all", "labels": "true", "concepts": "on", "n": "all"}
        rows.append(run | whole | {"accuracy": "0.75"})
        for n in (1, 5, 10, 50):
            for protocol in ("leak_free", "paper"):
                for labels, concepts in (("true", "on"), ("true", "off"), ("permuted", "on")):
                    known = {
                        "protocol": protocol,
                        "labels": labels,
                        "concepts": concepts,
                        "n": str(n),
                    }
                    accuracy = n / 100 + seed / 50 + (protocol == "paper") / 4
                    rows.append(
                        run | known | {"accuracy": "9" if labels == "permuted" else str(accuracy)}
                    )
    table = classification_markdown(rows)
    assert (
        "## scenes, vision.blocks.2.resid_post, a_b, leak-free protocol: 40 images of 4 classes"
        in table
    )
    assert "| topk | d8-k2 | 0.020 | 0.060 | 0.110 | 0.510 | 0.750 | 0.020 |" in table
    assert "| topk | d8-k2 | 0.270 | 0.310 | 0.360 | 0.760 | 0.750 | 0.270 |" in table
    latex = classification_latex(rows)
    assert latex.count(r"\begin{tabular}{llrrrrrrrrr}") == latex.count(r"\end{tabular}") == 2
    assert r"a\_b" in latex
