"""Shuffled batches of a store, read ahead on a thread of their own.

The rows of a store are shuffled one by one when it is written: any of them, in any order that does not look
at them, are a uniform sample. So an epoch may read whole chunks, in a random order and some at a time, put
the runs of rows of such a group in a random order, and cut it into batches: every epoch has other batches,
and rows go from the file to their place in a batch without another copy.
"""

import queue
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from saeflow.stores.dtypes import Dtype
from saeflow.stores.sharded import ShardedReader

GROUP_BYTES = 1 << 23
"""Size of a group, or one batch if that is more; larger ones leave the CPU's cache."""
RUN_ROWS = 64
"""Rows that stay together when a group is shuffled."""
MOST_RUNS = 500
"""Most runs of a chunk: the operating system takes about twice as many places in one read."""
AHEAD = 4
"""Batches read ahead, beside the group being read."""

T = TypeVar("T")


def shuffled_batches(
    array: ShardedReader, dtype: Dtype, batch_size: int, seed: int, start_batch: int, pin: bool
) -> Iterator[Tensor]:
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
        (batch_size, d_in) in the store's dtype.

    Raises:
        UserError: a chunk is damaged.
    """
    groups = _groups(array, dtype, batch_size, seed, start_batch, pin)
    return read_ahead(_cut(groups, batch_size, pin), AHEAD)


def _groups(
    array: ShardedReader, dtype: Dtype, batch_size: int, seed: int, start_batch: int, pin: bool
) -> Iterator[Tensor]:
    """(rows, d_in) the shuffled rows of one group of chunks after the other, from a batch on."""
    batches = max(1, GROUP_BYTES // (batch_size * array.row_bytes))
    size = -(-batches * batch_size // array.chunk_rows)  # chunks of a group
    epoch, skip = divmod(start_batch * batch_size, array.shape[0])
    memory = _Memory((size * array.chunk_rows, *array.shape[1:]), dtype, pin)
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(array.chunks)
        for number in range(-(-array.chunks // size)):
            chunks = order[number * size : (number + 1) * size]
            rows = sum(stop - start for start, stop in map(array.rows_of, chunks.tolist()))
            if skip >= rows:
                skip -= rows
                continue
            group = memory.take(rows)
            rng = np.random.default_rng([seed, epoch, number])
            _read_runs(array, chunks.tolist(), dtype.bits_of(group), rng)
            yield group[skip:]
            skip = 0
        epoch += 1


def _read_runs(
    array: ShardedReader, chunks: list[int], out: np.ndarray, rng: np.random.Generator
) -> None:
    """Read chunks straight into `out` (rows, d_in), their runs of rows in a random order."""
    size, row = array.chunk_rows * array.row_bytes, array.row_bytes
    longest = max(RUN_ROWS, -(-array.chunk_rows // MOST_RUNS)) * row
    runs = []  # (chunk, bytes), in the order of the file
    for chunk in chunks:
        start, stop = array.rows_of(chunk)
        whole, rest = divmod((stop - start) * row, longest)
        runs += [(chunk, longest)] * whole + [(chunk, rest)] * (rest > 0)
    order = rng.permutation(len(runs))
    lengths = np.array([length for _, length in runs])
    starts = np.empty_like(lengths)
    starts[order] = lengths[order].cumsum() - lengths[order]
    flat = out.reshape(-1).view(np.uint8)
    pieces: dict[int, list[np.ndarray]] = {chunk: [] for chunk in chunks}
    for (chunk, length), start in zip(runs, starts.tolist(), strict=True):
        pieces[chunk].append(flat[start : start + length])
    for chunk in chunks:
        start, stop = array.rows_of(chunk)
        padding = np.empty(size - (stop - start) * row, np.uint8)
        array.read_chunk(chunk, [*pieces[chunk], padding])


class _Memory:
    """Memory for groups, used again once no tensor refers to it: fresh pages cost as much as the reading.

    Page-locked memory is left to torch, whose allocator also waits for copies to a GPU.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Dtype, pin: bool) -> None:
        self._shape, self._dtype, self._pin = shape, dtype, pin
        self._free: deque[np.ndarray] = deque()

    def take(self, rows: int) -> Tensor:
        """(rows, ...) uninitialised, rows at most those of the shape."""
        if self._pin:
            shape = (rows, *self._shape[1:])
            return torch.empty(shape, dtype=self._dtype.torch, pin_memory=True)
        block = self._free.pop() if self._free else np.empty(self._shape, self._dtype.storage)
        lease = block.view()  # lives as long as any tensor made of it
        weakref.finalize(lease, self._free.append, block).atexit = False
        return self._dtype.decode(lease)[:rows]


def _cut(groups: Iterator[Tensor], batch_size: int, pin: bool) -> Iterator[Tensor]:
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
                yield _join(parts, pin)
                parts, missing = [], batch_size


def _join(parts: list[Tensor], pin: bool) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    joined = torch.cat(parts)
    return joined.pin_memory() if pin else joined


class _End:
    """What the reading thread puts last."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def read_ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """Give the same items, made on another thread up to `depth` ahead.

    Errors of the thread are raised here; it ends before this iterator's `close` returns.
    """
    ready: queue.Queue[T | _End] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: T | _End) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def work() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
        except BaseException as caught:  # raised again by the consumer
            error = caught
        put(_End(error))

    thread = threading.Thread(target=work, name="saeflow-batches", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stopped.set()
        thread.join()
