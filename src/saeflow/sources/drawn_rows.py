"""Rows that are drawn from a known dictionary: what the synthetic kinds share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from saeflow.errors import UserError
from saeflow.files import read_json
from saeflow.sources.base import Block, Column, Inputs

HOOK_POINT = "features"
ROWS_PER_CONTEXT = 128
"""Rows that are drawn together: a context, each with a generator of its own."""
DICTIONARY, STRUCTURE = "dictionary.safetensors", "structure.json"
SPLITS = {"train": 0, "evaluation": 1}
"""Streams of random numbers."""
STRUCTURE_STREAM = 2


def check_hook_points(where: str, params: Mapping[str, Any]) -> None:
    """Refuse hook points that such a source has not.

    Raises:
        UserError: expected HOOK_POINT alone.
    """
    if list(params["hook_points"]) != [HOOK_POINT]:
        raise UserError(
            f"{where}.hook_points: expected [{HOOK_POINT}], found {params['hook_points']}."
        )


def places(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the context and the position in it of every row of some contexts (n,): (n ROWS_PER_CONTEXT,) each."""
    return (
        np.repeat(np.asarray(numbers, dtype=np.int64), ROWS_PER_CONTEXT),
        np.tile(np.arange(ROWS_PER_CONTEXT, dtype=np.int32), len(numbers)),
    )


def sums(counts: np.ndarray, columns: np.ndarray, values: np.ndarray, rows: np.ndarray) -> Any:
    """Sum rows by sparse weights, row by row in the order of the columns: the same on every machine.

    Args:
        counts: (n,) weights of each row of the result.
        columns: (counts.sum(),) rows of `rows`, ascending for each row of the result.
        values: (counts.sum(),) weights.
        rows: (m, d).

    Returns:
        (n, d).
    """
    from scipy.sparse import csr_array

    ends = np.concatenate([[0], np.cumsum(counts)])
    return csr_array((values, columns, ends), shape=(len(counts), len(rows))) @ rows


class DrawnRows(ABC):
    """Samples in contexts of ROWS_PER_CONTEXT rows.

    Args:
        d_in: width.
        contexts: their number in each split.
        columns: what is stored with a row, besides its context and position.
    """

    def __init__(
        self, d_in: int, contexts: Mapping[str, int], columns: Mapping[str, Column]
    ) -> None:
        self._contexts = contexts
        self.hook_points = [HOOK_POINT]
        self.d_in = {HOOK_POINT: d_in}
        self.rows_per_context = ROWS_PER_CONTEXT
        self.columns: dict[str, Column] = {
            "context": (np.dtype(np.int64), ()),
            "position": (np.dtype(np.int32), ()),
            **columns,
        }

    def n_contexts(self, split: str) -> int:
        """Number of contexts of a split."""
        return self._contexts[split]

    def block(self, split: str, start: int, stop: int) -> Block:
        """Samples of contexts [start, stop), the same bits however contexts are divided into blocks.

        `true_indices` are the active features in increasing order, padded with -1; `true_values`, where the source has
        them, their coefficients, padded with 0.
        """
        import torch

        drawn = [self.context(split, number) for number in range(start, stop)]
        context, position = places(np.arange(start, stop))
        columns = {"context": context, "position": position}
        for name in drawn[0][1]:
            columns[name] = np.concatenate([own[name] for _, own in drawn])
        x = np.concatenate([x for x, _ in drawn])
        return Block({HOOK_POINT: torch.from_numpy(x)}, columns)

    @abstractmethod
    def context(self, split: str, number: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Activations (ROWS_PER_CONTEXT, d_in) of one context, and its columns but for context and position."""

    @abstractmethod
    def counts(self, split: str, number: int) -> np.ndarray:
        """(ROWS_PER_CONTEXT,) active features of the rows of one context."""


class DrawnInputs(Inputs, ABC):
    """The true dictionary and the counts of true features."""

    @abstractmethod
    def source(self) -> DrawnRows:
        """The rows that these inputs give."""

    @property
    def true_features(self) -> np.ndarray:
        """(n_features, d_in) rows."""
        from safetensors.numpy import load_file

        features: np.ndarray = load_file(self.folder / DICTIONARY)["features"]
        return features

    def n_contexts(self, split: str) -> int:
        """Number of contexts of a split."""
        return int(read_json(self.folder / STRUCTURE)["contexts"][split])

    def true_counts(self, split: str, contexts: np.ndarray) -> tuple[np.ndarray, ...]:
        """The context, the position and the number of active true features of every row."""
        source = self.source()
        counts = [source.counts(split, number) for number in contexts.tolist()]
        return *places(contexts), np.concatenate(counts).astype(np.float64)
