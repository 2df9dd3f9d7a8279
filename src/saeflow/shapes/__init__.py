"""A model's shape, known before it is fetched or read without its weights; loads no model code by itself."""

import functools
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from saeflow.errors import UserError
from saeflow.files import package_yaml, read_json

MOST_BLOCKS = 10_000
"""A damaged file that says more would be built for ever."""

GGUF_MODEL_TYPES = {"gemma3": "gemma3_text", "gptneox": "gpt_neox"}
"""The `model_type` of architectures that GGUF calls by another name."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model that decide its hook points."""

    model_type: str
    n_blocks: int | None
    """Blocks of its language part, or of a model of images its tower; None where config.json does not say under a known name."""
    is_of_images: bool = False
    """It has an image tower, and no language part that predicts tokens."""
    n_positions: int | None = field(default=None, compare=False)
    """Tokens of the longest context of its language part; None where config.json does not say."""


SHAPES = Path(__file__).with_name("shapes.yaml")


@functools.cache
def _table() -> dict[str, Any]:
    return dict(package_yaml(SHAPES))


def pinned_config(model: Mapping[str, Any]) -> dict[str, Any] | None:
    """The sizes of a model by its pin, as its config.json has them; None where its pin is not in the table.

    Args:
        model: {hub, revision} | {wheel, sha256, file} | another, which has no pin.
    """
    pin = model.get("revision") if "hub" in model else model.get("sha256")
    return _table().get(str(pin))


def check_config(model: Mapping[str, Any], folder: Path) -> None:
    """Compare a fetched model's configuration with the sizes that were planned with.

    Args:
        model: as for `pinned_config`.
        folder: holds its config.json.

    Raises:
        UserError: they differ.
    """
    expected = pinned_config(model)
    if expected is None:
        return
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    found = config.to_dict()
    for name, value, other in _differences(expected, found):
        raise UserError(
            f"{folder / 'config.json'}: expected {name} {value!r} of the pinned model, found {other!r}. Fetch the "
            f"model again, or correct {SHAPES.name} of saeflow, which jobs and needs are planned with."
        )


def _differences(
    expected: Mapping[str, Any], found: Mapping[str, Any], where: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for name, value in expected.items():
        other = found.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            yield from _differences(value, other, f"{where}{name}.")
        elif value != other:
            yield where + name, value, other


def known_shape(model: Mapping[str, Any]) -> Shape | None:
    """Shape of a model from local files or from its pin; None if that does not tell."""
    if "folder" in model:
        return config_shape(Path(model["folder"]) / "config.json")
    if "gguf" in model:
        return gguf_shape(Path(model["gguf"]))
    if "trained" in model:
        return Shape("clip", model["trained"]["layers"], is_of_images=True)
    pinned = pinned_config(model)
    if pinned is not None:
        return _shape_of(pinned)
    if "hub" in model:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model["hub"], "config.json", revision=model["revision"])
        if isinstance(cached, str):
            return config_shape(Path(cached))
    return None


def fetched_shape(model: Mapping[str, Any], folder: Path) -> Shape | None:
    """Shape of the model in a folder that `fetch_model` wrote, if it is this one."""
    record, config = folder / "provenance.json", folder / "config.json"
    if not (record.is_file() and config.is_file()):
        return None
    if read_json(record).get("params", {}).get("model") != dict(model):
        return None
    return config_shape(config)


def config_shape(path: Path) -> Shape:
    """Read model type and number of blocks from a config.json.

    Raises:
        UserError: the file is missing or says neither, or the weights are quantised.
    """
    config = read_json(path)
    if isinstance(config, dict) and config.get("quantization_config") is not None:
        raise UserError(
            f"{path}: expected plain weights, found quantised ones (quantization_config). Save the model "
            "dequantised, or give the one it was made from."
        )
    shape = _shape_of(config)
    if shape is None:
        raise UserError(
            f"{path}: expected the config.json of a model of transformers, with model_type, found none. Give the folder that "
            "save_pretrained wrote."
        )
    return shape


def _shape_of(config: Any) -> Shape | None:
    if not isinstance(config, dict):
        return None
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return None
    is_of_images = has_images_alone(config)
    part = config.get("vision_config" if is_of_images else "text_config") or config
    if not isinstance(part, dict):
        return None
    n_blocks = next((part[key] for key in _DEPTHS if isinstance(part.get(key), int)), None)
    longest = part.get("max_position_embeddings")
    if longest is None and "n_embd" in part:  # GPT-2 and its like; T5's n_positions limits nothing
        longest = part.get("n_positions")
    n_positions = longest if isinstance(longest, int) else None
    return Shape(model_type, n_blocks, is_of_images, n_positions)


_DEPTHS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
)  # fmt: skip


def has_images_alone(config: Mapping[str, Any]) -> bool:
    """Tell whether a config.json is that of a model of images, with a text tower or without, that predicts no tokens."""
    if any("image_token" in key for key in config):  # it stands for an image in the text
        return False
    return "vocab_size" not in config and ("vision_config" in config or "image_size" in config)


# GGUF's value types and their sizes in bytes; 8 is a string, 9 an array (GGUF specification, version 3).
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_LONGEST_STRING = 1 << 24


def gguf_shape(path: Path) -> Shape:
    """Read architecture and number of blocks from a GGUF file's header (its first kilobytes).

    Raises:
        UserError: the file is missing, is no GGUF file or does not say.
    """
    try:
        with path.open("rb") as file:
            magic, version, _, n_keys = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError("no GGUF header")
            architecture = ""
            for _ in range(n_keys):
                key = _string(file).decode()
                value = _value(file, *struct.unpack("<I", file.read(4)))
                if key == "general.architecture":
                    architecture = value.decode()
                elif architecture and key == f"{architecture}.block_count":
                    return Shape(GGUF_MODEL_TYPES.get(architecture, architecture), value)
        shard = " (of a split model, give the first file)" if "-of-" in path.name else ""
        raise ValueError(f"no block_count{shard}")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Fix the path.") from None
    except (ValueError, KeyError, AttributeError, OverflowError, OSError, struct.error) as error:
        raise UserError(
            f"{path}: expected a GGUF file of a language model, found none ({error}). "
            "Download the file again, or fix the path."
        ) from None


def _string(file: BinaryIO) -> bytes:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _LONGEST_STRING:
        raise ValueError(f"a string of {length} bytes")
    return file.read(length)


def _value(file: BinaryIO, kind: int) -> Any:
    """Read a value of the header; arrays and numbers other than uint32 are only passed over."""
    if kind == _STRING:
        return _string(file)
    if kind == _UINT32:
        return struct.unpack("<I", file.read(4))[0]
    if kind == _ARRAY:
        inner, length = struct.unpack("<IQ", file.read(12))
        if inner in _SIZES:
            return file.seek(length * _SIZES[inner], 1)
        for _ in range(length):
            _value(file, inner)
        return None
    return file.seek(_SIZES[kind], 1)
