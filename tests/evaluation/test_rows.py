"""Selection of the measured rows, and their mean."""

from typing import Any

import numpy as np
import pytest

from saeflow.errors import UserError
from saeflow.evaluation.rows import EvaluatedRows, RowSelection

X = np.array([[30.0, 40.0], [3.0, 4.0], [0.0, 1.0], [6.0, 8.0], [0.0, 2.0]])  # norms 50 5 1 10 2
POSITIONS = np.array([0, 1, 2, 0, 1], dtype=np.int32)


def chosen(store: Any, selection: RowSelection, batch_size: int) -> list[int]:
    picked = EvaluatedRows(store, selection, batch_size, "cpu")
    found = [(batch.numbers, batch.x) for batch in picked]
    for rows, x in found:
        np.testing.assert_array_equal(x.numpy(), X[rows])
    return np.concatenate([rows for rows, _ in found]).tolist() if found else []


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize(
    ("skip_first", "norm_limit", "expected"),
    [
        (False, None, [0, 1, 2, 3, 4]),
        (True, None, [1, 2, 4]),
        (False, 10.0, [1, 2, 3, 4]),  # a norm at the limit stays
        (True, 4.0, [2, 4]),
        (True, 0.5, []),
    ],
)
def test_rows_follow_the_policy(
    memory_store: Any,
    batch_size: int,
    skip_first: bool,
    norm_limit: float | None,
    expected: list[int],
) -> None:
    selection = RowSelection(positions="rest" if skip_first else "all", norm_limit=norm_limit)
    assert chosen(memory_store(X, position=POSITIONS), selection, batch_size) == expected


def test_statistics_are_of_the_rows_that_are_kept(memory_store: Any) -> None:
    selection = RowSelection(positions="rest", norm_limit=None)
    got = EvaluatedRows(memory_store(X, position=POSITIONS), selection, 2, "cpu").statistics
    np.testing.assert_allclose(got.mean, X[[1, 2, 4]].mean(0), rtol=1e-15)
    assert (got.rows, got.excluded) == (3, 2)
    assert got.excluded_fraction == 0.4


def test_the_mean_of_equal_rows_is_the_row_itself(memory_store: Any) -> None:
    row = np.float32([0.1, 1e7, -3.3])
    store = memory_store(np.tile(row, (999, 1)))
    everything = RowSelection(positions="all", norm_limit=None)
    got = EvaluatedRows(store, everything, 100, "cpu").statistics
    assert (got.mean.numpy() == row.astype(np.float64)).all()


def test_no_row_left_is_refused(memory_store: Any) -> None:
    selection = RowSelection(positions="rest", norm_limit=0.5)
    with pytest.raises(UserError, match="none of its 5 rows is left"):
        _ = EvaluatedRows(memory_store(X, position=POSITIONS), selection, 2, "cpu").statistics
