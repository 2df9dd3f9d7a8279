"""Extraction: the activations of a split, cut into blocks that any number of jobs write independently.

A split is one window or several, each shuffled by itself. Contexts are cut every block_contexts and at the
borders of windows; block b is the b-th of its window. It is one safetensors file per hook point, its rows
already in the order of their places in the shuffled window. A file appears whole or not at all, so a killed
job started again goes on after the last block it finished.
"""

import json
import logging
import math
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from saeflow.config import contexts_of, n_windows
from saeflow.errors import UserError
from saeflow.files import atomic_file
from saeflow.progress import progress
from saeflow.sources.base import Block, Source
from saeflow.stores.dtypes import DTYPES, Dtype
from saeflow.stores.permutation import Permutation

FORMAT = "saeflow-block-2"
ACTIVATIONS, PLACE, NORM = "activations", "place", "norm"
"""Arrays of a block file beside the source's columns: places int64 ascending, norms float32."""

logger = logging.getLogger(__name__)


def write_part(
    source: Source,
    split: str,
    part: int,
    parts: int,
    store: Mapping[str, Any],
    folder: Path,
    writers: int = 1,
    window: int = 0,
) -> None:
    """Extract one part of a window of a split: its share of the blocks, for every hook point.

    Peak memory is `writers` + 1 blocks, whatever the size of the split.

    Args:
        source: where activations come from.
        split: train or evaluation.
        part, parts: this job's number and the number of jobs; the result does not depend on them.
        store: one entry of `stores`.
        folder: existing folder; whole blocks that lie there already are kept.
        writers: threads that encode, digest and write blocks beside the model. One keeps up with a CPU.
        window: number of the window.

    Raises:
        UserError: the window holds no context, or an activation is not finite, or does not fit the store's dtype.
    """
    windows, size = n_windows(store, split), store["block_contexts"]
    contexts = contexts_of(window, windows, source.n_contexts(split))
    if not contexts:
        raise UserError(
            f"window_rows: expected a context of {source.rows_per_context} rows at least, found {store['window_rows']}. "
            "Raise window_rows of this store in params.yaml."
        )
    first_block = contexts.start // size
    blocks = -(-contexts.stop // size) - first_block
    shuffle = Permutation(len(contexts) * source.rows_per_context, store["seed"], window)
    dtype = DTYPES[store["dtype"]]
    mine = range(part * blocks // parts, (part + 1) * blocks // parts)
    with ThreadPoolExecutor(writers, "write-blocks") as pool:  # writes while the model computes on
        writing: deque[Future[None]] = deque()
        for block in progress(mine, f"{split}: part {part + 1} of {parts}", "block"):
            shared = {
                "format": FORMAT, "split": split, "window": window, "block": block, "blocks": blocks,
                "rows": shuffle.n, "seed": store["seed"], "dtype": dtype.name,
            }  # fmt: skip
            paths = {
                hook_point: (folder / hook_point / f"{block:08d}.safetensors")
                for hook_point in source.hook_points
            }
            if all(_is_whole(path, shared) for path in paths.values()):
                continue
            edge = (first_block + block) * size
            start, stop = max(edge, contexts.start), min(edge + size, contexts.stop)
            rows = source.block(split, start, stop)
            ids = np.arange(
                (start - contexts.start) * source.rows_per_context,
                (stop - contexts.start) * source.rows_per_context,
            )
            places = shuffle.forward(ids)
            if len(writing) == writers:
                writing.popleft().result()
            writing.append(pool.submit(_write_block, rows, places, paths, dtype, shared))
        for left in writing:
            left.result()


def _write_block(
    rows: Block, places: np.ndarray, paths: Mapping[str, Path], dtype: Dtype, shared: dict[str, Any]
) -> None:
    rows.wait()
    order = np.argsort(places)
    columns = {name: column[order] for name, column in rows.columns.items()}
    for hook_point, path in paths.items():
        x = rows.activations[hook_point]
        stored = dtype.encode(x)
        if not dtype.is_finite(stored):
            _refuse(x, dtype.decode(stored), hook_point, rows.columns, dtype)
        norms = _norms(x).numpy()
        arrays = {ACTIVATIONS: stored[order], PLACE: places[order], NORM: norms[order], **columns}
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        facts = {**shared, "hook_point": hook_point, "crc32c": _checksums(arrays)}
        with atomic_file(path) as staged:
            save_file(arrays, staged, {"saeflow": json.dumps(facts)})


def _norms(x: Tensor) -> Tensor:
    """Return the norm (rows,) float32 of each row (rows, d_in) of a 16-bit type or float32.

    Rows are converted a few at a time: torch's reduction of a 16-bit type takes several times as long, for the same bits.
    """
    return torch.cat([torch.linalg.vector_norm(part.float(), dim=1) for part in x.split(128)])


def _checksums(arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    return {name: google_crc32c.value(array.reshape(-1).view(np.uint8)) for name, array in arrays.items()}  # fmt: skip


def _refuse(
    x: Tensor, stored: Tensor, hook_point: str, columns: Mapping[str, np.ndarray], dtype: Dtype
) -> None:
    finite = torch.isfinite(x)
    if finite.all():  # a value that the dtype cannot hold
        finite = torch.isfinite(stored)
    row, unit = (~finite).nonzero()[0].tolist()
    value = x[row, unit].item()
    where = ", ".join(
        f"{name} {columns[name][row]}" for name in ("context", "position") if name in columns
    )
    if np.isfinite(value):
        largest = torch.finfo(dtype.torch).max
        expected = f"values of at most {largest:g} ({dtype.name})"
        action = "Set dtype of this store in params.yaml to bfloat16 or float32."
    else:
        expected = "finite activations"
        action = "Check the model's weights, and run it in float32."
    raise UserError(
        f"{hook_point}: expected {expected}, found {value} at {where}, unit {unit}. {action}"
    )


@dataclass(frozen=True)
class BlockFile:
    """A block file, read in slices without mapping it into memory."""

    path: Path
    facts: dict[str, Any]
    layout: dict[str, tuple[np.dtype, tuple[int, ...], int]]
    """By array: dtype, shape, offset of its first byte."""

    @classmethod
    def open(cls, path: Path) -> "BlockFile":
        """Read the header of a block file.

        Raises:
            UserError: it is not a whole block file.
        """
        try:
            with path.open("rb") as file:
                head = int.from_bytes(file.read(8), "little")
                header: dict[str, Any] = json.loads(file.read(head)) if head < 1 << 24 else {}
            facts = json.loads(header.pop("__metadata__")["saeflow"])
            layout = {
                name: (_DTYPES[item["dtype"]], tuple(item["shape"]), 8 + head + item["data_offsets"][0])
                for name, item in header.items()
            }  # fmt: skip
            size = 8 + head + max(item["data_offsets"][1] for item in header.values())
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}: expected a block of activations, found something else. "
                "Delete the file and run the extraction again."
            ) from None
        if facts.get("format") != FORMAT or path.stat().st_size != size:
            raise UserError(
                f"{path}: expected {size} bytes of format {FORMAT}, found {path.stat().st_size} bytes "
                f"of format {facts.get('format')}. Delete the file and run the extraction again."
            )
        return cls(path, facts, layout)

    @property
    def rows(self) -> int:
        """Rows of the block."""
        return self.layout[PLACE][1][0]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of one array."""
        stop = self.rows if stop is None else stop
        with self.path.open("rb", buffering=0) as file:
            return self._slice(file, name, start, stop)

    def take(self, start: int, place: int, expected: int) -> dict[str, np.ndarray]:
        """Rows from `start` up to the first whose place is not below `place`, of every array.

        Args:
            start: number of the first row.
            place: rows are taken while theirs is below it.
            expected: about how many there are; only speed depends on it.
        """
        with self.path.open("rb", buffering=0) as file:
            guess = expected + 4 * math.isqrt(expected) + 16
            while True:
                places = self._slice(file, PLACE, start, min(start + guess, self.rows))
                count = int(np.searchsorted(places, place))
                if count < len(places) or start + count == self.rows:
                    break
                guess *= 2
            stop = start + count
            rest = {n: self._slice(file, n, start, stop) for n in self.layout if n != PLACE}
        return {PLACE: places[:count], **rest}

    def _slice(self, file: FileIO, name: str, start: int, stop: int) -> np.ndarray:
        dtype, shape, offset = self.layout[name]
        values = math.prod(shape[1:])
        file.seek(offset + start * values * dtype.itemsize)
        return np.fromfile(file, dtype, (stop - start) * values).reshape(-1, *shape[1:])

    def check(self) -> None:
        """Read the whole file and compare its checksums.

        Raises:
            UserError: bytes changed since it was written.
        """
        found = _checksums({name: self.read(name) for name in self.layout})
        if found != self.facts["crc32c"]:
            wrong = sorted(name for name in found if found[name] != self.facts["crc32c"].get(name))
            raise UserError(
                f"{self.path}: the checksum of {', '.join(wrong)} does not match its bytes. "
                "Delete the file and run the extraction again."
            )


_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"), "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"), "BOOL": np.dtype("?"),
}  # fmt: skip


def _is_whole(path: Path, expected: Mapping[str, Any]) -> bool:
    """Return whether an earlier, killed run of the same job finished a block."""
    if not path.exists():
        return False
    try:
        file = BlockFile.open(path)
        file.check()
    except UserError as error:
        logger.warning("%s Writing it anew.", error)
        return False
    return all(file.facts.get(key) == value for key, value in expected.items())
