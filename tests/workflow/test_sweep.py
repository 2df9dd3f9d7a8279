"""The real workflow with tuned entries: from ranges to the chosen trial in figures and their captions."""

import copy
from typing import Any

import pandas as pd
import pytest

from .conftest import SYNTHETIC, Project

pytestmark = pytest.mark.workflow

STORE: dict[str, Any] = {"store": "synthetic/features", "d_sae": 64}
ENTRIES: dict[str, Any] = {
    "topk": {**STORE, "variant": "topk", "options": {"k": 6}, "lr": 1.0e-5, "ranges": {"lr": [1.0e-3, 3.0e-3]}},
    "relu": {**STORE, "variant": "relu", "options": {"l1": 0.5}, "ranges": {"lr": [1.0e-4, 3.0e-3], "l1": [0.1, 5]}},
    "batch-topk": {**STORE, "variant": "batch_topk", "options": {"k": 6}},
}  # fmt: skip


def parameters() -> dict[str, Any]:
    params = copy.deepcopy(SYNTHETIC)
    params["complexity"], params["training"]["tokens"] = {}, 12_800
    params["saes"] = copy.deepcopy(ENTRIES)
    params["sweep"] = {"trials": 2, "l0": 6}
    params["evaluation"]["pca_ranks"] = [8]
    params["figures"]["names"] = ["fvu_l0", "table_sweep"]
    params["runtime"] |= {"extraction_jobs": 1, "saes_per_job": 8}
    return params


def test_trials_are_trained_chosen_and_counted(tmp_path_factory: pytest.TempPathFactory) -> None:
    project = Project(tmp_path_factory.mktemp("sweep"), parameters())
    project.snakemake("all")
    results = project.folder / "results"
    sweeps = pd.read_csv(results / "tables/sweeps.csv")
    assert sweeps.groupby("entry")["trial"].apply(list).to_dict() == {
        "relu": [0, 1],
        "topk": [0, 1],
    }
    assert (sweeps.groupby("entry")["is_chosen"].sum() == 1).all()
    # a learning rate of 1e-5 (stated) against one of 1e-3 at least: the drawn one wins at equal L0
    topk = sweeps[sweeps["entry"] == "topk"].set_index("trial")
    assert topk["is_chosen"].to_dict() == {0: 0, 1: 1}
    assert topk.loc[1, "high"] < 0
    metrics = pd.read_csv(results / "tables/metrics.csv")
    whole = metrics[metrics["metric"] == "fvu"].set_index("run")["value"]
    for line in topk.to_dict("records"):  # the whole split lies between its two parts
        value = whole[f"synthetic/features/topk/{line['setting']}-seed0"]
        assert (
            min(line["fvu"], line["selection_fvu"])
            <= value
            <= max(line["fvu"], line["selection_fvu"])
        )
    left = sweeps[sweeps["is_chosen"] == 0]
    names = {
        f"synthetic/features/{e}/{s}-seed0"
        for e, s in zip(left["entry"], left["setting"], strict=True)
    }
    assert names <= set(whole.index)  # every trial is kept in the tables
    for path in ("figures/fvu_l0/fvu_l0.csv", "tables/summary.csv"):
        shown = pd.read_csv(results / path)
        settings = set(zip(shown["entry"], shown["setting"], strict=True))
        assert not settings & set(zip(left["entry"], left["setting"], strict=True)), path
        assert {"topk", "relu", "batch-topk"} <= set(shown["entry"]), path
    said = "Tuned: of 2 trials of each of 2 settings the one"
    for path in (
        "figures/fvu_l0/caption.md",
        "figures/table_sweep/caption.md",
        "tables/summary.md",
        "report.html",
    ):
        text = (results / path).read_text()
        assert said in text, path
        assert "2 of 4 trials are left out" in text, path
        assert "Untuned: 1 other entry of saes." in text, path
    table = pd.read_csv(results / "figures/table_sweep/table_sweep.csv")
    assert table["trials"].tolist() == [2, 2]
    assert project.todo() == {}
