"""Hook points by name, and a model's shape read without its weights; loads no model code.

`blocks.N.resid_pre` and `blocks.N.resid_post` are the residual stream before and after block N, `blocks.N.resid_mid`
the one between attention and MLP; `blocks.N.attn_out` and `blocks.N.mlp_out` are what the block adds to it
(TransformerLens's definitions), so that resid_post = resid_pre + attn_out + mlp_out; `blocks.N.attn_in` and
`blocks.N.mlp_in` are what attention and MLP take, after the norm before them. Of a model with an image tower,
`vision.blocks.N...` are the same there, and `vision.embedding` is the image's projected embedding, one vector an image.
`module.PATH.input` and `module.PATH.output` are what any module takes and gives, `module.PATH.output.1` the
second of several values.
"""

import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from saeflow.errors import UserError
from saeflow.files import read_json
from saeflow.sources.shapes import pinned_config

PLACES = ("resid_pre", "attn_in", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
"""In the order in which a block computes them."""
VISION = "vision."
EMBEDDING = "vision.embedding"
MOST_BLOCKS = 10_000
"""A damaged file that says more would be built for ever."""
_AFTER_ALL = 1 << 30
_SIDES = ("input", "output")


@dataclass(frozen=True, order=True)
class HookPoint:
    """A place in a model where activations are read or replaced; ordered as the model runs."""

    block: int
    order: int
    tower: str = ""  # "vision." in the image tower
    module: str = ""  # path of a module that is named by itself
    index: int | None = None  # of several values that the module gives

    @classmethod
    def parse(cls, name: str) -> "HookPoint":
        """Read a name such as `blocks.8.resid_post` or `module.model.layers.8.mlp.output`.

        Raises:
            UserError: it is not a hook point's name.
        """
        if name == EMBEDDING:
            return cls(_AFTER_ALL, 0, VISION)
        match = re.fullmatch(
            r"(vision\.|)module\.([A-Za-z0-9_.]*[A-Za-z0-9_])\.(input|output)(?:\.([0-9]+))?", name
        )
        if match is not None:
            index = None if match[4] is None else int(match[4])
            return cls(_AFTER_ALL, _SIDES.index(match[3]), match[1], match[2], index)
        match = re.fullmatch(r"(vision\.|)blocks\.([0-9]+)\.([a-z_]+)", name)
        if match is None or match[3] not in PLACES:
            raise UserError(
                f"hook point: expected blocks.N.{'|'.join(PLACES)} with N from 0, module.PATH.input|output, the same "
                f"after vision., or {EMBEDDING}, found {name!r}."
            )
        return cls(int(match[2]), PLACES.index(match[3]), match[1])

    @property
    def is_embedding(self) -> bool:
        """Return whether it is the image's projected embedding."""
        return self.block == _AFTER_ALL and not self.module

    @property
    def is_in_block(self) -> bool:
        """Return whether its name says a block."""
        return self.block != _AFTER_ALL

    @property
    def is_in_stream(self) -> bool:
        """Return whether it is the residual stream or what a block adds to it, all of one width."""
        return self.is_in_block and not self.place.endswith("_in")

    @property
    def place(self) -> str:
        """One of PLACES; of a module input or output."""
        return _SIDES[self.order] if self.module else PLACES[self.order]

    @property
    def block_input(self) -> "HookPoint":
        """The residual stream before the same block."""
        return HookPoint(self.block, 0, self.tower)

    def resume_at(self, n_blocks: int) -> "HookPoint | None":
        """The block input that the activation here is, so that its own block need not run again."""
        if not self.is_in_block:
            return None
        if self.place == "resid_pre":
            return self
        if self.place == "resid_post" and self.block + 1 < n_blocks:
            return HookPoint(self.block + 1, 0, self.tower)
        return None

    def __str__(self) -> str:
        if self.module:
            end = "" if self.index is None else f".{self.index}"
            return f"{self.tower}module.{self.module}.{self.place}{end}"
        return EMBEDDING if self.is_embedding else f"{self.tower}blocks.{self.block}.{self.place}"


IMAGE_MODELS = ("clip",)
"""`model_type` of models with an image tower and a text tower, whose sizes are in config.json's vision_config."""

GGUF_MODEL_TYPES = {"gemma3": "gemma3_text", "gptneox": "gpt_neox"}
"""The `model_type` of architectures that GGUF calls by another name."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model that decide its hook points."""

    model_type: str
    n_blocks: int


def check_shape(shape: Shape, hook_points: Iterable[str], model: str) -> None:
    """Check that a model has some hook points.

    Raises:
        UserError: it has not.
    """
    if not 1 <= shape.n_blocks <= MOST_BLOCKS:
        raise UserError(
            f"{model}: expected 1 to {MOST_BLOCKS} blocks, found {shape.n_blocks}. Fix its config, or download it again."
        )
    for name in hook_points:
        point = HookPoint.parse(name)
        if shape.model_type in IMAGE_MODELS and not point.tower:
            raise UserError(
                f"{model}: expected hook points of its image tower (vision.blocks.N.resid_post), found {name}. "
                "Correct it, or give a language model."
            )
        if point.is_in_block and point.block >= shape.n_blocks:
            raise UserError(
                f"{model}: the model has {shape.n_blocks} blocks (0..{shape.n_blocks - 1}), found "
                f"hook point {name}. Choose a block below {shape.n_blocks}."
            )


def check_hook_points(name: str, source: Mapping[str, Any], folder: Path) -> None:
    """Check a source's hook points as far as can be told without weights or network.

    A hub model that was never downloaded, and is not in shapes.yaml, is checked when it is fetched.

    Args:
        name: the source's name, for messages.
        source: its parameters, with `model` and `hook_points`.
        folder: results/sources/NAME, which may hold the fetched model.

    Raises:
        UserError: a hook point that the model lacks or a damaged model file.
    """
    points = [HookPoint.parse(point) for point in source["hook_points"]]
    shape = known_shape(source["model"]) or fetched_shape(source["model"], folder / "model")
    if shape is not None:
        check_shape(shape, map(str, points), f"sources.{name}")


def known_shape(model: Mapping[str, Any]) -> Shape | None:
    """Shape of a model from local files or from its pin; None if that does not tell."""
    if "folder" in model:
        return config_shape(Path(model["folder"]) / "config.json")
    if "gguf" in model:
        return gguf_shape(Path(model["gguf"]))
    if "trained" in model:
        return Shape("clip", model["trained"]["layers"])
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
            f"{path}: expected the config.json of a causal language model or of CLIP, with model_type and "
            "num_hidden_layers; found neither or one. Give the folder that save_pretrained wrote."
        )
    return shape


def _shape_of(config: Any) -> Shape | None:
    if not isinstance(config, dict):
        return None
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return None
    is_clip = model_type in IMAGE_MODELS
    part = config.get("vision_config" if is_clip else "text_config") or config
    if not isinstance(part, dict):
        return None
    n_blocks = part.get("num_hidden_layers", part.get("n_layer", 12 if is_clip else None))
    if not isinstance(n_blocks, int):
        return None
    return Shape(model_type, n_blocks)


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
