"""Schedules show what the steps logged; complexity shows what the probes read."""

from pathlib import Path

import numpy as np
import pytest

from saeflow.errors import UserError
from saeflow.figures import FIGURES, load_tables, style

from .conftest import SYNTHETIC, TEXT, Maker

STRICT = {"allow_unequal_budgets": False}


def test_a_panel_for_each_quantity_that_moved(tables: Path) -> None:
    loaded = load_tables(tables)
    with style.context():
        drawing = FIGURES["schedules"].draw(loaded, STRICT)
    titles = [
        [ax.get_title(loc="left").replace("\n", " ") for ax in part.axes if ax.lines]
        for part in drawing.figure.subfigs[:-1]  # the legend's
    ]
    moved = ["k (or its budget)", "weight of the L1 (or Lₚ) penalty", "threshold in use"]
    assert titles == [moved, moved]
    assert {"k", "l1_weight", "threshold"} <= set(drawing.data.columns)
    assert "lr" not in drawing.data


def test_lines_are_the_logged_values(tables: Path) -> None:
    loaded = load_tables(tables)
    with style.context():
        figure = FIGURES["schedules"].draw(loaded, STRICT).figure
    panel = next(ax for ax in figure.subfigs[0].axes if "L1" in ax.get_title(loc="left"))
    steps = loaded.training
    one = steps[(steps["source"] == TEXT[0]) & (steps["variant"] == "relu") & (steps["seed"] == 0)]
    logged = {tuple(run["l1_weight"]) for _, run in one.groupby("run")}
    assert {tuple(np.asarray(line.get_ydata())) for line in panel.lines} == logged


def test_nothing_that_moves_is_an_error(make_tables: Maker, tmp_path: Path) -> None:
    folder = make_tables(tmp_path, panels=[TEXT], entries=[("topk", "topk", 1.0, (8,))], seeds=1)
    lines = (folder / "training.csv").read_text().splitlines()
    (folder / "training.csv").write_text("\n".join(lines[:2]) + "\n")
    with pytest.raises(UserError, match="Take schedules out"):
        FIGURES["schedules"].draw(load_tables(folder), STRICT)


def test_complexity_shows_held_out_contexts_with_the_tables_quality(tables: Path) -> None:
    loaded = load_tables(tables)
    with style.context():
        drawing = FIGURES["complexity"].draw(loaded, STRICT)
    assert set(drawing.data["split"]) == {"evaluation"}
    titles = [ax.get_title(loc="left") for ax in drawing.figure.axes if ax.lines]
    assert titles == [f"{TEXT[0]}\nlabels, block 19", f"{SYNTHETIC[0]}\nlabels"]
    points = drawing.figure.axes[0].lines[1]
    own = drawing.data[drawing.data["source"] == TEXT[0]]
    np.testing.assert_array_equal(points.get_xdata(), own["score"])
    np.testing.assert_array_equal(points.get_ydata(), own["predicted"])
    assert drawing.figure.axes[0].texts[0].get_text() == "RMSE 1.00\nR² 0.80\nPearson 0.90"


@pytest.mark.parametrize("count", [3, 25, 30])
def test_complexity_of_many_probes_fits_a_page_and_no_title_runs_into_another(
    count: int, make_tables: Maker, tmp_path: Path
) -> None:
    """A probe on each block of three models was three pages high, with the last titles of the lines cut off."""
    panels = [("pythia-160m-blocks", f"blocks.{block}.resid_post") for block in range(count)]
    loaded = load_tables(
        make_tables(tmp_path, panels=panels, entries=[("topk", "topk", 1.0, (8,))], seeds=1)
    )
    with style.context():
        figure = FIGURES["complexity"].draw(loaded, STRICT).figure
        figure.draw_without_rendering()
    width, height = figure.get_size_inches()
    assert width <= style.TEXT_WIDTH
    assert height <= style.PAGE_HEIGHT
    shown = [ax for ax in figure.axes if ax.lines]
    assert len(shown) == count
    titles = [ax._left_title.get_window_extent() for ax in shown]
    assert all(box.x1 <= figure.bbox.x1 for box in titles)
    assert not any(a.overlaps(b) for i, a in enumerate(titles) for b in titles[:i])
    assert all(ax.get_window_extent().width > 0.5 * figure.dpi for ax in shown)


def test_complexity_without_a_probe_is_an_error(make_tables: Maker, tmp_path: Path) -> None:
    folder = make_tables(tmp_path, panels=[TEXT], seeds=1)
    for name in ("complexity.csv", "probes.csv"):
        header = (folder / name).read_text().splitlines()[0]
        (folder / name).write_text(header + "\n")
    with pytest.raises(UserError, match="Take complexity out"):
        FIGURES["complexity"].draw(load_tables(folder), STRICT)
