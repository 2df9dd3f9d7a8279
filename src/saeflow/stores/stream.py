"""Training on one window after the other: which window a batch is of, and its rows, from a kept store or from one window alone."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import torch

from saeflow.batch import Batch
from saeflow.config import draw_of, n_windows, steps_of
from saeflow.errors import UserError
from saeflow.stores.content import window_name
from saeflow.stores.reader import Store, open_store

logger = logging.getLogger(__name__)


class _Shuffled(Protocol):
    def batches(
        self, batch_size: int, seed: int, start_batch: int = 0, *, pin: bool = False
    ) -> Iterator[Batch]: ...


class Drawn:
    """The batches of one draw, under the numbers that they have in the whole training.

    Args:
        rows: of the window.
        number: of the draw, see `draw_of`.
        store: the entry of `stores`.
    """

    def __init__(self, rows: _Shuffled, number: int, store: Mapping[str, Any]) -> None:
        self._rows, self.number, self._store = rows, number, store

    def batches(
        self, batch_size: int, seed: int, start_batch: int = 0, *, pin: bool = False
    ) -> Iterator[Batch]:
        """Batches from a number on to the last of this draw, in an order of the window's own rows that each draw has for itself.

        Raises:
            UserError: the number is one of an earlier draw.
        """
        steps = steps_of(self.number, batch_size, self._store)
        if start_batch < steps.start:
            raise UserError(
                f"training: expected to go on at step {steps.start} or later, where draw {self.number} of a window begins, "
                f"found step {start_batch}: the state after the window before is gone. Delete results/saes.groups, and run "
                "the workflow again."
            )
        chosen = hashlib.sha256(f"saeflow draw {seed} {self.number}".encode()).digest()
        left = max(0, steps.stop - start_batch)
        stream = self._rows.batches(
            batch_size, int.from_bytes(chosen[:4], "little"), start_batch - steps.start, pin=pin
        )
        return islice(stream, left)


class _AllDrawn:
    """The endless batches of draw after draw.

    Args:
        windows: rows of each, in order.
        store: the entry of `stores`.
    """

    def __init__(self, windows: Sequence[_Shuffled], store: Mapping[str, Any]) -> None:
        self._windows, self._store = windows, store

    def batches(
        self, batch_size: int, seed: int, start_batch: int = 0, *, pin: bool = False
    ) -> Iterator[Batch]:
        """Endless batches from a number on, as the stream of windows gives them."""
        draw = draw_of(start_batch, batch_size, self._store)
        while True:
            drawn = Drawn(self._windows[draw % len(self._windows)], draw, self._store)
            first = max(start_batch, steps_of(draw, batch_size, self._store).start)
            yield from drawn.batches(batch_size, seed, first, pin=pin)
            draw += 1


class WindowByWindow(_AllDrawn):
    """A kept store of several windows, for training on one after the other.

    Args:
        store: with all its rows.
    """

    targets = None

    def __init__(self, store: Store) -> None:
        self._opened = [
            open_store(store.path / window_name(number))
            for number in range(len(store.attrs["windows"]))
        ]
        super().__init__(self._opened, store.attrs["store_params"])
        self.d_in, self.model, self.positions = store.d_in, store.model, store.positions
        self.mean, self.scale = store.mean, store.scale

    @property
    def first(self) -> Store:
        """The first window."""
        return self._opened[0]

    def last_rows(self) -> _AllDrawn:
        """Each context's last row, window by window."""
        return _AllDrawn([window.last_rows() for window in self._opened], self._store)

    def log(self, batch_size: int) -> None:
        """Say how many rows of each window are read twice, or not at all, in the first epoch."""
        for number, window in enumerate(self._opened):
            _log(window, number, batch_size, self._store)


class DrawnWindow(Drawn):
    """A window whose neighbours may be gone, for training: its rows, and the store's moments, which are the first window's.

    Args:
        window: the store of the window alone.
        number: of the draw.
        first: attributes of the first window.

    Raises:
        UserError: it is another window than that of the draw, or `first` is none of the first one.
    """

    targets = None

    def __init__(self, window: Store, number: int, first: Mapping[str, Any]) -> None:
        super().__init__(window, number, window.attrs["store_params"])
        self.window = window
        self.d_in, self.model, self.positions = window.d_in, window.model, window.positions
        self.mean = torch.tensor(first["mean"], dtype=torch.float64)
        self.scale: float = first["scale"]
        expected = (number % n_windows(self._store, "train"), 0)
        if (window.attrs["window"], first["window"]) != expected:
            raise UserError(
                f"{window.path}: expected windows {expected[0]} and 0, found {window.attrs['window']} and "
                f"{first['window']}. Run the extraction again."
            )

    def last_rows(self) -> Drawn:
        """Each context's last row, of the contexts of this window."""
        return Drawn(self.window.last_rows(), self.number, self._store)

    def log(self, batch_size: int) -> None:
        """Say how many rows of the window are read twice, or not at all."""
        _log(self.window, self.number, batch_size, self._store)


def _log(window: Store, number: int, batch_size: int, store: Mapping[str, Any]) -> None:
    steps = steps_of(number, batch_size, store)
    over = len(steps) * batch_size - window.rows
    logger.info(
        "window %d of %d: %d rows, %d batches of %d; %d rows %s",
        window.attrs["window"], n_windows(store, "train"), window.rows, len(steps), batch_size, abs(over),
        "are read twice" if over > 0 else "are left out",
    )  # fmt: skip
