"""Activation stores: written in any number of independent parts, shuffled, checked, read in batches."""

from saeflow.stores.blocks import write_part
from saeflow.stores.merge import finalise
from saeflow.stores.reader import Store, check_compatible, open_store, verify
from saeflow.stores.windows import join

__all__ = ["Store", "check_compatible", "finalise", "join", "open_store", "verify", "write_part"]
