"""A small source whose rows follow from their numbers alone, and stores made of it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saeflow.sources.base import Block
from saeflow.stores import finalise, write_part

SOURCE = {"kind": "tiny", "hook_points": ["a", "b"], "max_norm_multiple": None}
STORE = {
    "dtype": "float32", "chunk_rows": 16, "shard_rows": 64, "codec": "none", "block_contexts": 4, "seed": 5,
}  # fmt: skip
N_CONTEXTS = {"train": 37, "evaluation": 10}


class TinySource:
    """Row r of a split: Gaussian activations from a generator seeded by its context."""

    hook_points = ("a", "b")

    def __init__(
        self, contexts: Mapping[str, int] = N_CONTEXTS, rows_per_context: int = 7, d_in: int = 6
    ) -> None:
        self.rows_per_context = rows_per_context
        self.d_in = dict.fromkeys(self.hook_points, d_in)
        self.columns = {name: (np.dtype("<i4"), ()) for name in ("context", "position", "token")}
        self._contexts = dict(contexts)
        self.asked: list[tuple[int, int]] = []

    def n_contexts(self, split: str) -> int:
        return self._contexts[split]

    def activations(self, split: str, context: int, hook_point: str) -> np.ndarray:
        rng = np.random.default_rng([context, len(split), ord(hook_point)])
        return rng.standard_normal((self.rows_per_context, self.d_in[hook_point]), np.float32)

    def block(self, split: str, start: int, stop: int) -> Block:
        self.asked.append((start, stop))
        contexts = range(start, stop)
        activations = {
            hook_point: torch.from_numpy(
                np.concatenate([self.activations(split, c, hook_point) for c in contexts])
            )
            for hook_point in self.hook_points
        }
        context = np.repeat(np.arange(start, stop, dtype="<i4"), self.rows_per_context)
        position = np.tile(np.arange(self.rows_per_context, dtype="<i4"), stop - start)
        token = context * 100 + position
        return Block(activations, {"context": context, "position": position, "token": token})

    def all_rows(self, split: str, hook_point: str) -> np.ndarray:
        return self.block(split, 0, self.n_contexts(split)).activations[hook_point].numpy()


def write_store(
    folder: Path,
    source: Any,
    store: Mapping[str, Any] = STORE,
    params: Mapping[str, Any] = SOURCE,
    split: str = "train",
    parts: int = 1,
) -> dict[str, str]:
    """Extract in some parts and merge into `folder`; returns the content digests."""
    folders = []
    for part in range(parts):
        folders.append(folder.with_name(f"{folder.name}.parts") / f"{part}-of-{parts}")
        folders[-1].mkdir(parents=True)
        write_part(source, split, part, parts, store, folders[-1])
    folder.mkdir()
    return finalise(folders, "tiny", params, split, store, {"model": "0" * 64}, folder)


@pytest.fixture
def source() -> TinySource:
    return TinySource()


@pytest.fixture(scope="session")
def make_source() -> type[TinySource]:
    return TinySource


@pytest.fixture(scope="session")
def make_store() -> Callable[..., dict[str, str]]:
    return write_store


@pytest.fixture(scope="session")
def store_params() -> dict[str, Any]:
    return dict(STORE)


@pytest.fixture
def source_params() -> dict[str, Any]:
    return dict(SOURCE)
