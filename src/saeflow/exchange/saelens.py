"""SAELens's folders: cfg.json and sae_weights.safetensors (sae_lens 3 to 6).

Versions 3 to 5 describe a TopK SAE as `standard` with activation_fn_str topk (sae_lens/sae.py there); version 6
renames their fields when it loads them (loading/pretrained_sae_loaders.py: handle_pre_6_0_config).
"""

import math
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
"""Version of the format, not of the library: SAELens reads folders of earlier ones with other defaults."""
_KINDS: dict[str, Kind] = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "matching_pursuit": "matching_pursuit",
}
_TENSORS: dict[str, dict[str, str]] = {
    "standard": {"b_enc": "b_enc"},
    "topk": {"b_enc": "b_enc"},
    "jumprelu": {"b_enc": "b_enc", "threshold": "threshold"},
    "gated": {"b_gate": "b_enc", "r_mag": "r_mag", "b_mag": "b_mag"},
}
_SHARED = {"W_enc": "W_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_RENAMED = {
    "activation_fn": "activation_fn_str", "hook_point": "hook_name", "hook_point_head_index": "hook_head_index",
}  # fmt: skip
"""Older names of a field, and the name that it has here."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "normalize_activations": ("none", None, False),
    "reshape_activations": ("none", None),
    "hook_head_index": (None,),
}
"""Fields that change what the SAE does, and their values that do not."""
_OF_TRAINING = "coefficient_autotuner."
"""Names of tensors that steered training and are in some published files (SynthSAEBench's ReLU and JumpReLU SAEs)."""
_SCALES = ("scaling_factor", "finetuning_scaling_factor")
"""Factors of the latents before the decoder, under their two names."""
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


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
        UserError: a file is missing or damaged, a key or tensor is missing, or the SAE does something that
            saeflow's have no place for.
    """
    path = folder / CONFIG
    config = _config(path)
    architecture, k = _architecture(path, config)
    if architecture == "matching_pursuit":
        return _of_size(path, config, _pursuit(folder, config))
    names = _SHARED | _TENSORS[architecture]
    tensors = _tensors(folder / WEIGHTS, names, _dtype(path, config))
    scale = tensors.pop("scale", None)
    parts: dict[str, Any] = {own: tensors[name] for name, own in names.items()}
    plain = Plain(**parts, kind=_KINDS[architecture], k=k).check(folder / WEIGHTS)
    plain = _of_size(path, config, plain)
    if scale is not None and not bool((scale == 1).all()):
        plain = _with_scaled_latents(plain, scale, path, config)
    if _flag(path, config, "rescale_acts_by_decoder_norm", False):
        if architecture != "topk":
            raise UserError(
                f"{path}: rescale_acts_by_decoder_norm: expected it with the architecture topk alone, found "
                f"{architecture}. Export the SAE again."
            )
        plain = with_unit_decoder(plain)
    if not _flag(path, config, "apply_b_dec_to_input", True):
        plain = without_input_bias(plain)
    return plain


def _of_size(path: Path, config: Mapping[str, Any], plain: Plain) -> Plain:
    """Return the SAE itself, if it has the size that its config says."""
    if (plain.d_in, plain.d_sae) != (config["d_in"], config["d_sae"]):
        raise UserError(
            f"{path}: expected d_in {plain.d_in} and d_sae {plain.d_sae} as in {WEIGHTS}, found "
            f"{config['d_in']!r} and {config['d_sae']!r}. Export the SAE again."
        )
    return plain


def _pursuit(folder: Path, config: Mapping[str, Any]) -> Plain:
    """A matching pursuit SAE, whose decoder is its encoder."""
    path = folder / CONFIG
    least, most = config.get("residual_threshold", 0.01), config.get("max_iterations")
    is_number = isinstance(least, int | float) and not isinstance(least, bool)
    if not is_number or not 0 <= least < math.inf:
        raise UserError(
            f"{path}: residual_threshold: expected a number from 0, found {least!r}. Export the SAE again."
        )
    if most is not None and (type(most) is not int or most < 1):
        raise UserError(
            f"{path}: max_iterations: expected a whole number from 1 or null, found {most!r}. Export the SAE again."
        )
    stops = _flag(path, config, "stop_on_duplicate_support", True)
    tensors = _tensors(folder / WEIGHTS, {"W_dec": "W_dec", "b_dec": "b_dec"}, _dtype(path, config))
    W_dec, b_dec = tensors["W_dec"], tensors["b_dec"]
    if "scale" in tensors:
        raise UserError(
            f"{folder / WEIGHTS}: expected no factors of latents with matching_pursuit, whose decoder is its encoder, found "
            "some. Export the SAE again."
        )
    if not _flag(path, config, "apply_b_dec_to_input", True):
        b_dec = torch.zeros_like(b_dec)  # SAELens then leaves it out of the decoder too
    options = {"residual_threshold": float(least), "max_iterations": most}
    return Plain(
        "matching_pursuit", W_dec.t().contiguous(), W_dec.new_zeros(len(W_dec)), W_dec, b_dec,
        pursuit=options | {"stop_on_duplicate_support": stops},
    ).check(folder / WEIGHTS)  # fmt: skip


def _config(path: Path) -> dict[str, Any]:
    """A config under the names of fields of SAELens 5.

    Raises:
        UserError: it is none, or a field asks for what saeflow has no place for.
    """
    given = read_json(path)
    if not isinstance(given, dict):
        raise UserError(f"{path}: expected the config of a SAELens SAE, found another file.")
    metadata = given.get("metadata")
    config: dict[str, Any] = dict(metadata) if isinstance(metadata, dict) else {}
    for key, value in given.items():
        name = _RENAMED.get(key, str(key))
        if key != name and given.get(name, value) != value:
            raise UserError(
                f"{path}: expected one value of {key} and {name}, its later name, found {value!r} and "
                f"{given[name]!r}. Delete one."
            )
        config[name] = value
    if missing := [key for key in ("d_in", "d_sae") if key not in config]:
        raise UserError(f"{path}: {', '.join(missing)} missing. Give a folder that SAELens saved.")
    for key, neutral in _NEUTRAL.items():
        found = config.get(key)
        if not any(type(found) is type(value) and found == value for value in neutral):
            raise UserError(
                f"{path}: {key}: expected {neutral[0]!r}, found {found!r}. Fold it into the weights with SAELens "
                "first, if that can be done."
            )
    kwargs = config.get("model_from_pretrained_kwargs") or {}
    if not isinstance(kwargs, dict) or kwargs.get("center_writing_weights"):
        raise UserError(
            f"{path}: model_from_pretrained_kwargs: expected none that changes activations, found {kwargs!r}. "
            "Hugging Face's model does not centre what its blocks write."
        )
    return config


def _architecture(path: Path, config: Mapping[str, Any]) -> tuple[str, int | None]:
    """One of _KINDS, and the k of topk.

    Raises:
        UserError: an architecture or activation that saeflow has no place for, or both contradict each other.
    """
    architecture = config.get("architecture", "standard")
    if not isinstance(architecture, str) or architecture not in _KINDS:
        raise UserError(
            f"{path}: architecture: expected one of {', '.join(_KINDS)}, found {architecture!r}. For those of "
            "training, save the inference SAE."
        )
    kwargs = config.get("activation_fn_kwargs") or {}
    activation = config.get("activation_fn_str")
    known = {"standard": ("relu", "topk"), "topk": ("topk",)}.get(architecture, ("relu",))
    if activation is None:  # as in version 6, where the architecture says it
        activation = known[0]
    if not isinstance(activation, str) or activation not in known:
        raise UserError(
            f"{path}: activation_fn_str: expected {' or '.join(known)} with the architecture {architecture}, found "
            f"{activation!r}. saeflow has no other."
        )
    if activation != "topk":
        return architecture, None
    if not isinstance(kwargs, dict) or kwargs.keys() - {"k"}:
        raise UserError(
            f"{path}: activation_fn_kwargs: expected k alone, found {kwargs!r}. saeflow applies relu and no other "
            "function to the latents that topk keeps."
        )
    counts = [holder["k"] for holder in (config, kwargs) if holder.get("k") is not None]
    if not counts or any(type(count) is not int or count != counts[0] for count in counts):
        raise UserError(
            f"{path}: k: expected one whole number, found {' and '.join(map(repr, counts)) or 'none'}. "
            "Export the SAE again."
        )
    return "topk", counts[0]


def _flag(path: Path, config: Mapping[str, Any], key: str, default: bool) -> bool:
    found = config.get(key, default)
    if not isinstance(found, bool):
        raise UserError(f"{path}: {key}: expected true or false, found {found!r}.")
    return found


def _dtype(path: Path, config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that SAELens rounds the weights to."""
    found = config.get("dtype", "float32")
    name = found.removeprefix("torch.") if isinstance(found, str) else ""
    if name not in _DTYPES:
        raise UserError(f"{path}: dtype: expected one of {', '.join(_DTYPES)}, found {found!r}.")
    return _DTYPES[name]


def _with_scaled_latents(
    plain: Plain, scale: Tensor, path: Path, config: Mapping[str, Any]
) -> Plain:
    """An SAE whose latents are multiplied by `scale` (d_sae) before the decoder: its rows take the factors."""
    if not _flag(path, config, "finetuning_scaling_factor", False):
        raise UserError(
            f"{path}: finetuning_scaling_factor: expected true, since {WEIGHTS} holds factors that are not 1, found "
            "false. Export the SAE again."
        )
    if scale.shape != (plain.d_sae,) or not bool(scale.isfinite().all()):
        raise UserError(
            f"{path.parent / WEIGHTS}: scaling factors: expected {plain.d_sae} finite numbers, found shape "
            f"{list(scale.shape)}. Export the SAE again."
        )
    return replace(plain, W_dec=plain.W_dec * scale[:, None])


def facts(folder: Path) -> dict[str, Any]:
    """Return the facts that the config states of the SAE, with its place in its model.

    Raises:
        UserError: saeflow has no place for what it says.
    """
    path = folder / CONFIG
    config = _config(path)
    _architecture(path, config)
    _dtype(path, config)
    return config


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
    """Return the form that encodes x instead of x - b_dec; b_enc takes up the difference."""
    b_enc = plain.b_enc.double() + plain.b_dec.double() @ plain.W_enc.double()
    b_mag = plain.b_mag
    if b_mag is not None and plain.r_mag is not None:
        shift = plain.b_dec.double() @ plain.W_enc.double()
        b_mag = (b_mag.double() + shift * plain.r_mag.double().exp()).float()
    return replace(plain, b_enc=b_enc.float(), b_mag=b_mag)


def _tensors(path: Path, names: Mapping[str, str], dtype: torch.dtype) -> dict[str, Tensor]:
    """The named tensors in float32, rounded as SAELens rounds them; `scale` where there are factors."""
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Export the SAE again.") from None
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}). Export the SAE again.") from None
    if "log_threshold" in tensors and "threshold" in names and "threshold" not in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").to(dtype).exp()
    tensors = {name: part for name, part in tensors.items() if not name.startswith(_OF_TRAINING)}
    factors = [name for name in _SCALES if name in tensors]
    if len(factors) == 1:
        tensors["scale"] = tensors.pop(factors[0])
    if missing := [name for name in names if name not in tensors]:
        raise UserError(f"{path}: {', '.join(missing)} missing. Export the SAE again.")
    if unknown := sorted(tensors.keys() - names.keys() - {"scale"}):
        raise UserError(
            f"{path}: expected {', '.join(names)}, found {', '.join(unknown)} as well. Fold it into the others first."
        )
    if whole := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise UserError(
            f"{path}: expected floating-point numbers, found {tensors[whole[0]].dtype} in {whole[0]}. Save the SAE "
            "without quantisation."
        )
    return {name: tensor.to(dtype).to(torch.float32) for name, tensor in tensors.items()}
