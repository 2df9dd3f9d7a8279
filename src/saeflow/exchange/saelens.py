"""SAELens's folders: cfg.json and sae_weights.safetensors (sae_lens/saes, version 6)."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeflow.errors import UserError
from saeflow.exchange.plain import Kind, Plain
from saeflow.files import atomic_file, read_json, write_json

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.0.0"
"""Of the format, not of the library: folders of earlier ones are read with other defaults there."""
_KINDS: dict[str, Kind] = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
}
_TENSORS: dict[str, dict[str, str]] = {
    "standard": {"b_enc": "b_enc"},
    "topk": {"b_enc": "b_enc"},
    "jumprelu": {"b_enc": "b_enc", "threshold": "threshold"},
    "gated": {"b_gate": "b_enc", "r_mag": "r_mag", "b_mag": "b_mag"},
}
_SHARED = {"W_enc": "W_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_PLAIN_VALUES = {
    "normalize_activations": "none", "reshape_activations": "none", "activation_fn": "relu",
    "finetuning_scaling_factor": False,
}  # fmt: skip


def write(plain: Plain, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write an SAE into an existing folder, as `SAE.load_from_disk` reads it.

    Args:
        plain: what the SAE does.
        folder: gets both files.
        metadata: what SAELens keeps beside it, such as model_name and hook_name.
    """
    architecture = {kind: name for name, kind in _KINDS.items()}[plain.kind]
    names = _SHARED | _TENSORS[architecture]
    tensors = {name: getattr(plain, own).contiguous() for name, own in names.items()}
    config = {
        "architecture": architecture, "d_in": plain.d_in, "d_sae": plain.d_sae, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": VERSION, **metadata},
    }  # fmt: skip
    if plain.kind == "topk":
        config |= {"k": plain.k, "rescale_acts_by_decoder_norm": False}
    with atomic_file(folder / WEIGHTS) as staged:
        save_file(tensors, staged)
    write_json(folder / CONFIG, config)


def read(folder: Path) -> Plain:
    """Read an SAE that SAELens saved; what it encodes and decodes stays the same.

    Raises:
        UserError: a file is missing or damaged, a key or tensor is missing, or the SAE does something to its
            inputs that saeflow's have no place for.
    """
    path = folder / CONFIG
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected the config of a SAELens SAE, found another file.")
    if missing := [
        key
        for key in ("architecture", "d_in", "d_sae", "apply_b_dec_to_input")
        if key not in config
    ]:
        raise UserError(
            f"{path}: {', '.join(missing)} missing. Save the SAE with SAELens 6 or newer."
        )
    architecture = config["architecture"]
    if not isinstance(architecture, str) or architecture not in _KINDS:
        raise UserError(
            f"{path}: architecture: expected one of {', '.join(_KINDS)}, found {architecture!r}. For those of "
            "training, save the inference SAE."
        )
    for key, expected in _PLAIN_VALUES.items():
        if (found := config.get(key, expected)) != expected:
            raise UserError(
                f"{path}: {key}: expected {expected!r}, found {found!r}. Fold it into the weights with SAELens first."
            )
    names = _SHARED | _TENSORS[architecture]
    tensors = _tensors(folder / WEIGHTS, names)
    plain = Plain(
        **{own: tensors[name] for name, own in names.items()},
        kind=_KINDS[architecture],
        k=config.get("k"),
    )
    plain = plain.check(folder / WEIGHTS)
    if (plain.d_in, plain.d_sae) != (config["d_in"], config["d_sae"]):
        raise UserError(
            f"{path}: expected d_in {plain.d_in} and d_sae {plain.d_sae} as in {WEIGHTS}, found "
            f"{config['d_in']!r} and {config['d_sae']!r}. Export the SAE again."
        )
    if config.get("rescale_acts_by_decoder_norm"):
        plain = with_unit_decoder(plain)
    if not config["apply_b_dec_to_input"]:
        plain = without_input_bias(plain)
    return plain


def facts(folder: Path) -> dict[str, Any]:
    """What the config says of the SAE's place in its model."""
    config = read_json(folder / CONFIG)
    held = config if isinstance(config, dict) else {}
    metadata = held.get("metadata")
    return {**held, **(metadata if isinstance(metadata, dict) else {})}


def with_unit_decoder(plain: Plain) -> Plain:
    """Latents counted in units of their decoder rows' norms, which become 1."""
    norm = plain.W_dec.double().norm(dim=1).clamp(min=1e-30)
    return replace(
        plain,
        W_enc=(plain.W_enc * norm).float(),
        b_enc=(plain.b_enc * norm).float(),
        W_dec=(plain.W_dec / norm[:, None]).float(),
    )


def without_input_bias(plain: Plain) -> Plain:
    """Of an SAE that encodes x and not x - b_dec: b_enc makes up for it."""
    b_enc = plain.b_enc.double() + plain.b_dec.double() @ plain.W_enc.double()
    b_mag = plain.b_mag
    if b_mag is not None and plain.r_mag is not None:
        shift = plain.b_dec.double() @ plain.W_enc.double()
        b_mag = (b_mag.double() + shift * plain.r_mag.double().exp()).float()
    return replace(plain, b_enc=b_enc.float(), b_mag=b_mag)


def _tensors(path: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Export the SAE again.") from None
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}). Export the SAE again.") from None
    if missing := [name for name in names if name not in tensors]:
        raise UserError(f"{path}: {', '.join(missing)} missing. Export the SAE again.")
    if unknown := sorted(tensors.keys() - names.keys()):
        raise UserError(
            f"{path}: expected {', '.join(names)}, found {', '.join(unknown)} as well. Fold it into the others first."
        )
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
