"""Resamples of documents, images or samples, the same for every quantity whose interval is asked for."""

from collections.abc import Iterator, Mapping

import numpy as np


def drawn_units(units: int, settings: Mapping[str, int]) -> Iterator[np.ndarray]:
    """For each resample, how often each unit (units,) is among as many as there are, drawn with replacement.

    Args:
        units: how many there are.
        settings: resamples and seed.
    """
    random = np.random.default_rng(settings["seed"])
    for _ in range(settings["resamples"]):
        yield np.bincount(random.integers(units, size=units), minlength=units)
