"""saeflow: sparse autoencoders with adaptive sparsity, from activations to figures."""

import importlib
import importlib.metadata
from typing import Any

_PUBLIC = {
    "load": "saeflow.saes",
    "open_store": "saeflow.stores",
    "hook": "saeflow.sources.hook_points",
    "load_model": "saeflow.sources.models",
    "load_tokenizer": "saeflow.sources.models",
    **dict.fromkeys(("ablate", "add", "clamp", "scale"), "saeflow.saes.edits"),
}
__all__ = [
    "__version__", "ablate", "add", "clamp", "hook", "load", "load_model", "load_tokenizer", "open_store", "scale",
]  # fmt: skip


def __dir__() -> list[str]:
    """The public names, before they were asked for too."""
    return __all__


def __getattr__(name: str) -> Any:
    """Import a public function when it is first asked for: reading parameters needs no torch."""
    if name == "__version__":
        return importlib.metadata.version("saeflow")
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
