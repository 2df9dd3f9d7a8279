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
