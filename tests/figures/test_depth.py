"""The figure over depth shows every block's own numbers, and is refused where there is one block alone."""

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
import yaml

from saeflow.config import validate
from saeflow.errors import UserError
from saeflow.figures import FIGURES, load_tables, style
from saeflow.preflight import checked_plan

from ..config.test_parameters import MINIMAL
from .conftest import Maker

STRICT = {"allow_unequal_budgets": False}


def test_every_point_is_a_blocks_own_mean_over_seeds(make_tables: Maker, tmp_path: Path) -> None:
    panels = [("lm", f"blocks.{n}.resid_post") for n in (0, 2, 10)] + [("lm", "blocks.1.mlp_in")]
    entries = [("topk", "topk", 1.0, (8,)), ("relu", "relu", 1.2, None)]
    folder = make_tables(tmp_path, panels=panels, entries=entries, seeds=2)
    with style.context():
        drawing = FIGURES["depth"].draw(load_tables(folder), STRICT)
    with (folder / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    axes = drawing.figure.axes
    assert [ax.get_title(loc="left") for ax in axes if ax.get_title(loc="left")] == ["lm, mlp_in", "lm, resid_post"]  # fmt: skip
    for name, metric in (("FVU", "fvu"), ("rise", "ce_degradation")):
        ax = axes[len(axes) // 2 + ("fvu", "ce_degradation").index(metric)]
        drawn = {tuple(line.get_xdata()): list(line.get_ydata()) for line in ax.lines if len(line.get_xdata()) == 3}  # fmt: skip
        assert set(drawn) == {(0, 2, 10)}, name
        for block, value in zip((0, 2, 10), _of(ax, "topk"), strict=True):
            own = [
                float(line["value"])
                for line in lines
                if (line["hook_point"], line["entry"], line["metric"]) == (f"blocks.{block}.resid_post", "topk", metric)
            ]  # fmt: skip
            assert value == pytest.approx(sum(own) / len(own))
    assert set(drawing.data["block"]) == {0, 1, 2, 10}


def _of(ax: Any, variant: str) -> list[float]:
    color = style.look(variant, variant).color
    line = next(line for line in ax.lines if line.get_color() == color and len(line.get_xdata()) == 3)  # fmt: skip
    return list(line.get_ydata())


def test_one_block_alone_has_no_depth() -> None:
    params = copy.deepcopy(yaml.safe_load(MINIMAL))
    params["figures"] = {"names": ["depth"], "allow_unequal_budgets": False}
    with pytest.raises(UserError, match=r"depth needs SAEs at two or more blocks of a model"):
        checked_plan(validate(params))
    params["sources"]["gpt2"]["hook_points"] = ["blocks.7-8.resid_pre"]
    for entry in params["saes"].values():
        entry["store"] = "gpt2/blocks.7-8.resid_pre"
    assert len(checked_plan(validate(params)).stores) == 2
