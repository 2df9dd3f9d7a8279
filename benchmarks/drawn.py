"""Stores of drawn rows: real stores, written by the extraction, without a model to wait for."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeflow.sources import KINDS, Block, SourceKind
from saeflow.stores import finalise, write_part

STORE = {
    "dtype": "bfloat16", "chunk_rows": 512, "shard_rows": 65536, "codec": "none", "block_contexts": 64,
    "seed": 0,
}  # fmt: skip
PARAMS = {"kind": "drawn", "hook_points": ["drawn"], "max_norm_multiple": 10}


class Drawn:
    """A source of random activations, made as fast as a GPU would make them.

    Args:
        rows, d_in: how many, how wide.
        batches: where rows are taken from, over and over; None: standard normal ones.
    """

    hook_points = ("drawn",)
    rows_per_context = 128
    columns: Mapping[str, Any] = {}

    def __init__(self, rows: int, d_in: int, batches: Iterator[Tensor] | None = None) -> None:
        self.d_in = {"drawn": d_in}
        self.x = None if batches is None else next(batches)
        self._contexts = rows // self.rows_per_context

    def n_contexts(self, split: str) -> int:
        return self._contexts

    def block(self, split: str, start: int, stop: int) -> Block:
        rows = (stop - start) * self.rows_per_context
        if self.x is None:
            generator = torch.Generator().manual_seed(start)
            x = torch.randn(rows, self.d_in["drawn"], generator=generator)
        else:
            x = self.x[
                torch.arange(start * self.rows_per_context, stop * self.rows_per_context)
                % len(self.x)
            ]
        position = np.tile(np.arange(self.rows_per_context, dtype=np.int32), stop - start)
        context = np.repeat(np.arange(start, stop, dtype=np.int64), self.rows_per_context)
        return Block({"drawn": x}, {"context": context, "position": position})


def write_drawn(source: Drawn, folder: Path) -> Path:
    """Extract in one part, and merge; the path of the store."""
    for name in ("part", "store"):
        (folder / name).mkdir(parents=True)
    write_part(source, "train", 0, 1, STORE, folder / "part")
    finalise([folder / "part"], "drawn", PARAMS, "train", STORE, {}, folder / "store")
    return folder / "store" / "drawn.zarr"


def _open(params: Mapping[str, Any], folder: Path, device: str) -> Drawn:
    raise NotImplementedError("rows are drawn by `Drawn`, not opened from a folder")


KIND = SourceKind(
    check=lambda name, params, folder: None,
    external_inputs=lambda params: {},
    prepare_inputs=lambda params, rows, model, folder, workers: {},
    open=_open,
    rows_per_context=lambda params: Drawn.rows_per_context,
)
KINDS["drawn"] = __name__
