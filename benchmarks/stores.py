"""Codecs, dtypes, chunk and shard shapes on real activations; the loader against a sequential read; SAEs on int8 rows.

    python benchmarks/stores.py [PROJECT]
    python benchmarks/stores.py --only saes      # the others stay as they are

Reads the demo's language model (`make demo` first), under results/ of the project. Everything that is
compared is timed in turns in one process. Written to benchmarks/results/stores.md and .csv.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numcodecs
import numcodecs.blosc
import numpy as np
import pandas as pd
import torch
import zarr
from stored_saes import sae_costs
from tables import in_turns, last_tables, peak_memory, project_of, ratio, replaced, write
from torch import Tensor

from saeflow.config import load_params
from saeflow.sources import open_source
from saeflow.stores.batches import shuffled_batches
from saeflow.stores.dtypes import DTYPES
from saeflow.stores.permutation import Permutation
from saeflow.stores.sharded import ShardedReader, ShardedWriter

SOURCE = "smollm2"
CONTEXTS = 96
CHUNK_ROWS, SHARD_ROWS, BATCH = 512, 65536, 1024
STORE_ROWS = 196_608  # of the stores that are read in batches
REPEATS = 7

CODECS: dict[str, Any] = {
    "none": None,
    "zstd 1": numcodecs.Zstd(1),
    "zstd 3": numcodecs.Zstd(3),
    "zstd 9": numcodecs.Zstd(9),
    "lz4": numcodecs.LZ4(),
    "zlib 1": numcodecs.Zlib(1),
    **{
        f"blosc {name} {level} {kind}": numcodecs.Blosc(name, level, shuffle)
        for name, level in (("lz4", 5), ("zstd", 1), ("zstd", 5))
        for kind, shuffle in (("shuffle", 1), ("bitshuffle", 2))
    },
}


def activations(project: Path) -> Tensor:
    """(rows, d_in) float32 of the training split, shuffled as in a store."""
    params = load_params(project / "params.yaml")["sources"][SOURCE]
    source = open_source(params, project / "results" / "sources" / SOURCE, "cpu")
    x = source.block("train", 0, CONTEXTS).activations[params["hook_points"][0]]
    norms = x.norm(dim=1)
    x = x[norms <= params["max_norm_multiple"] * norms.median()]
    return x[torch.from_numpy(Permutation(len(x), 0).forward(np.arange(len(x))))]


def dtype_costs(x: Tensor) -> pd.DataFrame:
    """Measure the error of rounding to a dtype as an SAE's error is measured."""
    exact = x.double()
    rows = []
    for name, dtype in DTYPES.items():
        error = (dtype.decode(dtype.encode(x)).double() - exact).square().sum()
        rows.append(
            {
                "dtype": name,
                "bytes per row": dtype.width(x.shape[1]) * dtype.storage.itemsize,
                "FVU": f"{error / (exact - exact.mean(0)).square().sum():.1e}",
                "NMSE": f"{error / exact.square().sum():.1e}",
                "largest absolute value / largest of dtype": f"{x.abs().max() / torch.finfo(dtype.torch).max:.1e}",
            }
        )
    return pd.DataFrame(rows)


def dtype_rates(x: Tensor, folder: Path) -> pd.DataFrame:
    """Rows a second of encoding and writing, and of shuffled batches in float32, by dtype."""
    stores, writing = {}, {}
    for name, dtype in DTYPES.items():
        path = folder / f"dtype-{name}.zarr"
        began = time.perf_counter()
        stored = dtype.encode(x)
        writing[name] = len(x) / (time.perf_counter() - began)
        stores[name] = Stored(path, stored, CHUNK_ROWS, SHARD_ROWS, "none", name)

    def epoch(store: Stored) -> None:
        for batch in islice(store.stream, STORE_ROWS // BATCH):
            batch.x.float()

    for store in stores.values():
        epoch(store)
    times = in_turns(
        {name: lambda store=store: epoch(store) for name, store in stores.items()},  # type: ignore[misc]
        REPEATS,
    )
    for store in stores.values():
        store.stream.close()
    return pd.DataFrame(
        {
            "dtype": name,
            "bytes per row": round(store.bytes / STORE_ROWS),
            "encode rows/s": round(writing[name]),
            "write rows/s": round(STORE_ROWS / store.write_seconds),
            "read rows/s": round(STORE_ROWS / statistics.median(times[name])),
            "rate over bfloat16": round(ratio(times["bfloat16"], times[name]), 2),
        }
        for name, store in stores.items()
    )


def codec_costs(x: Tensor) -> pd.DataFrame:
    """Size and speed of each codec on chunks of CHUNK_ROWS rows, on one thread."""
    numcodecs.blosc.use_threads = False
    rows = []
    for name, dtype in DTYPES.items():
        stored = dtype.encode(x)
        chunks = [stored[i : i + CHUNK_ROWS] for i in range(0, len(x) - CHUNK_ROWS + 1, CHUNK_ROWS)]
        out = np.empty_like(chunks[0])
        raw = len(chunks) * chunks[0].nbytes
        for codec_name, codec in CODECS.items():
            if codec is None:
                writing = in_turns({"write": lambda: [c.copy() for c in chunks]}, 3)["write"]  # noqa: B023
                reading, size = writing, raw
            else:
                encoded = [codec.encode(chunk) for chunk in chunks]
                size = sum(len(data) for data in encoded)
                times = in_turns(
                    {
                        "write": lambda: [codec.encode(c) for c in chunks],  # noqa: B023
                        "read": lambda: [codec.decode(data, out) for data in encoded],  # noqa: B023
                    },
                    3,
                )
                writing, reading = times["write"], times["read"]
            rows.append(
                {
                    "dtype": name,
                    "codec": codec_name,
                    "bytes per row": round(size / len(chunks) / CHUNK_ROWS),
                    "of raw": round(size / raw, 3),
                    "write GB/s": round(raw / 1e9 / statistics.median(writing), 2),
                    "read GB/s": round(raw / 1e9 / statistics.median(reading), 2),
                }
            )
    return pd.DataFrame(rows)


class Stored:
    """Activations on disk in one layout, and a stream of batches of them."""

    def __init__(
        self,
        folder: Path,
        stored: np.ndarray,
        chunk_rows: int,
        shard_rows: int,
        codec: str,
        dtype: str = "bfloat16",
    ) -> None:
        shape = (STORE_ROWS, stored.shape[1])
        zarr.create_group(folder)
        writer = ShardedWriter(
            folder / "activations",
            shape,
            stored.dtype,
            chunk_rows=chunk_rows,
            shard_rows=shard_rows,
            codec=codec,
        )
        began = time.perf_counter()
        for start in range(0, STORE_ROWS, len(stored)):
            writer.append(stored[: STORE_ROWS - start])
        writer.close()
        self.write_seconds = time.perf_counter() - began
        self.array = ShardedReader.open(folder / "activations")
        self.bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        self.stream = shuffled_batches(self.array, DTYPES[dtype], BATCH, 0, 0, False)

    def epoch(self) -> None:
        """Read as many batches as an epoch has, from a stream that goes on."""
        for _ in islice(self.stream, STORE_ROWS // BATCH):
            pass

    def first(self, batch_size: int = BATCH) -> None:
        """Open the array and a stream, read an epoch, close it."""
        array = ShardedReader.open(self.array.folder)
        stream = shuffled_batches(array, DTYPES["bfloat16"], batch_size, 0, 0, False)
        for _ in islice(stream, STORE_ROWS // batch_size):
            pass
        stream.close()


def sequential(path: Path, batch_bytes: int, again: np.ndarray | None) -> None:
    """Copy a memory-mapped file batch by batch, into new memory or into the same."""
    mapped = np.memmap(path, np.uint8, "r")
    for start in range(0, len(mapped), batch_bytes):
        piece = mapped[start : start + batch_bytes]
        if again is None:
            piece.copy()
        else:
            again[: len(piece)] = piece


def loader(stored: np.ndarray, folder: Path) -> pd.DataFrame:
    """Rates of shuffled batches of the default layout over that of a sequential read, nothing else held."""
    data = np.resize(stored, (STORE_ROWS, stored.shape[1]))
    raw = folder / "raw"
    data.tofile(raw)
    size, batch_bytes = data.nbytes, BATCH * data.strides[0]
    del data
    store = Stored(folder / "default.zarr", stored, CHUNK_ROWS, SHARD_ROWS, "none")
    again = np.empty(batch_bytes, np.uint8)
    base = "memory map, copied to the same memory"
    rows = {base: (size / 1e9, 1.0)}
    works: dict[str, Callable[[], object]] = {
        "memory map, copied to new memory": lambda: sequential(raw, batch_bytes, None),
        "shuffled batches, a further epoch": store.epoch,
        "shuffled batches, a first epoch (checksums, new threads and memory)": store.first,
        f"shuffled batches of {8 * BATCH}, a first epoch": lambda: store.first(8 * BATCH),
    }
    bases = []
    for name, work in works.items():
        work()
        turns = {base: lambda: sequential(raw, batch_bytes, again), name: work}
        times = in_turns(turns, REPEATS)
        bases += times[base]
        rows[name] = (size / 1e9 / statistics.median(times[name]), ratio(times[base], times[name]))
    rows[base] = (size / 1e9 / statistics.median(bases), 1.0)
    store.stream.close()
    return pd.DataFrame(
        {"read": name, "GB/s": round(rate, 2), "rate over sequential read": round(over, 2)}
        for name, (rate, over) in rows.items()
    )


def layouts(stored: np.ndarray, folder: Path) -> pd.DataFrame:
    """Chunk and shard shapes and codecs against the default, and zarr's own reading."""
    default = Stored(folder / "layouts-default.zarr", stored, CHUNK_ROWS, SHARD_ROWS, "none")
    group: Any = zarr.open_group(default.array.folder.parent, mode="r")
    size = STORE_ROWS * stored.strides[0]
    rows = []
    for chunk, shard, codec in [
        (64, SHARD_ROWS, "none"),
        (256, SHARD_ROWS, "none"),
        (CHUNK_ROWS, 8192, "none"),
        (CHUNK_ROWS, SHARD_ROWS, "none"),
        (1024, SHARD_ROWS, "none"),
        (4096, SHARD_ROWS, "none"),
        (CHUNK_ROWS, SHARD_ROWS, "zstd"),
    ]:
        layout = Stored(folder / f"{chunk}-{shard}-{codec}.zarr", stored, chunk, shard, codec)
        layout.epoch()
        default.epoch()
        times = in_turns({"default": default.epoch, "layout": layout.epoch}, REPEATS)
        layout.stream.close()
        rows.append(
            {
                "layout": f"chunks of {chunk}, shards of {shard}, {codec}",
                "rate over the default": round(ratio(times["default"], times["layout"]), 2),
                "bytes per row": round(layout.bytes / STORE_ROWS),
                "write GB/s": round(size / 1e9 / layout.write_seconds, 2),
            }
        )
    whole = [slice(i, i + 8192) for i in range(0, STORE_ROWS, 8192)]
    zarr_reads = lambda: [group["activations"][rows] for rows in whole]  # noqa: E731
    times = in_turns({"default": default.epoch, "zarr": zarr_reads}, 3)
    over = round(ratio(times["default"], times["zarr"]), 2)
    rows.append({"layout": "default, zarr's own reading in order", "rate over the default": over})
    default.stream.close()
    return pd.DataFrame(rows).astype(object).fillna("")


def read_epochs(path: Path, epochs: int) -> float:
    """MiB at the peak of reading some epochs, in a fresh process."""
    torch.set_num_threads(1)
    array = ShardedReader.open(path)

    def read() -> None:
        stream = shuffled_batches(array, DTYPES["bfloat16"], BATCH, 0, 0, False)
        for _ in islice(stream, epochs * array.shape[0] // BATCH):
            pass
        stream.close()

    return peak_memory(read)


def loader_memory(stored: np.ndarray, folder: Path) -> pd.DataFrame:
    """Peak memory of reading stores of several sizes."""
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for count in (1, 4, 16):
            total = count * STORE_ROWS // 16
            path = folder / f"memory-{count}.zarr"
            zarr.create_group(path)
            writer = ShardedWriter(
                path / "activations",
                (total, stored.shape[1]),
                stored.dtype,
                chunk_rows=CHUNK_ROWS,
                shard_rows=SHARD_ROWS,
                codec="none",
            )
            for start in range(0, total, len(stored)):
                writer.append(stored[: total - start])
            writer.close()
            growth = pool.apply(read_epochs, (path / "activations", 3))
            rows.append(
                {
                    "store MiB": round(total * stored.strides[0] / 2**20),
                    "added peak memory MiB": round(growth, 1),
                }
            )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Layouts, dtypes and codecs of stores.")
    parser.add_argument("project", type=Path, nargs="?", help="project where `make demo` ran")
    parser.add_argument(
        "--only", choices=("reading", "dtypes", "saes", "codecs"), help="tables that are made anew"
    )
    chosen = parser.parse_args()
    project = project_of(chosen.project, SOURCE)
    x = activations(project)
    torch.set_num_threads(1)
    stored = DTYPES["bfloat16"].encode(x)
    made: dict[str, pd.DataFrame] = {}
    with tempfile.TemporaryDirectory(dir=project / "results") as name:
        folder = Path(name)
        if chosen.only in (None, "reading"):
            made["Shuffled batches against a sequential read"] = loader(stored, folder)
            made["Layouts"] = layouts(stored, folder)
            made["Memory of the loader"] = loader_memory(stored, folder)
        if chosen.only in (None, "dtypes"):
            made["Cost of a dtype"] = dtype_costs(x)
            made["Rates of a dtype"] = dtype_rates(x, folder)
    if chosen.only in (None, "saes"):
        made |= sae_costs(project)
    if chosen.only in (None, "codecs"):
        made["Codecs"] = codec_costs(x)
    write(
        "stores",
        replaced(last_tables("stores"), made),
        f"{len(x)} rows of {SOURCE}, width {x.shape[1]}, torch on one thread; stores of {STORE_ROWS} bfloat16 rows, "
        f"batches of {BATCH}, files in the page cache; chunks of {CHUNK_ROWS} rows for the codecs.",
    )


if __name__ == "__main__":
    main()
