"""Shuffled batches of a store, read ahead on threads of their own.

The rows of each window of a store are shuffled one by one when it is written: any of them, in any order that
does not look at them, are a uniform sample of it. So an epoch may read whole chunks, in a random order and some at a time, put
the runs of rows of such a group in a random order, and cut it into batches: every epoch has other batches,
and rows go from the file to their place in a batch without another copy.
"""

import math
import os
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from saeflow.batch import Batch
from saeflow.stores.dtypes import DTYPES, Dtype, ScaledRows
from saeflow.stores.joined import Array

GROUP_BYTES = 1 << 24
"""Size of a group, or one batch if that is more; smaller ones cost more in handing over than in reading."""
RUN_ROWS = 64
"""Rows that stay together when a group is shuffled."""
MOST_RUNS = 500
"""Most runs of a chunk: the operating system takes about twice as many places in one read."""
READERS, MOST_READERS = 2, 12
"""Groups read at once, each on a thread of its own: for a CPU, and at most for a GPU, whose steps are shorter than a read."""

_PAGE = 4096

S = TypeVar("S")
T = TypeVar("T")


def shuffled_batches(
    array: Array, dtype: Dtype, batch_size: int, seed: int, start_batch: int, pin: bool
) -> Iterator[Batch]:
    """Endless shuffled batches; each epoch gives every row once, batches run across its end.

    Batch b depends on the store, batch_size, seed and b only: a stream that starts at b goes on as one that
    came to b. Reading on stops when the iterator is closed or dropped.

    Args:
        array: activations (rows, d_in).
        dtype: of the activations.
        batch_size: rows per batch.
        seed: of the order.
        start_batch: number of the first batch; what is before it is not read.
        pin: give tensors in page-locked memory, for copies to a GPU that do not block.

    Yields:
        Rows (batch_size, d_in) in the store's dtype, which are their own targets.

    Raises:
        UserError: a chunk is damaged.
    """
    memory = _Memory(DTYPES[dtype.given], pin)

    def read(group: _Group) -> Tensor:
        rows = memory.take((group.rows, dtype.d_in(array.shape[1])))
        if isinstance(dtype, ScaledRows):
            stored = np.empty((group.rows, array.shape[1]), dtype.storage)
            _read_runs(array, group, stored)
            dtype.decode(stored, rows)
        else:
            _read_runs(array, group, dtype.bits_of(rows))
        return rows[group.skip :]

    groups = _groups(array, batch_size, seed, start_batch)
    return _cut(read_ahead(groups, read, readers_for(pin)), batch_size, pin)


def readers_for(pin: bool) -> int:
    """Return how many groups are read at once: for a GPU, by three quarters of the cores that this process may use."""
    cores = len(os.sched_getaffinity(0))
    return min(MOST_READERS, max(READERS, 3 * cores // 4)) if pin else READERS


def batches_in_memory(
    rows: Tensor, batch_size: int, seed: int, start_batch: int
) -> Iterator[Batch]:
    """Endless shuffled batches of rows (n, d_in) in memory, with the guarantees of `shuffled_batches`."""
    epoch, skip = divmod(start_batch * batch_size, len(rows))

    def epochs(epoch: int, skip: int) -> Iterator[Tensor]:
        while True:
            order = np.random.default_rng([seed, epoch]).permutation(len(rows))
            yield rows[torch.from_numpy(order[skip:])]
            epoch, skip = epoch + 1, 0

    return _cut(epochs(epoch, skip), batch_size, False)


@dataclass(frozen=True)
class _Group:
    """Chunks to read together, the seed of the order of their rows, and how many of these to leave out."""

    chunks: list[int]
    rows: int
    seed: list[int]
    skip: int


def _groups(array: Array, batch_size: int, seed: int, start_batch: int) -> Iterator[_Group]:
    """The groups of all epochs, from the one with a batch on."""
    batches = max(1, GROUP_BYTES // (batch_size * array.row_bytes))
    size = -(-batches * batch_size // array.chunk_rows)  # chunks of a group
    epoch, skip = divmod(start_batch * batch_size, array.shape[0])
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(array.chunks)
        for number in range(-(-array.chunks // size)):
            chunks = order[number * size : (number + 1) * size].tolist()
            rows = sum(stop - start for start, stop in map(array.rows_of, chunks))
            if skip < rows:
                yield _Group(chunks, rows, [seed, epoch, number], skip)
            skip = max(0, skip - rows)
        epoch += 1


def _read_runs(array: Array, group: _Group, out: np.ndarray) -> None:
    """Read a group's chunks straight into `out` (rows, d_in), their runs of rows in a random order."""
    size, row = array.chunk_rows * array.row_bytes, array.row_bytes
    longest = max(RUN_ROWS, -(-array.chunk_rows // MOST_RUNS)) * row
    counts, lengths = [], []  # runs of each chunk; bytes of each run, in the order of the file
    for chunk in group.chunks:
        start, stop = array.rows_of(chunk)
        whole, rest = divmod((stop - start) * row, longest)
        runs = [longest] * whole + [rest] * (rest > 0)
        counts.append(len(runs))
        lengths += runs
    ordered = np.array(lengths)
    order = np.random.default_rng(group.seed).permutation(len(ordered))
    starts = np.empty_like(ordered)
    starts[order] = ordered[order].cumsum() - ordered[order]
    flat = out.reshape(-1).view(np.uint8)
    pieces = [flat[a : a + n] for a, n in zip(starts.tolist(), lengths, strict=True)]
    first = 0
    for chunk, count in zip(group.chunks, counts, strict=True):
        places = pieces[first : first + count]
        first += count
        filled = sum(map(len, places))
        if filled < size:  # a window's last chunk, filled up with zeros
            places.append(np.empty(size - filled, np.uint8))
        array.read_chunk(chunk, places)


class _Memory:
    """Memory for groups, used again once no tensor refers to it: fresh pages cost as much as the reading.

    Page-locked memory is left to torch, whose allocator also waits for copies to a GPU.
    """

    def __init__(self, dtype: Dtype, pin: bool) -> None:
        self._dtype, self._pin = dtype, pin
        self._free: deque[np.ndarray] = deque()

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised tensor."""
        if self._pin:
            return torch.empty(shape, dtype=self._dtype.torch, pin_memory=True)
        count = math.prod(shape)
        try:
            block = self._free.pop()
        except IndexError:
            block = np.empty(0)
        if len(block) < count:
            block = _off_page(count, self._dtype.storage)
        lease = block.view()  # lives as long as any tensor made of it
        weakref.finalize(lease, self._free.append, block).atexit = False
        return self._dtype.decode(lease)[:count].view(shape)


def _off_page(count: int, dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory that starts in the middle of a page.

    Chunks lie a little after page starts in their file, and several CPUs copy at an eighth of their speed
    between addresses that are nearly, not quite, at the same place in their pages.
    """
    raw = np.empty(count * dtype.itemsize + _PAGE, np.uint8)
    start = (_PAGE // 2 - raw.ctypes.data) % _PAGE
    return raw[start : start + count * dtype.itemsize].view(dtype)


def _cut(groups: Iterator[Tensor], batch_size: int, pin: bool) -> Iterator[Batch]:
    """The rows of all groups in order, batch_size at a time; copies only where a batch spans groups."""
    parts: list[Tensor] = []
    missing = batch_size
    for group in groups:
        start = 0
        while start < len(group):
            part = group[start : start + missing]
            parts.append(part)
            start += len(part)
            missing -= len(part)
            if not missing:
                yield Batch.of(_join(parts, pin))
                parts, missing = [], batch_size


def _join(parts: list[Tensor], pin: bool) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    return torch.cat(parts, out=torch.empty(shape, dtype=parts[0].dtype, pin_memory=pin))


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Give the batches on a device; a GPU copies each, on a stream of its own, while the one before is used.

    Args:
        batches: on the CPU, for a GPU in page-locked memory.
        device: where they go.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.map(lambda rows: rows.to(device))
        return
    stream = torch.cuda.Stream(device)
    coming: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            moved = batch.map(lambda rows: rows.to(device, non_blocking=True))
        ready, coming = coming, (moved, stream.record_event())
        del batch, moved
        if ready is not None:
            yield _arrived(*ready)
            del ready
    if coming is not None:
        yield _arrived(*coming)


def _arrived(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """Let the current stream use a batch of another stream, once it is copied."""
    current = torch.cuda.current_stream(batch.x.device)
    current.wait_event(copied)
    for rows in batch.tensors():
        rows.record_stream(current)
    return batch


def read_ahead(items: Iterator[S], read: Callable[[S], T], readers: int = READERS) -> Iterator[T]:
    """Give read(item) of each item in order, read ahead by so many threads, one more than they are.

    Errors of the threads are raised here; they end before this iterator's `close` returns.
    """
    pool, is_finalizing = ThreadPoolExecutor(readers, "saeflow-batches"), sys.is_finalizing
    try:
        reading = deque(pool.submit(read, item) for item in islice(items, readers + 1))
        while reading:
            done = reading.popleft().result()
            reading.extend(pool.submit(read, item) for item in islice(items, 1))
            yield done
            del done
    finally:
        # Else the interpreter has ended the threads itself, and modules may be gone.
        if not is_finalizing():
            pool.shutdown(cancel_futures=True)
