"""A trained SAE on disk: weights.safetensors and config.json, in raw-activation units."""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from saeflow.errors import UserError
from saeflow.files import atomic_file, read_json, write_json
from saeflow.saes.base import SAE
from saeflow.saes.variants import build

FORMAT = "saeflow-sae"
FORMAT_VERSION = 1
WEIGHTS, CONFIG = "weights.safetensors", "config.json"
_KEYS = ("variant", "options", "d_in", "d_sae")


def save(state: Mapping[str, torch.Tensor], folder: Path, config: Mapping[str, Any]) -> None:
    """Write an SAE into an existing folder.

    Args:
        state: its `state_dict`.
        config: at least variant, options, d_in and d_sae; whatever else describes the SAE.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with atomic_file(folder / WEIGHTS) as staged:
        save_file(tensors, staged)
    write_json(folder / CONFIG, {"format": FORMAT, "format_version": FORMAT_VERSION, **config})


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a trained SAE.

    Raises:
        UserError: it is missing, damaged or not an SAE of this format.
    """
    path = folder / CONFIG
    config = read_json(path)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f"{path}: expected the config of a saeflow SAE, found another file.")
    if config.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: expected format version {FORMAT_VERSION}, found {config.get('format_version')}. "
            "Train the SAE again, or use the saeflow it was made with."
        )
    if missing := [key for key in _KEYS if key not in config]:
        raise UserError(f"{path}: the key {', '.join(missing)} is missing. Train the SAE again.")
    for key in ("d_in", "d_sae"):
        if type(config[key]) is not int or config[key] < 1:
            raise UserError(
                f"{path}: {key}: expected a whole number above 0, found {config[key]!r}. "
                "Train the SAE again."
            )
    return config


def load(folder: Path | str) -> SAE:
    """Load a trained SAE, without gradients for its weights; it takes and returns raw activations.

    Raises:
        UserError: a file is missing or damaged, or weights do not fit the config.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        below = [path.parent for path in islice(folder.rglob(CONFIG), 3)] if folder.is_dir() else []
        found = "no such folder" if not folder.is_dir() else f"no {CONFIG} in it"
        near = f" Below it: {', '.join(map(str, below))}." if below else ""
        raise UserError(
            f"{folder}: expected the folder of an SAE, as results/saes/SOURCE/HOOK_POINT/ENTRY/LABEL, found {found}. "
            f"Fix the path.{near}"
        )
    config = read_config(folder)
    path = folder / WEIGHTS
    described = (config["variant"], config["d_in"], config["d_sae"], config["options"])
    try:
        with torch.device("meta"):  # what to expect, before memory is taken for it
            expected = build(*described).state_dict()
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Train the SAE again.") from None
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}). Train the SAE again.") from None
    wrong = {
        name: f"{name} (expected {_kind(expected.get(name))}, found {_kind(tensors.get(name))})"
        for name in sorted(expected.keys() | tensors.keys())
        if _kind(expected.get(name)) != _kind(tensors.get(name))
    }
    if wrong:
        raise UserError(
            f"{path}: not the weights that {CONFIG} describes: {', '.join(wrong.values())}. "
            "Train the SAE again."
        )
    if bad := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise UserError(f"{path}: {', '.join(bad)} is not finite. Train the SAE again.")
    sae = build(*described)
    sae.load_state_dict(tensors)
    sae.positions = _positions(folder / CONFIG, config)
    sae.origin = _origin(config)
    return sae.eval().requires_grad_(False)


def _origin(config: Mapping[str, Any]) -> str:
    """Say where an SAE was trained, as far as its config does."""
    facts = []
    if {"hook_point", "source"} <= config.keys():
        facts.append(f"at {config['hook_point']} of {config['source']}")
    training = config.get("training")
    if isinstance(training, dict) and isinstance(training.get("tokens"), int):
        facts.append(f"trained on {training['tokens']:,} activations")
    if "seed" in config:
        facts.append(f"seed {config['seed']}")
    return ", ".join(facts)


def _positions(path: Path, config: Mapping[str, Any]) -> slice:
    """The positions of a context that the SAE was trained on; all of them where its config does not say."""
    found = config.get("positions", [0, None])
    if (
        not isinstance(found, list)
        or len(found) != 2
        or any(value is not None and (type(value) is not int or value < 0) for value in found)
    ):
        raise UserError(
            f"{path}: positions: expected [start, stop], whole numbers or null, found {found!r}. Train the SAE again."
        )
    return slice(*found)


def _kind(tensor: torch.Tensor | None) -> str:
    """Dtype and shape of a tensor in words."""
    if tensor is None:
        return "nothing"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
