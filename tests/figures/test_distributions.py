"""Ridges show the tables' histograms."""

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.axes import Axes

from saeflow.errors import UserError
from saeflow.figures import FIGURES, Drawing, load_tables, style
from saeflow.figures.ridges import pool

from .conftest import SYNTHETIC, TEXT

STRICT = {"allow_unequal_budgets": False}


@pytest.fixture(scope="module")
def drawn(tables: Path) -> dict[str, Drawing]:
    loaded = load_tables(tables)
    with style.context():
        return {
            name: FIGURES[name].draw(loaded, STRICT) for name in ("l0_histograms", "firing_rates")
        }


def bins(tables: Path, histogram: str) -> list[dict[str, str]]:
    with (tables / "histograms.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["histogram"] == histogram]


def ridge(ax: Axes, label: str) -> tuple[list[float], list[float]]:
    """Outline of the ridge with a label: bin edges and heights above its base line."""
    bases = {
        text.get_text(): base
        for text, base in zip(ax.get_yticklabels(), ax.get_yticks(), strict=True)
    }
    base = bases[label]
    outline = next(
        line
        for line in ax.lines
        if len(line.get_xdata()) > 2 and line.get_ydata()[0] == pytest.approx(base)
    )
    return list(outline.get_xdata()), [y - base for y in outline.get_ydata()]


@pytest.mark.parametrize(
    ("figure", "name"), [("l0_histograms", "l0"), ("firing_rates", "log10_firing_rate")]
)
def test_data_are_the_bins_of_every_sae(
    figure: str, name: str, drawn: dict[str, Drawing], tables: Path
) -> None:
    expected = Counter(
        (row["run"], float(row["left"]), float(row["right"]), int(row["count"]))
        for row in bins(tables, name)
        if row["variant"] not in ("identity", "mean", "pca")
    )
    data = drawn[figure].data
    found = Counter(zip(data["run"], data["left"], data["right"], data["count"], strict=True))
    assert found == expected


def test_a_ridge_has_the_shape_of_the_pooled_counts(
    drawn: dict[str, Drawing], tables: Path
) -> None:
    pooled: Counter[float] = Counter()
    for row in bins(tables, "log10_firing_rate"):
        if row["run"].startswith("/".join(TEXT) + "/topk/d2304-k8-"):
            pooled[float(row["left"])] += int(row["count"])
    ax = drawn["firing_rates"].figure.axes[0]
    x, heights = ridge(ax, "TopK, k = 8")
    counts = [pooled[left] for left in sorted(pooled)]
    assert x[1:-1:2] == sorted(pooled)
    top = max(counts)
    assert [h / max(heights) for h in heights[1:-1:2]] == pytest.approx([c / top for c in counts])


def test_runs_with_bins_of_different_widths_are_pooled_into_the_widest() -> None:
    fine = [(float(left), left + 1.0, 1) for left in range(3, 9)]
    coarse = [(4.0, 6.0, 10), (6.0, 8.0, 20)]
    pooled = pool(pd.DataFrame([*fine, *coarse], columns=["left", "right", "count"]))
    assert pooled.to_dict() == {(2, 4): 1, (4, 6): 12, (6, 8): 22, (8, 10): 1}


def test_a_count_of_k_is_centred_on_k(drawn: dict[str, Drawing]) -> None:
    x, _ = ridge(drawn["l0_histograms"].figure.axes[0], "TopK, k = 8")
    assert (min(x), max(x)) == (7.5, 8.5)


def test_dead_and_dense_shares_and_the_ten_percent_mark(
    drawn: dict[str, Drawing], tables: Path
) -> None:
    ax = drawn["firing_rates"].figure.axes[0]
    with (tables / "metrics.csv").open() as file:
        dead = [
            float(row["value"])
            for row in csv.DictReader(file)
            if row["metric"] == "dead_fraction"
            and row["run"].startswith("/".join(TEXT) + "/topk/d2304-k8-")
        ]
    texts = [text.get_text() for text in ax.texts]
    assert {"dead", "dense", f"{100 * sum(dead) / 2:.1f} %"} <= set(texts)
    assert [-1.0, -1.0] in [list(line.get_xdata()) for line in ax.lines]


def test_the_true_l0_is_marked_on_synthetic_data_only(drawn: dict[str, Drawing]) -> None:
    text, synthetic = drawn["l0_histograms"].figure.axes[:2]
    assert synthetic.get_title(loc="left") == SYNTHETIC[0]
    for ax, marked in ((text, False), (synthetic, True)):
        assert ([20.0, 20.0] in [list(line.get_xdata()) for line in ax.lines]) is marked


def test_tables_without_a_histogram_are_an_error(tables: Path) -> None:
    loaded = load_tables(tables)
    loaded = replace(loaded, histograms=loaded.histograms[:0])
    with pytest.raises(UserError, match="l0_histograms needs SAEs with the histogram l0"):
        FIGURES["l0_histograms"].draw(loaded, STRICT)
