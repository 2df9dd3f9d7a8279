"""Evaluation: SAEs and baselines on held-out activations and with the model in the loop."""

import importlib
from typing import Any

_HOMES = {
    "Folders": "setup",
    "Setup": "setup",
    "collect_latents": "latent_pages",
    "evaluate_baselines": "evaluate",
    "evaluate_sae": "evaluate",
    "setups": "setup",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import what measures when it is first asked for: collecting tables needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"saeflow.evaluation.{_HOMES[name]}"), name)
