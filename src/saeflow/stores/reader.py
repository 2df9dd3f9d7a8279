"""Reading a store: open it, check it, take rows, columns or shuffled batches from it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor

from saeflow.batch import Batch
from saeflow.errors import UserError
from saeflow.files import read_json
from saeflow.progress import progress
from saeflow.sources.base import positions
from saeflow.stores.batches import batches_in_memory, shuffled_batches
from saeflow.stores.blocks import ACTIVATIONS
from saeflow.stores.content import (
    PIECE_ROWS,
    STORE_FORMAT,
    STORE_VERSION,
    WINDOWS_VERSION,
    Content,
    in_pieces,
    metadata_digest,
    window_name,
    windows_digest,
)
from saeflow.stores.dtypes import DTYPES
from saeflow.stores.joined import Array, Joined
from saeflow.stores.sharded import ShardedReader, damaged


class Store:
    """Activations of one hook point and split, in shuffled order. Made by `open_store`.

    A store is one window or several, each shuffled by itself. Its moments are those of the first.

    Attributes:
        path: the Zarr group.
        attrs: all its attributes.
        rows, d_in: shape of the activations.
        dtype: of the tensors it gives: float32 (also of int8), float16 or bfloat16.
        mean: (d_in,) float64, the mean row.
        scale: sqrt(mean ||x||^2 / d_in); rows divided by it have mean squared norm d_in.
        has_rows: whether they are on the disk.
        median_norm: of all rows that were extracted, those dropped for their norm included.
        model: digest of the model that made the rows, None where none did.
        targets: None: rows are their own targets in training.
    """

    targets = None
    has_rows = True

    def __init__(self, path: Path, attrs: dict[str, Any], arrays: Mapping[str, Array]) -> None:
        self.path = path
        self.attrs = attrs
        self.arrays = arrays
        self.rows: int = attrs["rows"]
        self.d_in: int = attrs["d_in"]
        self.mean = torch.tensor(attrs["mean"], dtype=torch.float64)
        self.scale: float = attrs["scale"]
        self.model: str | None = attrs["made_from"].get("model")
        self.median_norm: float = attrs["median_norm"]
        self.kind = DTYPES[attrs["dtype"]]
        self.dtype = self.kind.torch

    @property
    def positions(self) -> slice:
        """Positions of each context of the source whose rows are here."""
        return positions(self.attrs["source_params"])

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) as a new tensor (stop - start, d_in).

        Raises:
            UserError: they are damaged, or not finite.
        """
        return self.kind.decode(self._stored(start, stop))

    def _stored(self, start: int, stop: int) -> np.ndarray:
        start, stop, _ = slice(start, stop).indices(self.rows)
        stored = self.arrays[ACTIVATIONS].read(start, max(start, stop))
        if not self.kind.is_finite(stored):
            raise damaged(
                self.path / ACTIVATIONS, f"values that are not finite in rows {start} to {stop - 1}"
            )
        return stored

    def pieces(self) -> Iterator[dict[str, np.ndarray]]:
        """All arrays as stored, from the first row to the last, some whole chunks at a time."""
        chunk_rows = self.arrays[ACTIVATIONS].chunk_rows
        size = chunk_rows * max(1, PIECE_ROWS // chunk_rows)
        for start in progress(range(0, self.rows, size), f"verify {self.path}", "piece"):
            stop = min(start + size, self.rows)
            columns = {name: self.column(name, start, stop) for name in self.columns}
            yield {ACTIVATIONS: self._stored(start, stop), **columns}

    def column(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of a column, such as context, position or token.

        Raises:
            UserError: the store has no such column, or it is damaged.
        """
        if name not in self.columns:
            raise UserError(
                f"{self.path}: expected a column {name!r}, found {', '.join(self.columns)}. "
                "Use a store of a source that has it."
            )
        start, stop, _ = slice(start, stop).indices(self.rows)
        return self.arrays[name].read(start, max(start, stop))

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return [name for name in self.arrays if name != ACTIVATIONS]

    def batches(
        self, batch_size: int, seed: int, start_batch: int = 0, *, pin: bool = False
    ) -> Iterator[Batch]:
        """Endless shuffled batches (batch_size, d_in) in the store's dtype, read ahead on threads; rows are their own targets.

        Every epoch gives each row once, in an order of its own; a batch may hold the end of one epoch and
        the start of the next. Batch b depends on the store, batch_size, seed and b only. Close the iterator
        (or drop it) to end the threads.

        Args:
            batch_size: rows per batch.
            seed: of the order.
            start_batch: number of the first batch; those before it are not read.
            pin: for a GPU: page-locked memory, whose copies do not block, and more threads.

        Raises:
            UserError: when a chunk is reached that is damaged. Values are not looked at again: extraction
                refuses those that are not finite, and a chunk's checksum says that it is unchanged.
        """
        if batch_size < 1 or start_batch < 0:
            raise ValueError(
                f"expected batch_size >= 1 and start_batch >= 0, got {batch_size} and {start_batch}"
            )
        array = self.arrays[ACTIVATIONS]
        return shuffled_batches(array, self.kind, batch_size, seed, start_batch, pin)

    def last_rows(self) -> "Rows":
        """Each context's last row, in memory; contexts whose last row was left out are left out.

        Raises:
            UserError: the store does not say which rows are last, or a chunk is damaged.
        """
        position = self.column("position")
        last = np.flatnonzero(position == position.max())
        found = torch.empty(len(last), self.d_in, dtype=self.dtype)
        for start, rows in self.in_order(PIECE_ROWS):
            low, high = np.searchsorted(last, (start, start + len(rows)))
            found[low:high] = rows[torch.from_numpy(last[low:high] - start)]
        return Rows(found)

    @property
    def n_last(self) -> int:
        """Number of contexts whose last row is stored, see `last_rows`."""
        positions = self.column("position")
        return int((positions == positions.max()).sum())

    def in_order(self, batch_size: int) -> Iterator[tuple[int, Tensor]]:
        """(number of the first row, rows) from the first row to the last; the last batch may be short."""
        for start in range(0, self.rows, batch_size):
            yield start, self.read(start, min(start + batch_size, self.rows))


class Gone(Store):
    """A store whose windows were deleted once SAEs were trained on them: its attributes are there, and no row is."""

    has_rows = False

    def _refuse(self) -> NoReturn:
        raise UserError(
            f"{self.path}: expected rows, found a store whose windows were deleted after training "
            f"(stores.{self.attrs['source']}.keep_windows). Set keep_windows to all, or read the evaluation split."
        )

    def _stored(self, start: int, stop: int) -> np.ndarray:
        self._refuse()

    def column(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        self._refuse()

    def batches(
        self, batch_size: int, seed: int, start_batch: int = 0, *, pin: bool = False
    ) -> Iterator[Batch]:
        self._refuse()

    def last_rows(self) -> Any:
        """The store itself, which has no batches of them either: an SAE that is trained to its end asks for none."""
        return self


class Rows:
    """Rows (n, d_in) in memory, with a store's `batches`."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def batches(
        self, batch_size: int, seed: int, start_batch: int = 0, *, pin: bool = False
    ) -> Iterator[Batch]:
        """As `Store.batches`; memory is not page-locked."""
        return batches_in_memory(self.rows, batch_size, seed, start_batch)


def open_store(path: Path | str) -> Store:
    """Open a store and check its metadata and that all of its files are there and none is cut short.

    Chunks are checked when they are read; `verify` reads all of them.

    Raises:
        UserError: naming the file that is missing, damaged, foreign, or of another version.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such store. Run its extraction (saeflow extract, merge).")
    group = path / "zarr.json"
    if not group.exists():
        raise UserError(f"{path}: expected a Zarr v3 group, found none. Give a store's folder.")
    meta = read_json(group)
    attrs = meta.get("attributes") if isinstance(meta, dict) else None
    if not isinstance(attrs, dict) or attrs.get("format") != STORE_FORMAT:
        raise UserError(
            f"{path}: expected a store that saeflow wrote, found other Zarr data. "
            "Extract activations with saeflow."
        )
    if attrs.get("format_version") not in (STORE_VERSION, WINDOWS_VERSION):
        raise UserError(
            f"{path}: expected format version {STORE_VERSION} or {WINDOWS_VERSION}, found {attrs.get('format_version')}. "
            "Delete the store and extract it again with this version of saeflow."
        )
    names = attrs.get("arrays")
    if not isinstance(names, dict) or metadata_digest(path, attrs) != attrs.get("metadata_digest"):
        raise damaged(group, "metadata of this store that were changed since")
    if attrs.get("has_rows") is False:
        return Gone(path, attrs, {})
    if attrs["format_version"] == WINDOWS_VERSION:
        return Store(path, attrs, _joined(path, attrs))
    arrays = {name: ShardedReader.open(path / name) for name in names}
    for array in arrays.values():
        array.check_indexes()
    return Store(path, attrs, arrays)


def _joined(path: Path, attrs: Mapping[str, Any]) -> dict[str, Array]:
    """Arrays of a store of several windows.

    Raises:
        UserError: naming the file that is missing, damaged, or of another window.
    """
    of_windows: list[Mapping[str, Array]] = []
    for number, expected in enumerate(attrs["windows"]):
        window = open_store(path / window_name(number))
        if window.attrs["metadata_digest"] != expected["metadata_digest"]:
            raise damaged(window.path / "zarr.json", "another window")
        of_windows.append(window.arrays)
    return {
        name: Joined([cast(ShardedReader, arrays[name]) for arrays in of_windows])
        for name in of_windows[0]
    }


def verify(path: Path | str) -> str:
    """Read a whole store: every chunk's checksum, every value finite, the content digest.

    Returns:
        The content digest.

    Raises:
        UserError: naming the file, and the rows, that are not as they were written.
    """
    store = open_store(path)
    if isinstance(store, Gone):
        digests = [window["content_digest"] for window in store.attrs["windows"]]
        found = windows_digest(store.attrs, digests)
    elif "windows" in store.attrs:
        numbers = range(len(store.attrs["windows"]))
        found = windows_digest(
            store.attrs, [verify(store.path / window_name(number)) for number in numbers]
        )
    else:
        content = Content(store.kind, store.d_in)
        for piece in in_pieces(store.pieces()):
            content.add(piece)
        found = content.digest(store.attrs)
    if found != store.attrs["content_digest"]:
        raise damaged(store.path, "rows whose digest is not the one in its attributes")
    return found


def check_compatible(store: Store, *, d_in: int, what: str) -> None:
    """Refuse a store whose width does not fit.

    Args:
        store: an open store.
        d_in: the width that is needed.
        what: who needs it, for the message, such as "SAE topk".

    Raises:
        UserError: the widths differ.
    """
    if store.d_in != d_in:
        raise UserError(
            f"{store.path}: activations have width {store.d_in}, but {what} expects {d_in}. "
            "Use the store it was trained on, or train it anew on this one."
        )
