"""Hook points by name, checked against a model's shape; loads no model code.

`blocks.N.resid_pre` and `blocks.N.resid_post` are the residual stream before and after block N, `blocks.N.resid_mid`
the one between attention and MLP; `blocks.N.attn_out` and `blocks.N.mlp_out` are what the block adds to it
(TransformerLens's definitions), so that resid_post = resid_pre + attn_out + mlp_out; `blocks.N.attn_in` and
`blocks.N.mlp_in` are what attention and MLP take, after the norm before them. Of a model with an image tower,
`vision.blocks.N...` are the same there, and `vision.embedding` is the image's projected embedding, one vector an image.
`module.PATH.input` and `module.PATH.output` are what any module takes and gives, `module.PATH.output.1` the
second of several values.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saeflow.errors import UserError
from saeflow.shapes import MOST_BLOCKS, Shape, fetched_shape, known_shape

PLACES = ("resid_pre", "attn_in", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
"""In the order in which a block computes them."""
VISION = "vision."
EMBEDDING = "vision.embedding"
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


def check_shape(shape: Shape, hook_points: Iterable[str], model: str) -> None:
    """Check that a model has some hook points.

    Raises:
        UserError: it has not.
    """
    if shape.n_blocks is not None and not 1 <= shape.n_blocks <= MOST_BLOCKS:
        raise UserError(
            f"{model}: expected 1 to {MOST_BLOCKS} blocks, found {shape.n_blocks}. Fix its config, or download it again."
        )
    for name in hook_points:
        point = HookPoint.parse(name)
        if shape.is_of_images and not point.tower:
            raise UserError(
                f"{model}: expected hook points of its image tower (vision.blocks.N.resid_post), found {name}. "
                "Correct it, or give a language model."
            )
        if shape.n_blocks is None or shape.is_of_images != bool(point.tower):
            continue  # the model's structure tells when it is fetched
        if point.is_in_block and point.block >= shape.n_blocks:
            raise UserError(
                f"{model}: the model has {shape.n_blocks} blocks (0..{shape.n_blocks - 1}), found "
                f"hook point {name}. Choose a block below {shape.n_blocks}."
            )


def check_hook_points(name: str, source: Mapping[str, Any], folder: Path) -> Shape | None:
    """Check a source's hook points as far as can be told without weights or network.

    A hub model that was never downloaded, and is not in shapes.yaml, is checked when it is fetched.

    Args:
        name: the source's name, for messages.
        source: its parameters, with `model` and `hook_points`.
        folder: results/sources/NAME, which may hold the fetched model.

    Returns:
        The model's shape, where it is known.

    Raises:
        UserError: a hook point that the model lacks or a damaged model file.
    """
    points = [HookPoint.parse(point) for point in source["hook_points"]]
    shape = known_shape(source["model"]) or fetched_shape(source["model"], folder / "model")
    if shape is not None:
        check_shape(shape, map(str, points), f"sources.{name}")
    return shape
