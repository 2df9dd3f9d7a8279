"""Evaluation: SAEs and baselines on held-out activations and with the model in the loop."""

import importlib
from typing import Any

__all__ = ["Bench", "benches", "collect_latents", "evaluate_baselines", "evaluate_sae"]


def __getattr__(name: str) -> Any:
    """Import what measures when it is first asked for: collecting tables needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("saeflow.evaluation.bench"), name)
