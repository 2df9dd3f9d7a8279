"""Activation stores: written in any number of independent parts, shuffled, checked, read in batches."""

from saeflow.stores.blocks import write_part
from saeflow.stores.merge import finalise
from saeflow.stores.reader import Store, check_compatible, open_store, verify
from saeflow.stores.stream import DrawnWindow, WindowByWindow
from saeflow.stores.windows import join, remember, window_facts

__all__ = [
    "DrawnWindow", "Store", "WindowByWindow", "check_compatible", "finalise", "join", "open_store", "remember", "verify",
    "window_facts", "write_part",
]  # fmt: skip
