"""The proof that a model's hook points are what their names say, made on the model itself with a few tokens.

Four facts are compared: a block's output with the input of the next, a block's output with the sum of its input and of
what its parts add, its input with the library's own `hidden_states`, and the model's logits with those of the clean
activation spliced in.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from saeflow.errors import UserError
from saeflow.sources.attach import attach, weight_at
from saeflow.sources.blocks import Block, Expression, Place, leaves
from saeflow.sources.heads import has_head, logits
from saeflow.sources.hook_points import block_input_of, capture, run_from
from saeflow.sources.hub import last_line
from saeflow.sources.layouts import PLACES, HookPoint
from saeflow.sources.structure import (
    ImageTower,
    Structure,
    body_of,
    no_cache,
    structure_of,
)
from saeflow.sources.tower_order import order_of
from saeflow.sources.towers import image_output, tower_output

_CONTEXTS, _LENGTH, _SEED = 2, 8, 0
_ROUNDING = 64
"""Multiples of the dtype's epsilon, of the largest entry, that sums in another order may differ by."""


@dataclass(frozen=True)
class Proof:
    """Numbers of facts that were compared and held."""

    kinds: Counter[str]
    """Blocks by kind."""
    places: list[str]
    """Places that some block has."""
    linked: int
    sums: int
    hidden_states: int
    identities: int

    def __str__(self) -> str:
        blocks = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        return (
            f"{blocks} blocks; {self.linked} links between blocks, {self.sums} sums, {self.hidden_states} hidden states "
            f"and {self.identities} splices agree"
        )


def prove(model: Any, hook_points: Sequence[str] | None = None, tower: str = "") -> Proof:
    """Compare what a model's hook points give with the model itself.

    Args:
        model: in evaluation mode.
        hook_points: those whose clean activation is spliced in; None for every place of every block.
        tower: "vision." for the hook points of its image tower.

    Raises:
        UserError: two of them differ.
    """
    structure = _structure(model, hook_points, tower)
    blocks = structure.blocks
    if hook_points is None:
        hook_points = [
            f"{tower}blocks.{i}.{place}"
            for i, block in enumerate(blocks)
            for place in PLACES
            if place in block.places
        ]
    inputs = _inputs(model, structure)
    with torch.no_grad():
        output, streams, given = _whole_run(model, structure, inputs)
        linked = _neighbours(model, blocks, streams) if structure.linked else 0
        sums = sum(_is_sum(model, block, streams, given) for block in blocks)
        equal = _library(model, blocks, streams, output)
        if blocks and not structure.linked and not equal:
            raise UserError(
                f"{type(model).__name__}: expected the {len(blocks)} modules of {structure.list_path} to be its blocks, found "
                "that none takes what the one before gives, nor the library's hidden_states. Name modules by their path "
                "(module.PATH.output)."
            )
        if structure.image is not None:
            order_of(model, _grid(structure.image))
        expected = _own_end(model, structure, output, inputs)
        if expected is not None:
            for name in hook_points:
                _identity(model, name, inputs, expected)
    places = [place for place in PLACES if any(place in block.places for block in blocks)]
    kinds = Counter(block.kind for block in blocks)
    identities = 0 if expected is None else len(hook_points)
    return Proof(kinds, places, linked, sums, equal, identities)


class _Rows(TorchDispatchMode):
    """While it is open, a table that is asked for a row it does not have is an error, on a GPU as on a CPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, rows = func._schema.name, None
        if name == "aten::embedding":
            rows, asked = len(args[0]), args[1]
        elif name in ("aten::gather", "aten::index_select"):
            rows, asked = args[0].shape[args[1]], args[2]
        if rows is not None and int(asked.max()) >= rows:
            raise IndexError(f"row {int(asked.max())} of {rows} is asked for")
        return func(*args, **(kwargs or {}))


def prove_with_context(model: Any, hook_points: Sequence[str], length: int) -> Proof:
    """Prove a language model's hook points, and that it takes contexts of a length, the same after short ones.

    Args:
        model: in evaluation mode.
        hook_points: of its language part.
        length: tokens of a context, which may be more than the model's learned positions.

    Raises:
        UserError: see `prove`; it does not take so many tokens, or the few tokens of the proof changed it (BigBird turns
            its sparse attention off for good).
    """
    before = _one_context(model, hook_points, length)
    for name, found in before.items():
        if found.ndim != 3 or found.shape[:2] != (1, length):
            raise UserError(
                f"{type(model).__name__}: {name}: expected a tensor (batch, position, width), found {tuple(found.shape)} of 1 x "
                f"{length} tokens. Name another module."
            )
    proof = prove(model, hook_points)
    after = _one_context(model, hook_points, length)
    for name, found in after.items():
        if not _close(found, before[name], float(before[name].abs().max())):
            raise UserError(
                f"{type(model).__name__}: expected the same activations at {name} of a context of {length} tokens before and "
                f"after one of {_LENGTH}, found them up to {float((found - before[name]).abs().max()):.2g} apart. Set "
                "context_length so that the model runs the same on both, or give another model."
            )
    return proof


def _one_context(model: Any, hook_points: Sequence[str], length: int) -> dict[str, Tensor]:
    """Activations at some hook points of one context of random tokens."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(_SEED))
    try:
        with _Rows():
            return capture(model, hook_points, ids.to(model.device))
    except (IndexError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"context_length: {type(model).__name__} does not take a context of {length} tokens ({last_line(str(error))}). "
            "Lower it, or give another model."
        ) from error


def _structure(model: Any, hook_points: Sequence[str] | None, tower: str) -> Structure:
    """The model's structure, without blocks where there are none and only modules are named."""
    try:
        return structure_of(model, tower)
    except UserError:
        if not hook_points or tower or not all(HookPoint.parse(one).module for one in hook_points):
            raise
        return Structure(body_of(model), "", [], None, linked=False, shares=True)


def _inputs(model: Any, structure: Structure) -> Tensor:
    """Random token ids, or pixels of random images."""
    generator = torch.Generator().manual_seed(_SEED)
    if structure.image is not None:
        pixels = torch.randn(_CONTEXTS, 3, *structure.image.size, generator=generator)
        return pixels.to(model.device, model.dtype)
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(vocabulary, (_CONTEXTS, _LENGTH), generator=generator)
    return ids.to(model.device)


def _whole_run(
    model: Any, structure: Structure, inputs: Tensor
) -> tuple[Any, dict[tuple[str, str], Tensor], dict[Place, Tensor]]:
    """The model's output, each block's input and output, and what its parts give."""
    streams: dict[tuple[str, str], Tensor] = {}
    given: dict[Place, Tensor] = {}

    def keep(found: dict[Any, Tensor], key: Any, x: Tensor) -> None:
        found[key] = x.clone()

    with ExitStack() as hooks:
        for block in structure.blocks:
            for name in ("resid_pre", "resid_post"):
                visit = partial(keep, streams, (block.path, name))
                hooks.enter_context(attach(model, block.places[name], visit, name))
            for term in leaves(block.sum_of) if block.sum_of else ():
                if term.place is not None:
                    visit = partial(keep, given, term.place)
                    hooks.enter_context(attach(model, term.place, visit, term.place.path))
        if structure.image is None:
            output = model(input_ids=inputs, output_hidden_states=True, **no_cache(model))
        else:
            tower = model.get_submodule(structure.body)
            output = tower_output(tower, inputs, output_hidden_states=True)
    for (path, name), x in streams.items():
        if not x.isfinite().all():
            raise UserError(
                f"{type(model).__name__}: expected finite activations, found NaN or infinity in {name} of {path}. Give a model "
                "with whole weights, or a wider sources.NAME.model.dtype."
            )
    return output, streams, given


def _grid(image: ImageTower) -> tuple[int, int]:
    return image.size[0] // image.patch[0], image.size[1] // image.patch[1]


def _equal(a: Tensor, b: Tensor) -> bool:
    """Compare values; a model may be spread over several devices."""
    return torch.equal(a.to(b.device), b)


def _close(a: Tensor, b: Tensor, largest: float) -> bool:
    a = a.to(b.device)
    bound = _ROUNDING * torch.finfo(b.dtype).eps * largest
    return a.shape == b.shape and bool(((a.double() - b.double()).abs() <= bound).all())


def _neighbours(
    model: nn.Module, blocks: Sequence[Block], streams: dict[tuple[str, str], Tensor]
) -> int:
    for number, (before, after) in enumerate(pairwise(blocks)):
        if not _equal(streams[before.path, "resid_post"], streams[after.path, "resid_pre"]):
            raise UserError(
                f"{type(model).__name__}: expected blocks.{number + 1}.resid_pre to be blocks.{number}.resid_post, found "
                f"other values ({before.path}, {after.path}). Name modules by their path (module.PATH.output)."
            )
    return len(blocks) - 1


def _is_sum(
    model: nn.Module,
    block: Block,
    streams: dict[tuple[str, str], Tensor],
    given: dict[Place, Tensor],
) -> bool:
    if block.sum_of is None:
        return False
    stream, found = streams[block.path, "resid_pre"], streams[block.path, "resid_post"]

    def value(one: Expression) -> Tensor:
        if one.terms:
            x = torch.stack([value(term).reshape(stream.shape) for term in one.terms]).sum(0)
            x = model.get_submodule(one.norm)(x) if one.norm else x
            x = x * weight_at(model, one.weight).to(x.device) if one.weight else x
        else:
            x = (stream if one.place is None else given[one.place]).to(found.device)
        return x * one.scale

    expected = value(block.sum_of)
    parts = [stream, *(given[t.place] for t in leaves(block.sum_of) if t.place), found]
    if not _close(expected, found, max(float(part.abs().max()) for part in parts)):
        raise UserError(
            f"{type(model).__name__}: expected the output of {block.path} to be its input and what its parts add, found "
            f"values up to {float((expected - found).abs().max()):.2g} away. Name modules by their path "
            "(module.PATH.output)."
        )
    return True


def _library(
    model: nn.Module,
    blocks: Sequence[Block],
    streams: dict[tuple[str, str], Tensor],
    output: Any,
) -> int:
    """Blocks whose input or output is the library's `hidden_states`; 0 where it gives none of their number."""
    hidden = getattr(output, "hidden_states", None) or getattr(
        output, "decoder_hidden_states", None
    )
    if not isinstance(hidden, tuple) or len(hidden) != len(blocks) + 1:
        return 0
    for name in ("resid_pre", "resid_post"):  # Mamba's are what its blocks give
        pairs = [(streams[block.path, name], x) for block, x in zip(blocks, hidden, strict=False)]
        if all(_equal(found, expected) for found, expected in pairs):
            return len(blocks)
    raise UserError(
        f"{type(model).__name__}: expected the library's hidden_states to be inputs or outputs of {blocks[0].path} and its "
        "like, found other values. Name modules by their path (module.PATH.output)."
    )


def _own_end(model: Any, structure: Structure, output: Any, inputs: Tensor) -> Tensor | None:
    """Output that the model itself ends in: an image's embedding, logits or final hidden states; None where it gives none."""
    if structure.image is not None:
        return image_output(model, inputs)
    found = output.logits if has_head(model) else getattr(output, "last_hidden_state", None)
    return found if isinstance(found, Tensor) else None


def _identity(model: Any, name: str, inputs: Tensor, expected: Tensor) -> None:
    """Splice the clean activation in, and something else."""
    point = HookPoint.parse(name)

    def end(hidden: Tensor) -> Tensor:
        return logits(model, hidden) if not point.tower and has_head(model) else hidden

    start = block_input_of(model, name)
    names = [name] if start is None else [start, name]
    found = capture(model, names, inputs)
    stream = found[names[0]]
    clean = end(run_from(model, name, stream, inputs, lambda _: found[name].clone()))
    if not _close(clean, expected, float(expected.abs().max())):
        raise UserError(
            f"{type(model).__name__}: expected the model's own output with the clean activation spliced in at {point}, "
            f"found them up to {float((clean - expected).abs().max()):.2g} away. Choose another hook point."
        )
    other = end(run_from(model, name, stream, inputs, torch.zeros_like))
    if _equal(other, expected) and bool(found[name].any()):
        raise UserError(
            f"{type(model).__name__}: expected another output with zeros spliced in at {point}, found the same: nothing "
            "reads what it gives. Choose another hook point."
        )
