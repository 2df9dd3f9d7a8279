"""Figures of k against scores: contexts in bins of their scores."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from saeflow.figures import FIGURES, style
from saeflow.tables.load import Tables, load_tables

from .conftest import SYNTHETIC, TEXT, Maker

STRICT = {"allow_unequal_budgets": False}


@pytest.fixture(scope="module")
def loaded(make_tables: Maker, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    folder: Path = make_tables(
        tmp_path_factory.mktemp("tables"),
        panels=[TEXT, SYNTHETIC],
        entries=[("soft-topk", "soft_topk", 1.0, (8, 32))],
        seeds=1,
    )
    return load_tables(folder)


def drawn(tables: Tables) -> pd.DataFrame:
    with style.context():
        return FIGURES["k_complexity"].draw(tables, STRICT).data


def test_bins_hold_equally_many_contexts_in_order_of_their_score(loaded: Tables) -> None:
    data = drawn(loaded)
    for run, bins in data.groupby("run"):
        assert bins["contexts"].tolist() == [5] * 8
        assert bins["score"].is_monotonic_increasing
        contexts = loaded.contexts[loaded.contexts["run"] == run].set_index("context")["l0"]
        scores = loaded.complexity
        source = str(run).split("/")[0]
        scores = scores[(scores["source"] == source) & (scores["split"] == "evaluation")]
        order = scores.sort_values("score")["context"].to_numpy()
        expected = contexts.loc[order].to_numpy().reshape(8, 5).mean(1) / contexts.mean()
        np.testing.assert_allclose(bins["l0_over_mean"], expected)


def test_scores_of_single_rows_are_averaged_over_their_context(loaded: Tables) -> None:
    """L0 is of whole contexts: compared with the scores of its rows, it would follow nothing."""
    scores = loaded.complexity
    by_row = pd.concat([scores.assign(score=scores["score"] + step) for step in (-4.0, 1.0, 3.0)])
    pd.testing.assert_frame_equal(drawn(replace(loaded, complexity=by_row)), drawn(loaded))
