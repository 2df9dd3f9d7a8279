"""Content of a store, whatever its chunks and codec: digests and moments of its rows, in order."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saeflow.files import json_digest, read_json
from saeflow.stores.blocks import ACTIVATIONS
from saeflow.stores.dtypes import Dtype

STORE_FORMAT = "saeflow-store"
STORE_VERSION, WINDOWS_VERSION = 1, 2
"""Format versions of a store of one window, and of several."""
LOGICAL = ("source_params", "split", "hook_point")
"""Attributes that enter the content digest, beside the rows, columns and moments."""

PIECE_ROWS = 4096
"""Rows summed at once: the order of summation, which the last bits of mean and scale depend on."""

Rows = dict[str, np.ndarray]


def in_pieces(some: Iterable[Rows]) -> Iterator[Rows]:
    """The same rows, PIECE_ROWS at a time; a piece is valid until the next one is asked for."""
    rest: Rows = {}
    for given in some:
        start, rows = 0, len(given[ACTIVATIONS])
        if rest:
            start = min(rows, PIECE_ROWS - len(rest[ACTIVATIONS]))
            rest = {name: np.concatenate([rest[name], given[name][:start]]) for name in given}
            if len(rest[ACTIVATIONS]) < PIECE_ROWS:
                continue
            yield rest
        whole = rows - (rows - start) % PIECE_ROWS
        for first in range(start, whole, PIECE_ROWS):
            yield {name: values[first : first + PIECE_ROWS] for name, values in given.items()}
        rest = {name: v[whole:].copy() for name, v in given.items()} if whole < rows else {}
    if rest:
        yield rest


_LEAST_SCALE = float(np.finfo(np.float32).tiny)
"""Activations are divided by their scale in float32."""
_LEAST_SPREAD = 1e-12
"""Least share of the variance in the mean square, above the rounding of sums in float64."""


@dataclass
class Content:
    """Running summary of a store's rows: digests of its arrays, moments of its activations.

    The rows must come in pieces of PIECE_ROWS; chunks, shards and codec do not enter.
    """

    dtype: Dtype
    d_in: int

    def __post_init__(self) -> None:
        self._rows = 0
        self._sum = np.zeros(self.d_in)
        self._squares = 0.0
        self._shas: dict[str, Any] = {}
        self._kinds: dict[str, Any] = {}

    def add(self, piece: Rows) -> None:
        """Take the next rows in."""
        stored = piece[ACTIVATIONS]
        x = self.dtype.decode(stored).double().numpy()
        self._rows += len(x)
        self._sum += x.sum(axis=0)
        self._squares += float(np.square(x).sum())
        for name, values in piece.items():
            self._shas.setdefault(name, hashlib.sha256()).update(np.ascontiguousarray(values))
            self._kinds[name] = {"dtype": values.dtype.name, "tail": list(values.shape[1:])}

    def moments(self) -> dict[str, Any]:
        """Mean vector (d_in) and scale sqrt(mean ||x||^2 / d_in) of the rows as stored."""
        return {
            "mean": (self._sum / self._rows).tolist(),
            "scale": math.sqrt(self._squares / self._rows / self.d_in),
        }

    def problem(self) -> str | None:
        """Say why the rows have no scale or no variance, or return None."""
        power = self._squares / self._rows
        if math.sqrt(power / self.d_in) < _LEAST_SCALE:
            return f"all {self._rows} activations are zero"
        spread = power - float(np.square(self._sum / self._rows).sum())
        if self._rows > 1 and spread <= _LEAST_SPREAD * power:
            return f"all {self._rows} activations are equal"
        return None

    def digests(self) -> dict[str, str]:
        """SHA-256 of each array's values, in row order, little-endian."""
        return {name: sha.hexdigest() for name, sha in sorted(self._shas.items())}

    def digest(self, attributes: Mapping[str, Any]) -> str:
        """SHA-256 over the rows in order, the columns, the moments and the LOGICAL attributes."""
        facts = {key: attributes[key] for key in LOGICAL}
        arrays = {name: [self._kinds[name], sha] for name, sha in self.digests().items()}
        return json_digest(
            {**facts, **self.moments(), "arrays": arrays, "rows": self._rows, "dtype": self.dtype.name}
        )  # fmt: skip


def window_name(window: int) -> str:
    """Name of a window's group inside the store of several."""
    return f"window-{window:05d}"


def windows_digest(attributes: Mapping[str, Any], digests: Sequence[str]) -> str:
    """SHA-256 over the content digests of all windows in order, and the LOGICAL attributes."""
    return json_digest({**{key: attributes[key] for key in LOGICAL}, "windows": list(digests)})


def metadata_digest(folder: Path, attributes: Mapping[str, Any]) -> str:
    """SHA-256 over a store's attributes and the metadata of its arrays."""
    arrays = {name: read_json(folder / name / "zarr.json") for name in attributes["arrays"]}
    rest = {key: value for key, value in attributes.items() if key != "metadata_digest"}
    return json_digest([rest, arrays])
