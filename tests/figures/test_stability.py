"""The figure of seeds that are compared."""

from pathlib import Path

import pytest

from saeflow.errors import UserError
from saeflow.figures import FIGURES, load_tables, style

from .conftest import TEXT, Maker

STRICT = {"allow_unequal_budgets": False}


def test_every_setting_with_two_seeds_has_a_line(tables: Path) -> None:
    loaded = load_tables(tables)
    with style.context():
        drawing = FIGURES["stability"].draw(loaded, STRICT)
    labels = [text.get_text() for ax in drawing.figure.axes for text in ax.get_yticklabels()]
    settings = loaded.stability[["source", "entry", "setting"]].drop_duplicates()
    assert len(labels) == len(settings) == 2 * 4 * 4
    assert labels[:2] == ["ReLU, l1 = 0.1", "ReLU, l1 = 0.5"]
    points = [x for ax in drawing.figure.axes for line in ax.lines for x in line.get_xdata()]
    assert sorted(points) == pytest.approx(sorted(drawing.data["value"]))


def test_one_seed_is_refused(make_tables: Maker, tmp_path: Path) -> None:
    entries = [("topk", "topk", 1.0, (8,))]
    loaded = load_tables(make_tables(tmp_path, panels=[TEXT], entries=entries, seeds=1))
    with pytest.raises(UserError, match="stability needs a setting with two seeds"):
        FIGURES["stability"].draw(loaded, STRICT)


def test_settings_of_several_sizes_can_be_told_apart(make_tables: Maker, tmp_path: Path) -> None:
    entries = [("topk", "topk", 1.0, (8,)), ("relu", "relu", 1.2, None)]
    sizes = {"panels": [TEXT], "entries": entries, "seeds": 2, "sizes": (1152, 2304)}
    loaded = load_tables(make_tables(tmp_path, **sizes))
    with style.context():
        (ax,) = FIGURES["stability"].draw(loaded, STRICT).figure.axes
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert len(set(labels)) == len(labels)
    assert "TopK, 2,304 latents, k = 8" in labels
