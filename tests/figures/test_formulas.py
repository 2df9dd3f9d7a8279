"""The figure of formulas shows each one's own number."""

import re
from pathlib import Path

import pandas as pd
import pytest

from saeflow.errors import UserError
from saeflow.figures import FIGURES, load_tables, style

from .conftest import TEXT, Maker

STRICT = {"allow_unequal_budgets": False}


def test_points_are_the_differences_of_the_tables(make_tables: Maker, tmp_path: Path) -> None:
    path = make_tables(tmp_path, panels=[TEXT])
    metrics = pd.read_csv(path / "metrics.csv")
    fvu = metrics[metrics["metric"] == "fvu"]
    legacy = fvu.assign(metric="ev_legacy_saelens", value=1 - fvu["value"] - 0.125)
    pd.concat([metrics, legacy]).to_csv(path / "metrics.csv", index=False)
    with style.context():
        drawing = FIGURES["ev_formulas"].draw(load_tables(path), STRICT)
    by_label = {}
    for line in drawing.figure.axes[0].lines:
        by_label[line.get_marker()] = line.get_ydata()
    assert by_label["^"] == pytest.approx(-0.125, abs=1e-9)
    expected = drawing.data["uncentred"] - drawing.data["explained_variance"]
    assert sorted(by_label["o"]) == pytest.approx(sorted(expected))
    assert set(drawing.data["run"]) <= set(fvu["run"])
    said = float(re.search(r"difference, ([\d.]+),", drawing.caption)[1])
    largest = max(0.125, expected.abs().max())
    assert said == pytest.approx(largest, rel=5e-3)


def test_without_saes_it_says_what_to_change(make_tables: Maker, tmp_path: Path) -> None:
    path = make_tables(tmp_path, panels=[TEXT])
    metrics = pd.read_csv(path / "metrics.csv")
    metrics[metrics["variant"].isin(["pca", "mean"])].to_csv(path / "metrics.csv", index=False)
    with pytest.raises(UserError, match="ev_formulas needs evaluated SAEs"):
        FIGURES["ev_formulas"].draw(load_tables(path), STRICT)
