"""From blocks to a store, or to a window of one: every row at its place in the shuffle, streamed in bounded memory."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from saeflow.config import n_windows
from saeflow.errors import UserError
from saeflow.installed import versions_of
from saeflow.progress import progress
from saeflow.stores.blocks import ACTIVATIONS, FORMAT, NORM, PLACE, BlockFile
from saeflow.stores.content import (
    STORE_FORMAT,
    STORE_VERSION,
    Content,
    Rows,
    in_pieces,
    metadata_digest,
)
from saeflow.stores.dtypes import DTYPES
from saeflow.stores.sharded import ShardedWriter

SUFFIX = ".zarr"
VERSIONED = ("saeflow", "torch", "numpy", "zarr", "numcodecs", "transformers")

GATHERED_BYTES = (1 << 24, 1 << 29)
SLICE_BYTES = 1 << 16
"""Rows gathered at once: as many as make reads of this size from each block on average, within the bounds.
No result depends on them."""


def finalise(
    parts: Sequence[Path],
    source_name: str,
    source: Mapping[str, Any],
    split: str,
    store: Mapping[str, Any],
    made_from: Mapping[str, Any],
    folder: Path,
    window: int = 0,
) -> dict[str, str]:
    """Merge the blocks that all parts of a window wrote into one Zarr store per hook point.

    A split of one window has its store then; the windows of others are put together by `join`.

    Of the training split, rows whose norm is above `max_norm_multiple` of the source times the median
    norm of all rows of the window are dropped; the evaluation split keeps every row.

    Args:
        parts: folders that `write_part` filled; together they hold every block once.
        source_name, source: the source's name, and its entry in `sources`.
        split: train or evaluation.
        store: one entry of `stores`.
        made_from: revisions or digests of model and data, kept in the attributes.
        folder: existing folder to write `HOOK_POINT.zarr` into.
        window: number of the window.

    Returns:
        The content digest of each hook point's store.

    Raises:
        UserError: a block is missing, damaged, or of another extraction.
    """
    limit = source.get("max_norm_multiple") if split == "train" else None
    digests = {}
    for hook_point in source["hook_points"]:
        blocks = _open_blocks(parts, hook_point, split, store, window)
        facts = {
            "source": source_name, "source_params": dict(source), "made_from": dict(made_from),
            "split": split, "hook_point": hook_point, "store_params": dict(store),
        }  # fmt: skip
        if n_windows(store, split) > 1:
            facts["window"] = window
        digests[hook_point] = _write_store(
            blocks, limit, store, facts, folder / f"{hook_point}{SUFFIX}"
        )
    return digests


def _open_blocks(
    parts: Sequence[Path], hook_point: str, split: str, store: Mapping[str, Any], window: int
) -> list[BlockFile]:
    """Every block of a window of a hook point, in order."""
    paths = sorted(path for part in parts for path in (part / hook_point).glob("*.safetensors"))
    blocks = [BlockFile.open(path) for path in paths]
    blocks.sort(key=lambda block: block.facts["block"])
    where = ", ".join(str(part) for part in parts)
    if not blocks:
        raise UserError(f"{where}: no blocks of {hook_point}. Run every part of the extraction.")
    expected = {
        "format": FORMAT, "split": split, "window": window, "hook_point": hook_point, "dtype": store["dtype"],
        "seed": store["seed"], "blocks": blocks[0].facts["blocks"], "rows": blocks[0].facts["rows"],
    }  # fmt: skip
    for block in blocks:
        for key, value in expected.items():
            if block.facts[key] != value:
                raise UserError(
                    f"{block.path}: expected a block with {key} {value}, found {block.facts[key]}. "
                    "Delete the parts and run the extraction again."
                )
    numbers = [block.facts["block"] for block in blocks]
    missing = sorted(set(range(expected["blocks"])) - set(numbers))
    if missing or len(numbers) > len(set(numbers)):
        found = f"without block {missing[0]}" if missing else "with a block given twice"
        raise UserError(
            f"{where}: expected every block of {hook_point} once, found them {found} "
            f"(of {expected['blocks']}). Run every part of the extraction."
        )
    return blocks


def _write_store(
    blocks: list[BlockFile],
    limit: float | None,
    params: Mapping[str, Any],
    facts: Mapping[str, Any],
    folder: Path,
) -> str:
    """Write one hook point's store and return its content digest."""
    dtype = DTYPES[params["dtype"]]
    raw_rows = blocks[0].facts["rows"]
    median = median_norm(blocks)
    label = f"{facts['split']} {facts['hook_point']}"
    if limit is not None and median == 0:
        raise UserError(
            f"stores.{facts['source']}: {label}: half of the activations or more are zero, so that max_norm_multiple "
            "times their median norm would drop all the others. Choose another hook point, or set "
            f"sources.{facts['source']}.max_norm_multiple to null."
        )
    largest = math.inf if limit is None else limit * median
    rows = sum(int((block.read(NORM) <= largest).sum()) for block in blocks)
    names = [name for name in blocks[0].layout if name not in (PLACE, NORM)]
    layout = {name: blocks[0].layout[name] for name in sorted(names)}
    zarr.create_group(folder)
    writers = {
        name: ShardedWriter(
            folder / name,
            (rows, *shape[1:]),
            array_dtype,
            chunk_rows=params["chunk_rows"],
            shard_rows=params["shard_rows"],
            codec=params["codec"],
        )
        for name, (array_dtype, shape, _) in layout.items()
    }
    d_in = dtype.d_in(layout[ACTIVATIONS][1][1])
    content = Content(dtype, d_in)
    try:
        for piece in in_pieces(_gathered(blocks, largest, label)):
            content.add(piece)
            for name, writer in writers.items():
                writer.append(piece[name])
        for writer in writers.values():
            writer.close()
    finally:
        for writer in writers.values():
            writer.abort()
    if problem := content.problem():
        raise UserError(
            f"stores.{facts['source']}: {label}: {problem}, and an SAE has nothing to learn from them. Choose another "
            "hook point, or look at the model's weights."
        )
    attributes = {
        "format": STORE_FORMAT, "format_version": STORE_VERSION, **facts, "dtype": dtype.name,
        "rows": rows, "d_in": d_in, "raw_rows": raw_rows, "dropped_rows": raw_rows - rows,
        "median_norm": median, **content.moments(), "arrays": content.digests(),
        "content_digest": content.digest(facts), "software": software(),
    }  # fmt: skip
    attributes["metadata_digest"] = metadata_digest(folder, attributes)
    zarr.open_group(folder, mode="r+").attrs.put(attributes)
    return str(attributes["content_digest"])


def _gathered(blocks: list[BlockFile], largest: float, label: str) -> Iterator[Rows]:
    """The rows of the store in order, without those above the largest norm, some MiB at a time.

    The memory of some rows is used again for the next.
    """
    total = blocks[0].facts["rows"]
    arrays = {name: item for name, item in blocks[0].layout.items() if name != PLACE}
    row_bytes = sum(dtype.itemsize * math.prod(shape[1:]) for dtype, shape, _ in arrays.values())
    least, most = GATHERED_BYTES
    size = max(1, min(max(least, SLICE_BYTES * len(blocks)), most) // row_bytes)
    memory = {
        name: np.empty((min(size, total), *shape[1:]), dtype)
        for name, (dtype, shape, _) in arrays.items()
    }
    cursors = [0] * len(blocks)
    for low in progress(range(0, total, size), label, "piece"):
        high = min(low + size, total)
        gathered = {name: values[: high - low] for name, values in memory.items()}
        filled = 0
        for i, block in enumerate(blocks):
            rows = block.take(cursors[i], high, block.rows * (high - low) // total)
            places = rows.pop(PLACE) - low
            for name, values in rows.items():
                gathered[name][places] = values
            cursors[i] += len(places)
            filled += len(places)
        if filled != high - low:
            raise UserError(
                f"{blocks[0].path.parent}: expected {high - low} rows for places {low} to {high - 1}, "
                f"found {filled}. Delete the parts and run the extraction again."
            )
        kept = gathered.pop(NORM) <= largest
        yield gathered if kept.all() else {name: values[kept] for name, values in gathered.items()}


def median_norm(blocks: Sequence[BlockFile]) -> float:
    """The exact median of all rows' norms, in memory that does not grow with them.

    Non-negative floats sort as their bits: one pass counts the upper 16 bits, a second one the lower 16
    of those rows that share the middle's upper bits.
    """
    total = sum(block.rows for block in blocks)
    upper = np.zeros(1 << 16, np.int64)
    for block in blocks:
        upper += np.bincount(block.read(NORM).view(np.uint32) >> 16, minlength=1 << 16)
    middles = []
    for rank in ((total - 1) // 2, total // 2):
        high = int(np.searchsorted(upper.cumsum(), rank, side="right"))
        below = int(upper[:high].sum())
        lower = np.zeros(1 << 16, np.int64)
        for block in blocks:
            bits = block.read(NORM).view(np.uint32)
            lower += np.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=1 << 16)
        low = int(np.searchsorted(lower.cumsum(), rank - below, side="right"))
        middles.append(np.array(high << 16 | low, np.uint32).view(np.float32).item())
    return sum(middles) / 2


def software() -> dict[str, str]:
    """Versions of the libraries that make a store."""
    return versions_of(VERSIONED)
