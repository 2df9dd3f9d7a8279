"""The interface of every source of activations."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Column = tuple[np.dtype, tuple[int, ...]]
"""dtype and trailing shape of a column."""


@dataclass(frozen=True)
class Block:
    """Rows of some contexts, in (context, position) order."""

    activations: "dict[str, Tensor]"
    """By hook point: (rows, d_in) on the CPU, in the dtype of what computed them; whole after `wait`."""
    columns: dict[str, np.ndarray]
    """By name: (rows, ...), which input each row came from and, where known, its truth."""
    wait: Callable[[], None] = lambda: None
    """Returns when the activations have arrived from the device; on a CPU at once."""


_TOKENS = {"all": slice(0, None), "cls": slice(0, 1), "patches": slice(1, None)}


def positions(params: Mapping[str, Any]) -> slice:
    """Of each context of a source, the positions that give a row.

    Args:
        params: one entry of `sources`.
    """
    if "tokens" in params:
        return _TOKENS[params["tokens"]]
    return slice(int(params.get("skip_first", False)), None)


def generator(seed: int, stream: int, number: int) -> np.random.Generator:
    """A generator of its own (counter-based) for each block of each stream of a seed."""
    sequence = np.random.SeedSequence(seed, spawn_key=(stream, number))
    return np.random.Generator(np.random.Philox(sequence))


class Source(Protocol):
    """Activations of contexts; each context gives `rows_per_context` rows."""

    hook_points: list[str]
    d_in: dict[str, int]
    rows_per_context: int
    columns: dict[str, Column]

    def n_contexts(self, split: str) -> int:
        """Number of contexts of a split."""
        ...

    def block(self, split: str, start: int, stop: int) -> Block:
        """Activations of contexts [start, stop); the same bits in whatever pieces they are asked for."""
        ...
