"""Windows of a store: into how many a training split is cut, and which contexts each holds.

Contexts come in random order, so consecutive ones are a sample of all. Only the parameters decide how many windows there
are: the workflow knows it before a model is fetched.
"""

from collections.abc import Mapping
from typing import Any


def n_windows(store: Mapping[str, Any], split: str) -> int:
    """Number of windows of a split: as many as hold `window_rows` rows at most; one where that is not given.

    Args:
        store: one entry of `stores`.
        split: train or evaluation; the second is never cut.
    """
    rows = store.get("window_rows") if split == "train" else None
    return 1 if rows is None else -(-int(store["train_rows"]) // int(rows))


def contexts_of(window: int, windows: int, contexts: int) -> range:
    """Contexts of a window: all windows are equally large, by one context at most."""
    return range(window * contexts // windows, (window + 1) * contexts // windows)


def draw_of(step: int, batch_size: int, store: Mapping[str, Any]) -> int:
    """Number of the draw that a step's batch comes from, where training goes window by window.

    Draws count the windows of all epochs: with n windows, draw d is window d mod n in epoch d // n. A step belongs to the
    draw that its first row would lie in if every window held its share of `train_rows`, so that the parameters alone say
    which steps a draw has.
    """
    return step * batch_size * n_windows(store, "train") // int(store["train_rows"])


def steps_of(draw: int, batch_size: int, store: Mapping[str, Any]) -> range:
    """Steps whose batches come from a draw."""
    each = batch_size * n_windows(store, "train")
    first, after = (-(-number * int(store["train_rows"]) // each) for number in (draw, draw + 1))
    return range(first, after)
