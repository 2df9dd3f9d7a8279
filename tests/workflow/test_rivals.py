"""The real workflow with rivals at a found L0: from parameters to the report's first sentence."""

import copy
from typing import Any

import pandas as pd
import pytest

from .conftest import SYNTHETIC, Project

pytestmark = pytest.mark.workflow

SOFT: dict[str, Any] = {
    "variant": "soft_topk", "store": "synthetic/features", "d_sae": 64, "seed": [0, 1],
    "options": {"k": 6, "k_max": 24, "estimator_width": 16, "alpha": 0.1, "budget_weight": 10.0, "hard_fraction": 0.1},
}  # fmt: skip
FOUND = {"k": [{"mean_l0_of": "soft-topk/d64-seed0"}]}


def parameters() -> dict[str, Any]:
    params = copy.deepcopy(SYNTHETIC)
    params["sources"]["synthetic"]["l0_law"] = {"kind": "uniform", "smallest": 2, "largest": 10}
    params["complexity"] = {}
    params["training"]["tokens"] = 20_000
    rival = {"store": "synthetic/features", "d_sae": 64, "seed": [0, 1], "options": FOUND}
    params["saes"] = {
        "soft-topk": SOFT,
        "topk-guided": {**rival, "variant": "topk"},
        "batch-topk-guided": {**rival, "variant": "batch_topk"},
    }
    params["figures"]["names"] = ["headline", "table_headline", "controls"]
    params["runtime"] |= {"extraction_jobs": 1, "saes_per_job": 8}
    return params


def test_rivals_are_trained_at_the_found_l0_and_compared(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    project = Project(tmp_path_factory.mktemp("rivals"), parameters())
    project.snakemake("all")
    tables = project.folder / "results" / "tables"
    rivals = pd.read_csv(tables / "rivals.csv")
    metrics = pd.read_csv(tables / "metrics.csv").pivot(
        index="run", columns="metric", values="value"
    )
    for rival in ("topk", "batch_topk"):
        held = rivals[rivals["rival_variant"] == rival].set_index("metric")
        entry = rival.replace("_", "-") + "-guided"
        for metric in ("fvu", "nmse", "l0_mean"):
            own, other = (
                [
                    metrics.loc[run, metric]
                    for run in metrics.index
                    if f"/{name}/" in run and run.endswith(("seed0", "seed1"))
                ]
                for name in ("soft-topk", entry)
            )
            assert held.loc[metric, "difference"] == pytest.approx(
                sum(own) / 2 - sum(other) / 2, abs=1e-9
            )
        assert held.loc["l0_mean", "rival"] == pytest.approx(
            held.loc["l0_mean", "value"], rel=0.25
        )  # k is a whole number
        assert held.loc["fvu", "seeds"] == 2
    assert {"shuffled_k", "k_by_norm", "mean_k", "batch_threshold"} <= set(rivals["rival_variant"])
    page = (project.folder / "results" / "report.html").read_text()
    assert "Does the input decide k?" in page
    assert "Against TopK trained at the same L0" in page
    assert project.todo() == {}
