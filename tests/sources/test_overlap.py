"""Runs of tokens that stand in both splits, against a set of all of them."""

import numpy as np
import pytest

from saeflow.sources import overlap
from saeflow.sources.overlap import RUN, shared_runs


def by_sets(train: np.ndarray, evaluation: np.ndarray) -> float:
    """Independent reference: every run as a tuple."""
    known = {tuple(train[i : i + RUN].tolist()) for i in range(len(train) - RUN + 1)}
    runs = [tuple(evaluation[i : i + RUN].tolist()) for i in range(len(evaluation) - RUN + 1)]
    return sum(run in known for run in runs) / len(runs)


def runs(train: np.ndarray, length: int, evaluation: np.ndarray) -> float:
    return shared_runs(train.reshape(-1, length), evaluation.reshape(1, -1))


@pytest.mark.parametrize("at_once", [100, 1 << 22])
@pytest.mark.parametrize("copied", [0, 40, 900])
def test_the_share_is_that_of_all_runs(
    copied: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "_AT_ONCE", at_once)
    rng = np.random.default_rng(copied)
    train, evaluation = rng.integers(0, 50000, 3000), rng.integers(0, 50000, 1200)
    evaluation[100 : 100 + copied] = train[1500 : 1500 + copied]
    monkeypatch.setattr(overlap, "_SAMPLE", 1)
    length = 30  # of a context
    assert runs(train, length, evaluation) == by_sets(train, evaluation)
    monkeypatch.setattr(overlap, "_SAMPLE", 8)
    n, share = len(evaluation) / 8, by_sets(train, evaluation)
    assert abs(runs(train, length, evaluation) - share) < 4 * (0.25 / n) ** 0.5


def test_tokens_in_another_order_are_another_run() -> None:
    tokens = np.arange(RUN)
    for changed in (tokens[::-1], np.roll(tokens, 1), tokens + 1):
        assert by_sets(tokens, changed) == 0
        assert runs(tokens, RUN, changed) == 0


def test_too_few_tokens_for_a_run_share_none() -> None:
    few = np.arange(RUN - 1)
    assert runs(few, RUN - 1, few) == 0
