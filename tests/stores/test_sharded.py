"""Our shards against Zarr's own reading and writing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec

from saeflow.errors import UserError
from saeflow.stores.sharded import CODECS, ShardedReader, ShardedWriter

SHAPES = [(1000, 16, 64), (64, 16, 64), (63, 16, 64), (65, 16, 64), (5, 16, 64), (129, 16, 16)]


def values(rows: int, tail: tuple[int, ...] = (6,), dtype: str = "<u2") -> np.ndarray:
    rng = np.random.default_rng(rows)
    return rng.integers(0, 100, (rows, *tail)).astype(dtype)


def write(folder: Path, data: np.ndarray, chunk_rows: int, shard_rows: int, codec: str) -> None:
    zarr.create_group(folder.parent)
    writer = ShardedWriter(
        folder, data.shape, data.dtype, chunk_rows=chunk_rows, shard_rows=shard_rows, codec=codec
    )
    for start in range(0, len(data), 7):
        writer.append(data[start : start + 7])
    writer.close()


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize(("rows", "chunk_rows", "shard_rows"), SHAPES)
def test_zarr_reads_what_we_write(
    tmp_path: Path, rows: int, chunk_rows: int, shard_rows: int, codec: str
) -> None:
    data = values(rows)
    write(tmp_path / "g.zarr" / "x", data, chunk_rows, shard_rows, codec)
    array: Any = zarr.open_group(tmp_path / "g.zarr", mode="r")["x"]
    assert (array.chunks, array.shards) == ((chunk_rows, 6), (shard_rows, 6))
    np.testing.assert_array_equal(array[:], data)


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize(("rows", "chunk_rows", "shard_rows"), SHAPES)
def test_we_read_what_zarr_writes(
    tmp_path: Path, rows: int, chunk_rows: int, shard_rows: int, codec: str
) -> None:
    data = values(rows)
    array = zarr.create_array(
        tmp_path, name="x", shape=data.shape, dtype=data.dtype, chunks=(chunk_rows, 6),
        shards=(shard_rows, 6), compressors=[*CODECS[codec], Crc32cCodec()], fill_value=0,
        config={"write_empty_chunks": True},
    )  # fmt: skip
    array[:] = data
    reader = ShardedReader.open(tmp_path / "x")
    reader.check_indexes()
    np.testing.assert_array_equal(reader.read(0, rows), data)


@pytest.mark.parametrize("tail", [(), (1,), (3, 2)])
@pytest.mark.parametrize("dtype", ["<i4", "<i8", "<f4", "|u1"])
def test_columns_of_any_shape_and_dtype_come_back(
    tmp_path: Path, tail: tuple[int, ...], dtype: str
) -> None:
    data = values(100, tail, dtype)
    write(tmp_path / "g.zarr" / "x", data, 16, 32, "none")
    reader = ShardedReader.open(tmp_path / "g.zarr" / "x")
    assert reader.dtype == data.dtype
    for start, stop in [(0, 100), (0, 0), (99, 100), (15, 17), (16, 32), (3, 90)]:
        np.testing.assert_array_equal(reader.read(start, stop), data[start:stop])


def test_chunks_of_zeros_are_stored(tmp_path: Path) -> None:
    data = np.zeros((64, 6), "<f4")  # Zarr itself would leave such chunks out
    write(tmp_path / "g.zarr" / "x", data, 16, 64, "none")
    np.testing.assert_array_equal(ShardedReader.open(tmp_path / "g.zarr" / "x").read(0, 64), data)


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_any_changed_byte_of_a_shard_is_found(tmp_path: Path, codec: str) -> None:
    data = values(40)
    folder = tmp_path / "g.zarr" / "x"
    write(folder, data, 16, 64, codec)
    shard = folder / "c" / "0" / "0"
    whole = shard.read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        shard.write_bytes(flipped)
        with pytest.raises(UserError, match="c/0/0"):
            ShardedReader.open(folder).read(0, 40)
    shard.write_bytes(whole)
    np.testing.assert_array_equal(ShardedReader.open(folder).read(0, 40), data)


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_a_byte_that_changes_after_a_first_read_is_found(tmp_path: Path, codec: str) -> None:
    folder = tmp_path / "g.zarr" / "x"
    write(folder, values(40), 16, 64, codec)
    reader = ShardedReader.open(folder)
    whole = reader.read(0, 40)
    np.testing.assert_array_equal(reader.read(0, 40), whole)
    shard = folder / "c" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[20] ^= 1
    shard.write_bytes(data)
    for _ in range(2):  # a chunk that was refused is not trusted the next time
        with pytest.raises(UserError, match="wrong checksum of chunk 0"):
            reader.read(0, 40)


@pytest.mark.parametrize("length", [0, 3, 68, 300, -1])
def test_a_truncated_shard_is_found_without_reading_it(tmp_path: Path, length: int) -> None:
    folder = tmp_path / "g.zarr" / "x"
    write(folder, values(40), 16, 64, "none")
    shard = folder / "c" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(UserError, match="c/0/0"):
        ShardedReader.open(folder).check_indexes()


def test_an_error_names_chunk_and_rows(tmp_path: Path) -> None:
    folder = tmp_path / "g.zarr" / "x"
    write(folder, values(100), 16, 32, "none")
    shard = folder / "c" / "1" / "0"
    data = bytearray(shard.read_bytes())
    data[16 * 6 * 2 + 4 + 1] ^= 1  # in the second chunk of the second shard
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"c/1/0: .* chunk 3 \(rows 48 to 63\)"):
        ShardedReader.open(folder).read(0, 100)


def test_a_missing_shard_is_not_zeros(tmp_path: Path) -> None:
    folder = tmp_path / "g.zarr" / "x"
    write(folder, values(100), 16, 32, "none")
    (folder / "c" / "2" / "0").unlink()
    with pytest.raises(UserError, match=r"c/2/0.*no such file"):
        ShardedReader.open(folder).check_indexes()


@pytest.mark.parametrize(
    "array",
    [
        {"chunks": (16, 6)},
        {"chunks": (16, 6), "shards": (32, 6)},
        {"chunks": (16, 3), "shards": (32, 6), "compressors": [Crc32cCodec()]},
    ],
    ids=["no shards", "no checksum", "split columns"],
)
def test_other_zarr_arrays_are_refused(tmp_path: Path, array: dict[str, Any]) -> None:
    zarr.create_array(tmp_path, name="x", shape=(64, 6), dtype="<f4", **array)
    with pytest.raises(UserError, match="another kind of Zarr array"):
        ShardedReader.open(tmp_path / "x")
