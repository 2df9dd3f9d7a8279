"""Needs of a parameter file's jobs: rows, disk, memory and hours, from measured rates.

Costs are counted in multiplications and bytes, and divided by what a machine was measured to do (`make bench`
writes it). A forward pass is counted by running the model without memory (torch's fake tensors) up to its
hook points.
"""

from saeflow.needs.passes import Pass, count_passes, one_pass
from saeflow.needs.rates import Rates
from saeflow.needs.steps import Need, Needs
from saeflow.needs.text import as_text

__all__ = ["Need", "Needs", "Pass", "Rates", "as_text", "count_passes", "one_pass"]
