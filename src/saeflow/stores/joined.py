"""Arrays of several windows as one: their chunks, numbered through from the first window to the last."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np

from saeflow.stores.sharded import ShardedReader


class Joined:
    """One array of each window, read like a single `ShardedReader`.

    The last chunk of any window may hold fewer rows than `chunk_rows`.

    Args:
        windows: of the same dtype, width and chunk_rows, in order.
    """

    def __init__(self, windows: Sequence[ShardedReader]) -> None:
        self.windows = windows
        self.dtype, self.chunk_rows = windows[0].dtype, windows[0].chunk_rows
        self.row_bytes = windows[0].row_bytes
        self._rows = list(accumulate((one.shape[0] for one in windows), initial=0))
        self._chunks = list(accumulate((one.chunks for one in windows), initial=0))
        self.shape = (self._rows[-1], *windows[0].shape[1:])

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return self._chunks[-1]

    def rows_of(self, chunk: int) -> tuple[int, int]:
        """First row of a chunk, and the first one after it."""
        window, own = self._own(chunk)
        start, stop = self.windows[window].rows_of(own)
        return self._rows[window] + start, self._rows[window] + stop

    def read_chunk(self, chunk: int, pieces: Sequence[np.ndarray]) -> None:
        """Read one chunk into pieces of memory, as `ShardedReader.read_chunk`."""
        window, own = self._own(chunk)
        self.windows[window].read_chunk(own, pieces)

    def check_indexes(self) -> None:
        """Read the index of every shard, as `ShardedReader.check_indexes`."""
        for one in self.windows:
            one.check_indexes()

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as a new array."""
        parts = list(self._parts(start, stop))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _parts(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Rows of each window in a range; an empty array where the range is empty."""
        if start >= stop:
            yield np.empty((0, *self.shape[1:]), self.dtype)
        for one, first, after in zip(self.windows, self._rows, self._rows[1:], strict=False):
            low, high = max(start, first), min(stop, after)
            if low < high:
                yield one.read(low - first, high - first)

    def _own(self, chunk: int) -> tuple[int, int]:
        """The window of a chunk, and the chunk's number in it."""
        window = int(np.searchsorted(self._chunks, chunk, side="right")) - 1
        return window, chunk - self._chunks[window]


Array = ShardedReader | Joined
"""Rows on disk: of one window or several."""
