"""Contexts with runs of tokens that stand in both splits, against a set of all of them."""

import numpy as np
import pytest

from saeflow.sources import overlap
from saeflow.sources.overlap import shared_contexts


def by_sets(train: np.ndarray, evaluation: np.ndarray, run: int) -> list[bool]:
    """Independent reference: every run as a tuple."""
    flat = train.reshape(-1).tolist()
    known = {tuple(flat[i : i + run]) for i in range(len(flat) - run + 1)}
    return [
        any(tuple(one[i : i + run]) in known for i in range(len(one) - run + 1))
        for one in evaluation.tolist()
    ]


@pytest.mark.parametrize("at_once", [100, 1 << 22])
@pytest.mark.parametrize("run", [2, 13, 16, 30])
def test_shared_contexts_are_those_of_all_runs(
    run: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "_AT_ONCE", at_once)
    rng = np.random.default_rng(run)
    train, evaluation = rng.integers(0, 50000, (100, 30)), rng.integers(0, 50000, (40, 30))
    flat = train.reshape(-1)
    for number, length in enumerate((run - 1, run, 30, run, run - 1)):  # copied across contexts
        place = 300 * number + 30 - length // 2
        evaluation[7 * number, 30 - length :] = flat[place : place + length]
    expected = by_sets(train, evaluation, run)
    assert sum(expected) == 3
    assert shared_contexts(train, evaluation, run).tolist() == expected


def test_tokens_in_another_order_are_another_run() -> None:
    tokens = np.arange(13)[None]
    for changed in (tokens[:, ::-1], np.roll(tokens, 1, 1), tokens + 1):
        assert not shared_contexts(tokens, changed, 13).any()
    assert shared_contexts(tokens, tokens, 13).all()


def test_contexts_shorter_than_a_run_share_none() -> None:
    few = np.arange(12)[None]
    assert shared_contexts(few, few, 13).tolist() == [False]
    assert shared_contexts(few, few[:0], 13).tolist() == []
