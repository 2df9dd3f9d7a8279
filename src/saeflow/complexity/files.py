"""A fitted probe on disk."""

from pathlib import Path
from typing import TYPE_CHECKING

from saeflow.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

PROBE = "probe.safetensors"


def read_probe(folder: Path) -> "dict[str, Tensor]":
    """weight (d_in,), bias () for raw activations; examples (n, d_in), scores (n,), ridge (), scale ().

    Raises:
        UserError: it is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / PROBE
    try:
        result: dict[str, Tensor] = load_file(path)
        return result
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Fit the probe (saeflow probe).") from None
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}). Fit the probe again.") from None
