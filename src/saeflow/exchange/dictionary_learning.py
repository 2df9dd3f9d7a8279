"""dictionary_learning's folders: config.json and ae.pt (dictionary_learning/utils.py: load_dictionary)."""

import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeflow.errors import UserError
from saeflow.exchange.plain import Plain
from saeflow.exchange.saelens import with_unit_decoder, without_input_bias
from saeflow.files import atomic_file, read_json, write_json

CONFIG, WEIGHTS = "config.json", "ae.pt"


def write(plain: Plain, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write an SAE into an existing folder, as `load_dictionary` reads it.

    Args:
        plain: what the SAE does.
        folder: gets both files.
        metadata: what dictionary_learning keeps of the model, such as lm_name and submodule_name.
    """
    linear = {"encoder.weight": plain.W_enc.t(), "decoder.weight": plain.W_dec.t()}
    tensors: dict[str, Tensor | None]
    match plain.kind:
        case "relu":
            name = "AutoEncoder"
            tensors = {**linear, "encoder.bias": plain.b_enc, "bias": plain.b_dec}
        case "topk":
            name = "AutoEncoderTopK"
            counts = {
                "k": torch.tensor(plain.k, dtype=torch.int),
                "threshold": torch.tensor(-1.0),
            }
            tensors = {**linear, "encoder.bias": plain.b_enc, "b_dec": plain.b_dec, **counts}
        case "gated":
            name = "GatedAutoEncoder"
            biases = {
                "decoder_bias": plain.b_dec,
                "gate_bias": plain.b_enc,
                "mag_bias": plain.b_mag,
            }
            tensors = {**linear, "r_mag": plain.r_mag, **biases}
        case "jumprelu":
            name = "JumpReluAutoEncoder"  # takes x, not x - b_dec
            shift = plain.b_dec.double() @ plain.W_enc.double()
            tensors = {
                "W_enc": plain.W_enc, "b_enc": (plain.b_enc - shift).float(), "W_dec": plain.W_dec,
                "b_dec": plain.b_dec, "threshold": plain.threshold,
            }  # fmt: skip
    sizes = {"activation_dim": plain.d_in, "dict_size": plain.d_sae, "k": plain.k}
    with atomic_file(folder / WEIGHTS) as staged:
        state = {key: part.contiguous() for key, part in tensors.items() if part is not None}
        torch.save(state, staged)
    write_json(
        folder / CONFIG, {"trainer": {"dict_class": name, **sizes, **metadata}, "buffer": {}}
    )


def read(folder: Path) -> Plain:
    """Read an SAE that dictionary_learning saved; it does what `load_dictionary` gives.

    ae.pt is a pickle: it is read by torch's restricted unpickler, which knows tensors and runs no code.

    Raises:
        UserError: a file is missing or damaged, or a key or tensor is missing.
    """
    path = folder / CONFIG
    trainer = facts(folder)
    name = trainer["dict_class"]
    names, reader = _READERS[name]
    tensors = _tensors(folder / WEIGHTS, names)
    try:
        plain = reader(tensors)
    except (IndexError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"{folder / WEIGHTS}: tensors do not fit each other ({error}). Export it again."
        ) from None
    plain = plain.check(folder / WEIGHTS)
    said = {"activation_dim": plain.d_in, "dict_size": plain.d_sae, "k": plain.k}
    for key, held in said.items():
        found = trainer.get(key)
        if held is not None and found is not None and (type(found) is not int or found != held):
            raise UserError(
                f"{path}: trainer.{key}: expected {held} as in {WEIGHTS}, found {found!r}. Export the SAE again."
            )
    if name == "AutoEncoder":
        return with_unit_decoder(plain)  # as the library does when it loads one
    return without_input_bias(plain) if name == "JumpReluAutoEncoder" else plain


def facts(folder: Path) -> dict[str, Any]:
    """Return the facts that the config states of the SAE, with its place in its model.

    Raises:
        UserError: it is none, or of a class that is not read.
    """
    path = folder / CONFIG
    config = read_json(path)
    trainer = config.get("trainer") if isinstance(config, dict) else None
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        raise UserError(
            f"{path}: trainer.dict_class missing. Give a folder that dictionary_learning trained."
        )
    name = trainer["dict_class"]
    if not isinstance(name, str) or name not in _READERS:
        raise UserError(
            f"{path}: trainer.dict_class: expected one of {', '.join(_READERS)}, found {name!r}."
        )
    return trainer


def _linear(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "W_enc": tensors["encoder.weight"].t().contiguous(),
        "W_dec": tensors["decoder.weight"].t().contiguous(),
    }


def _relu(tensors: Mapping[str, Tensor]) -> Plain:
    return Plain("relu", **_linear(tensors), b_enc=tensors["encoder.bias"], b_dec=tensors["bias"])


def _topk(tensors: Mapping[str, Tensor]) -> Plain:
    biases: dict[str, Any] = {"b_enc": tensors["encoder.bias"], "b_dec": tensors["b_dec"]}
    return Plain("topk", **_linear(tensors), **biases, k=int(tensors["k"]))


def _one_threshold(tensors: Mapping[str, Tensor]) -> Plain:
    """BatchTopK in use, where relu decides as well."""
    biases: dict[str, Any] = {"b_enc": tensors["encoder.bias"], "b_dec": tensors["b_dec"]}
    threshold = tensors["threshold"].expand(biases["b_enc"].shape).clone()
    return Plain("jumprelu", **_linear(tensors), **biases, threshold=threshold)


def _gated(tensors: Mapping[str, Tensor]) -> Plain:
    return Plain(
        "gated", **_linear(tensors), b_enc=tensors["gate_bias"], b_dec=tensors["decoder_bias"],
        r_mag=tensors["r_mag"], b_mag=tensors["mag_bias"],
    )  # fmt: skip


def _jumprelu(tensors: Mapping[str, Tensor]) -> Plain:
    parts: dict[str, Any] = {name: tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    threshold = tensors["threshold"].expand(parts["b_enc"].shape).clone()
    return Plain("jumprelu", **parts, threshold=threshold)


_TOPK = ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec")
_ROWS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_GATED = (
    "encoder.weight",
    "decoder.weight",
    "decoder_bias",
    "gate_bias",
    "mag_bias",
    "r_mag",
)
_COUNTS = ("k", "threshold", "group_sizes")
"""Tensors that some classes save and that their encoder in use need not read."""
_READERS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Tensor]], Plain]]] = {
    "AutoEncoder": (("encoder.weight", "encoder.bias", "decoder.weight", "bias"), _relu),
    "AutoEncoderTopK": ((*_TOPK, "k"), _topk),
    "BatchTopKSAE": ((*_TOPK, "threshold"), _one_threshold),
    "MatryoshkaBatchTopKSAE": (_ROWS, _jumprelu),
    "GatedAutoEncoder": (_GATED, _gated),
    "JumpReluAutoEncoder": (_ROWS, _jumprelu),
}


def _tensors(path: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: no such file. Export the SAE again.")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (
        RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, ValueError, KeyError, OSError,
        AttributeError, TypeError, IndexError, UnicodeDecodeError, OverflowError, MemoryError, AssertionError,
    ) as error:  # fmt: skip
        raise UserError(
            f"{path}: expected tensors saved by torch, found something else or a damaged file "
            f"({type(error).__name__}). Export the SAE again."
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{path}: expected a dictionary of tensors. Export the SAE again.")
    if missing := [name for name in names if name not in tensors]:
        raise UserError(f"{path}: {', '.join(missing)} missing. Export the SAE again.")
    if unknown := sorted(str(name) for name in tensors if name not in (*names, *_COUNTS)):
        raise UserError(
            f"{path}: expected {', '.join(names)}, found {', '.join(unknown)} as well. Give a folder whose "
            "trainer.dict_class says what its tensors are."
        )
    return {name: tensors[name].to(torch.float32) for name in names}
