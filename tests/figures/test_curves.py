"""Training curves show what the steps logged."""

import csv
import dataclasses
from pathlib import Path

import pandas as pd
import pytest

from saeflow.errors import UserError
from saeflow.figures import FIGURES, captions, load_tables, style
from saeflow.figures.plots.training import loss_terms
from saeflow.figures.report.shown import _scheduled
from saeflow.tables import verdict

from .conftest import TEXT, Maker

STRICT = {"allow_unequal_budgets": False}


@pytest.fixture
def folder(make_tables: Maker, tmp_path: Path) -> Path:
    entries = [
        ("topk", "topk", 1.0, (8, 32)), ("batch-topk", "batch_topk", 1.0, (8,)), ("relu", "relu", 1.0, None),
    ]  # fmt: skip
    return make_tables(tmp_path, panels=[TEXT], entries=entries, seeds=2)


def test_data_are_the_logged_steps(folder: Path) -> None:
    with style.context():
        data = FIGURES["training"].draw(load_tables(folder), STRICT).data
    with (folder / "training.csv").open() as file:
        logged = list(csv.DictReader(file))
    assert len(data) == len(logged)
    for column in ("reconstruction", "l0", "dead", "tokens_seen", "auxk", "l1", "k"):
        expected = [float(row[column]) if row[column] else None for row in logged]
        assert [None if pd.isna(value) else value for value in data[column]] == expected


def test_learning_curves_end_in_the_held_out_error(folder: Path) -> None:
    tables = load_tables(folder)
    with style.context():
        drawing = FIGURES["learning"].draw(tables, STRICT)
    data = drawing.data.set_index("run")
    wide, steps = tables.wide.set_index("run"), tables.training
    for run, line in data.iterrows():
        own = steps[steps["run"] == run]
        last = own[own["tokens_seen"] > 0.9 * own["tokens_seen"].max()]
        assert line["train_fvu"] == pytest.approx(last["batch_fvu"].mean())
        assert line["held_out_fvu"] == wide.loc[run, "fvu"]
        assert line["epochs"] == pytest.approx(line["tokens"] / 200_000)
    assert len(data) == steps["run"].nunique()
    (ax,) = drawing.figure.axes
    curves = [line for line in ax.lines if len(line.get_xdata()) > 2]
    ends = [line for line in ax.lines if len(line.get_xdata()) == 1]
    epochs = [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 2]
    assert len(curves) == len(ends) == data.groupby(["entry", "k"], dropna=False).ngroups + 3
    assert epochs == [200_000, 400_000]
    assert "200,000 unique rows, 2.46 epochs" in drawing.caption


def test_an_sae_of_last_rows_has_epochs_of_its_own(folder: Path) -> None:
    """As of AdaptiveK per context, which trains on a row of each context: 1000 of 200 000 here."""
    file = folder / "metrics.csv"
    metrics = pd.read_csv(file)
    of_last = (metrics["metric"] == "train_rows") & (metrics["entry"] == "relu")
    assert of_last.any()
    metrics.loc[of_last, "value"] = 1000
    metrics.to_csv(file, index=False)
    with style.context():
        drawing = FIGURES["learning"].draw(load_tables(folder), STRICT)
    data = drawing.data.set_index("entry")
    assert (data.loc["relu", "epochs"] == data.loc["relu", "tokens"] / 1000).all()
    assert data.drop("relu")["epochs"].max() == pytest.approx(2.46, abs=0.01)
    lines = [line.get_xdata() for line in drawing.figure.axes[0].lines]
    assert [x[0] for x in lines if len(x) == 2] == [200_000, 400_000]
    said = "200,000 unique rows (1,000 of relu, trained on each context's last row), 2.46 to 492 epochs"
    assert said in drawing.caption


def test_a_ranking_below_the_noise_is_named(folder: Path) -> None:
    tables = load_tables(folder)
    judged = verdict.judged(tables, ["fvu"])
    judged = judged[judged["rival_variant"].isin(["topk", "batch_topk"])]
    equal = (~judged["verdict"].isin([verdict.BETTER, verdict.WORSE])).sum()
    assert 0 < equal < len(judged)
    said = verdict.unranked_sentence(tables, "fvu")
    assert said.startswith(f"{equal} of {len(judged)} comparisons")
    with style.context():
        assert said in FIGURES["fvu_l0"].draw(tables, STRICT).caption
    nothing = dataclasses.replace(tables, rivals=tables.rivals[:0])
    assert verdict.unranked_sentence(nothing, "fvu") == ""


def test_loss_terms_are_what_sums_to_the_loss(folder: Path) -> None:
    steps = load_tables(folder).training
    assert {"l1_weight", "threshold", "k"} <= set(steps.columns)
    assert loss_terms(steps) == ["auxk", "l1"]


def test_a_logged_number_that_is_no_loss_term_is_not_drawn_as_one() -> None:
    steps = pd.DataFrame(
        {
            "run": "r", "entry": "e", "variant": "v", "loss": [10.0, 5.5], "reconstruction": [9.0, 5.0],
            "temperature": [2.0, 1.0], "orthogonality": [0.5, 0.25], "penalty": [0.5, 0.25],
        }
    )  # fmt: skip
    assert loss_terms(steps) == ["orthogonality", "penalty"]


def test_the_schedule_lies_under_the_active_latents(folder: Path) -> None:
    loaded = load_tables(folder)
    with style.context():
        (page,) = FIGURES["training"].draw(loaded, STRICT).details
    axes = page.axes
    panel = next(ax for ax in axes if ax.get_title(loc="left") == "active latents (L0)")
    row = axes[axes.index(panel) + 5]  # the second series: TopK, below ReLU
    schedules = [line for line in row.lines if line.get_linewidth() == 3.0]
    run = loaded.training[loaded.training["run"].str.endswith("topk/d2304-k8-seed0")]
    topk = run[run["entry"] == "topk"]
    assert list(schedules[0].get_ydata()) == list(topk["k"])
    assert list(schedules[0].get_xdata()) == list(topk["tokens_seen"])


def test_one_logged_step_is_a_point(folder: Path) -> None:
    loaded = load_tables(folder)
    first = loaded.training.groupby("run").head(1)
    for steps, marker in ((first, "."), (loaded.training, "None")):
        with style.context():
            drawing = FIGURES["training"].draw(dataclasses.replace(loaded, training=steps), STRICT)
        thin = [line for ax in drawing.figure.axes for line in ax.lines if len(line.get_xdata())]
        assert {line.get_marker() or "None" for line in thin} == {marker}


def test_the_report_shows_the_setting_that_moves() -> None:
    steps = pd.DataFrame(
        {"run": ["a", "a", "b", "b"], "k": [16, 16, 32, 32], "temperature": [0.3, 0.1, 0.3, 0.1]}
    )
    assert _scheduled(steps) == "temperature"
    assert _scheduled(steps.assign(k=[16, 8, 32, 16])) == "k"
    assert _scheduled(steps.assign(temperature=0.1)) == "k"


def test_no_logged_step_is_an_error(folder: Path) -> None:
    text = (folder / "training.csv").read_text().splitlines()[0]
    (folder / "training.csv").write_text(text + "\n")
    with pytest.raises(UserError, match="Take training out"):
        FIGURES["training"].draw(load_tables(folder), STRICT)


def test_the_caption_says_the_units_of_losses() -> None:
    rows = pd.DataFrame({"run": ["a", "b", "c"], "entry": ["topk", "relu", "sparsemax"]})
    options = pd.DataFrame(
        {
            "run": ["a", "b", "c", "c"],
            "option": [*["training.input_scale"] * 3, "score_scale"],
            "chosen": ["unit", "unit", "raw", "1"],
        }
    )
    alike = captions.scale_sentence(rows[:2], options)
    assert alike == "Losses are of activations divided so that their mean squared norm is 1."
    mixed = captions.scale_sentence(rows, options)
    assert "cannot be compared" in mixed
    assert "as they are (sparsemax)" in mixed
    assert "mean squared norm is 1 (relu and topk)" in mixed
