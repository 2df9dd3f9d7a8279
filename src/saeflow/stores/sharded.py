"""Arrays of rows in Zarr v3 shards: a writer that streams and a reader that checks every chunk.

Zarr makes the metadata; the bytes of a shard are written and read here, which is what makes reading fast:
a shard is its encoded chunks one after the other, then an index of (offset, length) as little-endian
uint64, then the index's crc32c. A chunk is its values in C order, compressed or not, then their crc32c.

Source: Zarr v3 core specification, `sharding_indexed` and `crc32c` codecs.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import Zstd
from zarr.codecs import Crc32cCodec, ZstdCodec

from saeflow.errors import UserError

ZSTD_LEVEL = 1  # levels 1 to 9 give the same size on activations (benchmarks/stores.py)
CODECS: dict[str, list[Any]] = {
    "none": [],
    "zstd": [ZstdCodec(level=ZSTD_LEVEL, checksum=False)],
}
_CRC_BYTES = 4
_ENTRY_BYTES = 16
_ABSENT = np.uint64(2**64 - 1)


def damaged(path: Path, found: str) -> UserError:
    """The error for a file whose bytes are not those that were written."""
    return UserError(
        f"{path}: expected what the extraction wrote, found {found}. "
        "Delete the store and run its extraction again."
    )


def _encoder(codec: str) -> Callable[[bytes], bytes] | None:
    result: Callable[[bytes], bytes] | None = {"none": None, "zstd": Zstd(ZSTD_LEVEL).encode}[codec]
    return result


class ShardedWriter:
    """Writes an array (rows, ...) from its first row to its last, in pieces of any size.

    Args:
        folder: of the array, inside that of its Zarr group.
        shape: (rows, ...).
        dtype: of the values, little-endian.
        chunk_rows, shard_rows: rows per chunk and per file; the second a multiple of the first.
        codec: a key of CODECS.
    """

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, ...],
        dtype: np.dtype,
        *,
        chunk_rows: int,
        shard_rows: int,
        codec: str,
    ) -> None:
        zarr.create_array(
            folder.parent,
            name=folder.name,
            shape=shape,
            dtype=dtype,
            chunks=(chunk_rows, *shape[1:]),
            shards=(shard_rows, *shape[1:]),
            compressors=[*CODECS[codec], Crc32cCodec()],
            filters=None,
            fill_value=0,
            dimension_names=["row", *(f"{folder.name}_{axis}" for axis in range(1, len(shape)))],
        )
        self.folder = folder
        self._tail = (0,) * (len(shape) - 1)
        self._encode = _encoder(codec)
        self._chunks_per_shard = shard_rows // chunk_rows
        self._chunk = np.zeros((chunk_rows, *shape[1:]), dtype)
        self._filled = 0
        self._shard = 0
        self._index: list[tuple[int, int]] = []
        self._file: Any = None

    def append(self, rows: np.ndarray) -> None:
        """Write (n, ...) further rows."""
        while len(rows):
            n = min(len(rows), len(self._chunk) - self._filled)
            self._chunk[self._filled : self._filled + n] = rows[:n]
            self._filled += n
            rows = rows[n:]
            if self._filled == len(self._chunk):
                self._write_chunk()

    def close(self) -> None:
        """Write what is left; the last chunk is filled up with zeros, as Zarr does."""
        if self._filled:
            self._chunk[self._filled :] = 0
            self._write_chunk()
        if self._file is not None:
            self._write_index()

    def abort(self) -> None:
        """Let go of the open file after an error."""
        if self._file is not None:
            self._file.close()

    def _write_chunk(self) -> None:
        if self._file is None:
            path = shard_path(self.folder, self._shard, self._tail)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
        payload: Any = self._chunk.reshape(-1).view(np.uint8)
        if self._encode is not None:
            payload = self._encode(payload)
        offset = self._file.tell()
        self._file.write(payload)
        self._file.write(google_crc32c.value(payload).to_bytes(_CRC_BYTES, "little"))
        self._index.append((offset, len(payload) + _CRC_BYTES))
        self._filled = 0
        if len(self._index) == self._chunks_per_shard:
            self._write_index()

    def _write_index(self) -> None:
        index = np.full((self._chunks_per_shard, 2), _ABSENT, "<u8")
        index[: len(self._index)] = self._index
        self._file.write(index.tobytes())
        self._file.write(google_crc32c.value(index.tobytes()).to_bytes(_CRC_BYTES, "little"))
        self._file.close()
        self._file, self._index, self._shard = None, [], self._shard + 1


def shard_path(folder: Path, shard: int, tail: tuple[int, ...]) -> Path:
    """Return the path at which Zarr's default chunk keys put a shard."""
    return folder.joinpath("c", str(shard), *map(str, tail))


@dataclass
class ShardedReader:
    """Reads the chunks of one array; holds no file open and maps none into memory.

    A chunk's checksum is compared when this reader first reads it, and again only once its file has
    changed since (size, time of change or inode): epochs after the first cost no more than the reading.

    Attributes:
        folder: of the array.
        shape: (rows, ...).
        dtype: of the values.
        chunk_rows: rows per chunk; the last chunk may hold fewer.
    """

    folder: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_rows: int
    _chunks_per_shard: int
    _compressed: bool
    _indexes: dict[int, list[list[int]]] = field(default_factory=dict)
    _paths: dict[int, Path] = field(default_factory=dict)
    _checked: dict[int, tuple[int, int, int]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> "ShardedReader":
        """Read the metadata of an array that ShardedWriter wrote.

        Raises:
            UserError: it is missing, or describes another kind of array.
        """
        path = folder / "zarr.json"
        try:
            meta = json.loads(path.read_text())
            shape = tuple(int(n) for n in meta["shape"])
            shard_shape = meta["chunk_grid"]["configuration"]["chunk_shape"]
            (codec,) = meta["codecs"]
            inner = codec["configuration"]
            chunk_shape = inner["chunk_shape"]
            names = [part["name"] for part in inner["codecs"]]
            known = (
                meta["zarr_format"] == 3
                and codec["name"] == "sharding_indexed"
                and inner["index_location"] == "end"
                and [part["name"] for part in inner["index_codecs"]] == ["bytes", "crc32c"]
                and names in (["bytes", "crc32c"], ["bytes", "zstd", "crc32c"])
                and list(chunk_shape[1:]) == list(shard_shape[1:]) == list(shape[1:])
                and shard_shape[0] % chunk_shape[0] == 0
            )
            dtype = np.dtype(meta["data_type"]).newbyteorder("<")
        except FileNotFoundError:
            raise damaged(path, "no such file") from None
        except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
            known = False
        if not known:
            raise damaged(path, "another kind of Zarr array")
        chunks_per_shard = shard_shape[0] // chunk_shape[0]
        return cls(folder, shape, dtype, chunk_shape[0], chunks_per_shard, "zstd" in names)

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.shape[0] // self.chunk_rows)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, uncompressed."""
        return self.dtype.itemsize * math.prod(self.shape[1:])

    def rows_of(self, chunk: int) -> tuple[int, int]:
        """First row of a chunk, and the first one after it."""
        return chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, self.shape[0])

    def check_indexes(self) -> None:
        """Read the index of every shard: all files are there, none is cut short.

        Raises:
            UserError: naming the first file that is damaged.
        """
        for shard in range(-(-self.chunks // self._chunks_per_shard)):
            self._index(shard)

    def read_chunk(self, chunk: int, pieces: Sequence[np.ndarray]) -> None:
        """Read one chunk into pieces of memory; compare its crc32c at the first time.

        Args:
            chunk: its number.
            pieces: flat uint8 arrays, at most 1000, that take the bytes of chunk_rows rows one after the
                other (the last chunk is filled up with zeros to as many).

        Raises:
            UserError: bytes changed or are missing.
        """
        shard, within = divmod(chunk, self._chunks_per_shard)
        offset, length = self._index(shard)[within]
        payload: Sequence[Any] = pieces
        if self._compressed:
            payload = [np.empty(length - _CRC_BYTES, np.uint8)]
        stored = bytearray(_CRC_BYTES)
        try:
            file = os.open(self._path(shard), os.O_RDONLY)
        except FileNotFoundError:
            raise damaged(self._path(shard), "no such file") from None
        try:
            status = os.fstat(file)
            read = os.preadv(file, [*payload, stored], offset)
        finally:
            os.close(file)
        if read != length:
            raise self._damaged(chunk, "the end of the file inside")
        state = (status.st_ino, status.st_size, status.st_mtime_ns)
        if self._checked.get(chunk) != state:
            crc = 0
            for piece in payload:
                crc = google_crc32c.extend(crc, piece)
            if crc != int.from_bytes(stored, "little"):
                raise self._damaged(chunk, "a wrong checksum of")
            self._checked[chunk] = state
        if self._compressed:
            self._decompress(chunk, payload[0], pieces)

    def _decompress(self, chunk: int, payload: np.ndarray, pieces: Sequence[np.ndarray]) -> None:
        values = np.empty(self.chunk_rows * self.row_bytes, np.uint8)
        try:
            Zstd().decode(payload, values)
        except (RuntimeError, ValueError):
            raise self._damaged(chunk, "what cannot be decompressed in") from None
        start = 0
        for piece in pieces:
            piece[:] = values[start : start + len(piece)]
            start += len(piece)

    def _damaged(self, chunk: int, found: str) -> UserError:
        start, stop = self.rows_of(chunk)
        path = self._path(chunk // self._chunks_per_shard)
        return damaged(path, f"{found} chunk {chunk} (rows {start} to {stop - 1})")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as a new array."""
        rows = np.empty((stop - start, *self.shape[1:]), self.dtype)
        size, begin, end = self.row_bytes, start * self.row_bytes, stop * self.row_bytes
        flat = rows.reshape(-1).view(np.uint8)
        aside = np.empty(self.chunk_rows * size, np.uint8)
        for chunk in range(start // self.chunk_rows, -(-stop // self.chunk_rows)):
            first, last = chunk * len(aside), (chunk + 1) * len(aside)
            low, high = max(first, begin), min(last, end)
            wanted = flat[low - begin : high - begin]
            before, after = aside[: low - first], aside[high - first :]
            self.read_chunk(chunk, [before, wanted, after])
        return rows

    def _path(self, shard: int) -> Path:
        if shard not in self._paths:
            self._paths[shard] = shard_path(self.folder, shard, (0,) * (len(self.shape) - 1))
        return self._paths[shard]

    def _index(self, shard: int) -> list[list[int]]:
        """[offset, length] of each chunk in the shard."""
        if shard in self._indexes:
            return self._indexes[shard]
        path = self._path(shard)
        size = self._chunks_per_shard * _ENTRY_BYTES
        try:
            with path.open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(0, end - size - _CRC_BYTES))
                data = file.read()
        except FileNotFoundError:
            raise damaged(path, "no such file") from None
        crc = int.from_bytes(data[size:], "little")
        if len(data) != size + _CRC_BYTES or google_crc32c.value(data[:size]) != crc:
            raise damaged(path, "a truncated file or a damaged index")
        index = np.frombuffer(data[:size], "<u8").reshape(-1, 2)
        present = min(self._chunks_per_shard, self.chunks - shard * self._chunks_per_shard)
        index = index[:present].astype(np.int64)
        plain = self.chunk_rows * self.row_bytes + _CRC_BYTES
        ends = index.sum(axis=1)
        whole = (
            (index >= 0).all()
            and np.array_equal(index[:, 0], np.concatenate([[0], ends[:-1]]))
            and ends[-1] == end - size - _CRC_BYTES
            and (self._compressed or (index[:, 1] == plain).all())
            and (index[:, 1] > _CRC_BYTES).all()
        )
        if not whole:
            raise damaged(path, "an index that does not fit the file")
        self._indexes[shard] = index.tolist()
        return self._indexes[shard]
