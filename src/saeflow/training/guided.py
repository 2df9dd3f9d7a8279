"""A k that another SAE found: its mean L0 on training activations."""

import dataclasses
import logging
from typing import Any

import torch

from saeflow.config import SAEConfig

logger = logging.getLogger(__name__)

_ROWS, _BATCH = 2**14, 1024


def with_found_k(config: SAEConfig, guide: Any, store: Any) -> SAEConfig:
    """The run with k at the guide's mean L0, rounded, at least 1 and at most d_sae.

    Args:
        config: of a run whose `guide` names an SAE.
        guide: that SAE, as `saeflow.load` returns it.
        store: the training split, or its first window, whose first 16,384 rows (a random sample of it) are encoded.
    """
    rows, active = min(store.rows, _ROWS), 0
    with torch.inference_mode():
        for start in range(0, rows, _BATCH):
            x = store.read(start, min(start + _BATCH, rows)).float()
            active += int((guide.encode(x) != 0).sum())
    k = min(max(round(active / rows), 1), config.d_sae)
    logger.info("%s: k = %d, the mean L0 (%.2f) of %s", config.name, k, active / rows, config.guide)
    return with_k(config, k)


def with_k(config: SAEConfig, k: int) -> SAEConfig:
    """The run with a k that was found."""
    return dataclasses.replace(config, options={**config.options, "k": k})
