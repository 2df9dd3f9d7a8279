"""The blocks of a transformers model and the places inside them, found in a trace of the model itself.

A list of modules of which each takes what the one before gives holds the blocks; `blocks` finds what each of them adds.
No value is needed: the model is built once more from its configuration, of shapes alone.
"""

import copy
import inspect
import logging
import weakref
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from saeflow.errors import UserError
from saeflow.sources.architectures import (
    DEPTHS,
    architecture,
    depth_of,
    image_part,
    is_known,
    tower_of,
)
from saeflow.sources.blocks import (
    BATCH,
    LENGTH,
    Block,
    Place,
    block_of,
    has_matrix,
    input_of,
    output_of,
    stream_of,
)  # fmt: skip
from saeflow.sources.hub import last_line
from saeflow.sources.layouts import VISION, HookPoint
from saeflow.sources.towers import image_output, image_size, pair
from saeflow.sources.trace import Call, Trace

logger = logging.getLogger(__name__)


@dataclass
class Structure:
    """A model's blocks."""

    body: str
    """Path of the module between inputs and head."""
    list_path: str
    blocks: list[Block]
    final_norm: str | None
    linked: bool
    """Each block's input is the output of the one before."""
    shares: bool
    """Blocks take something else from earlier ones, so that these must run."""
    image: "ImageTower | None" = None


@dataclass(frozen=True)
class ImageTower:
    """An image tower's sizes."""

    size: tuple[int, int]
    """(height, width) of the images that it is made for, in pixels; where it takes any size, of those of the trace."""
    patch: tuple[int, int]
    """(height, width) of a patch."""
    prefix: int
    """Positions before the first patch: 1 with a CLS token, more with registers."""
    embedding: Place | None
    """Place of the image's projected embedding, in a model with a text tower."""
    d_model: int
    """Width of the residual stream."""
    is_flat: bool
    """It runs on (image x position, d_model)."""


_FOUND: "weakref.WeakKeyDictionary[nn.Module, dict[str, Structure]]" = weakref.WeakKeyDictionary()


def structure_of(model: Any, tower: str = "") -> Structure:
    """Return the structure of a language model, or of a model's image tower.

    Args:
        model: a model of transformers.
        tower: "vision." for its image tower.

    Raises:
        UserError: it is no model of transformers, or has no list of blocks.
    """
    found = _FOUND.setdefault(model, {})
    if tower not in found:
        found[tower] = _resolve(model, _traced(model, tower), tower)
    return found[tower]


class UntoldStructureError(UserError):
    """A model whose structure shapes alone do not tell, and whose weights are not there."""


def without_weights(config: Any) -> Any:
    """A configuration's model of shapes alone.

    Raises:
        UserError: the library cannot build it.
    """
    from saeflow.sources.loading import one_line

    advice = "Give another model."
    with (
        one_line(f"model_type {config.model_type!r}: the model cannot be built", advice),
        FakeTensorMode(),
        no_init_weights(),
    ):
        return architecture(config).from_config(copy.deepcopy(config)).eval()


def _traced(model: Any, tower: str) -> Trace:
    """Trace a model of the same class and configuration without weights, or the model itself if that fails."""
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"{type(model).__name__}: expected a model of transformers. Load it with AutoModelForCausalLM, or name "
            "a module's path (module.PATH.output)."
        )
    with _disable_current_modes(), torch.no_grad():
        try:
            with FakeTensorMode(), no_init_weights():
                twin = type(model)._from_config(
                    copy.deepcopy(model.config),
                    attn_implementation="eager",
                    experts_implementation="batched_mm",  # whose shapes no value decides
                )
                return _trace(twin.eval(), tower, torch.device("cpu"))
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            # Mixtures of experts may ask which experts have tokens, which shapes alone do not tell.
            if isinstance(next(model.parameters(), None), FakeTensor):
                raise UntoldStructureError(
                    f"{type(model).__name__}: its structure cannot be told without its weights "
                    f"({last_line(str(error))}). Fetch the model first."
                ) from error
            logger.debug("%s: traced with its weights (%s)", type(model).__name__, error)
            return _trace(model, tower, model.device)


def _trace(model: Any, tower: str, device: torch.device) -> Trace:
    trace = Trace()
    if tower:
        pixels = torch.zeros(BATCH, 3, *image_size(model), device=device)
        with trace, trace.watching(model):
            found = image_output(model, pixels)
            trace.result = trace.node(found)
        return trace
    ids = torch.arange(BATCH * LENGTH, device=device) % model.config.get_text_config().vocab_size
    with trace, trace.watching(model):
        model(input_ids=ids.reshape(BATCH, LENGTH), **no_cache(model))
    return trace


def image_tower(config: Any, height: int, width: int) -> "ImageTower":
    """An image tower's sizes, of a configuration alone.

    Args:
        config: of a model of images, or of images and text.
        height, width: of its images, in pixels.

    Raises:
        UserError: the tower does not take images of that size.
    """
    tower = _tower_alone(config)
    image = structure_of(tower, VISION).image
    assert image is not None
    if (height, width) != image.size:
        try:
            fake: Any = next(tower.parameters())
            with fake.fake_mode, torch.no_grad():
                image_output(tower, torch.zeros(1, 3, height, width))
        except (ValueError, RuntimeError):
            raise UserError(
                f"expected images of {image.size[0]} pixels (config.json), found a crop of {height} x {width} "
                "(preprocessor_config.json). Fix one of them."
            ) from None
    return image


def _tower_alone(config: Any) -> Any:
    """The image tower of a configuration, of shapes alone, with one block: all have the same positions."""
    config = copy.deepcopy(config)
    part = image_part(config)
    for name in DEPTHS:
        if hasattr(part, name):
            setattr(part, name, 1)
    if is_known(part):
        return without_weights(part)
    return tower_of(without_weights(config))


def body_of(model: Any, tower: str = "") -> str:
    """Path of the module between inputs and head; without a list of blocks the first model of transformers inside."""
    try:
        return structure_of(model, tower).body
    except UntoldStructureError:
        raise
    except UserError:
        inside = (
            path for path, one in model.named_modules() if path and isinstance(one, PreTrainedModel)
        )
        return next(inside, "")


def _path_of(model: nn.Module, module: nn.Module) -> str:
    result: str = next(path for path, one in model.named_modules() if one is module)
    return result


def no_cache(body: nn.Module) -> dict[str, Any]:
    """The argument that keeps a model from storing keys and values, where it has one."""
    known = inspect.signature(body.forward).parameters
    return {"use_cache": False} if "use_cache" in known or "kwargs" in known else {}


def module_place(model: nn.Module, point: HookPoint) -> Place:
    """The place that a module's path names.

    Raises:
        UserError: the model has no such module.
    """
    names, module = point.module.split("."), model
    for n, name in enumerate(names):
        inside = dict(module.named_children())
        if name not in inside:
            where = ".".join(names[:n]) or type(model).__name__
            raise UserError(
                f"{type(model).__name__}: no module {point.module}: {where} has {_some(list(inside))}, found "
                f"{name!r}. Correct the path."
            )
        module = inside[name]
    return Place(point.module, point.place, point.index)


def _some(names: list[str]) -> str:
    return (
        ", ".join(names[:12]) + (f" ... ({len(names)})" if len(names) > 12 else "") or "no modules"
    )


def _resolve(model: Any, trace: Trace, tower: str) -> Structure:
    calls = {call.path: call for call in trace.calls}
    counts: dict[str, int] = {}
    for call in trace.calls:
        counts[call.path] = counts.get(call.path, 0) + 1
    config = image_part(model.config) if tower else model.config.get_text_config()
    wanted = depth_of(config)
    found: list[tuple[bool, bool, int, str, list[Call]]] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        paths = [f"{path}.{i}" for i in range(len(module))]
        if any(counts.get(one) != 1 or stream_of(calls[one], tower) is None for one in paths):
            continue
        runs = [calls[one] for one in paths]
        is_other, is_linked = len(module) != wanted, _are_linked(runs)
        if is_other and not is_linked:
            continue
        found.append((is_other, not is_linked, path.count("."), path, runs))
    if not found:
        raise UserError(
            f"{type(model).__name__}: expected a list of blocks that each take and give (batch, position, width), found "
            f"none. Its lists of modules: {_lists(model, trace)}. Name a module's path instead (module.PATH.output)."
        )
    *_, path, runs = min(found, key=lambda one: one[:4])
    return Structure(
        body=_path_of(model, tower_of(model)) if tower else _body(model, path),
        list_path=path,
        blocks=[block_of(trace, run) for run in runs],
        final_norm=_final_norm(trace, runs[-1], path),
        linked=_are_linked(runs),
        shares=_shares(trace, runs, path),
        image=_image(model, trace, runs[0]) if tower else None,
    )


def _image(model: Any, trace: Trace, first: Call) -> ImageTower:
    """Sizes of an image tower and where its embedding is given."""
    size, patch = image_size(model), pair(image_part(model.config).patch_size)
    patches = (size[0] // patch[0]) * (size[1] // patch[1])
    stream = input_of(first).shape
    positions = stream[1] if len(stream) > 2 else stream[0] // BATCH
    prefix = positions - patches
    if prefix < 0:
        raise UserError(
            f"{type(model).__name__}: expected a position for each of {patches} patches, found {positions} positions. Take "
            "another model of images."
        )
    embedding = None
    if hasattr(model, "get_text_features"):
        assert trace.result is not None
        call, key = next(
            (call, key)
            for call in trace.calls
            for key, node in call.outputs.items()
            if node.origin is trace.result.origin
        )
        embedding = Place(call.path, "output", key)
    return ImageTower(size, patch, prefix, embedding, stream[-1], is_flat=len(stream) == 2)


def _are_linked(runs: list[Call]) -> bool:
    pairs = pairwise(runs)
    return all(output_of(a).origin is input_of(b).origin for a, b in pairs)


def _lists(model: nn.Module, trace: Trace) -> str:
    """Lists of modules with what their first takes, in a run of BATCH contexts of LENGTH positions, and how often it runs."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            runs = [call for call in trace.calls if call.path == f"{path}.0"]
            given = runs[0].first_input if runs else None
            takes = f", takes {' x '.join(map(str, given[1].shape))}" if given else ""
            often = f", runs {len(runs)} times" if len(runs) > 1 else ""
            found.append(f"{path} ({len(module)} {type(module[0]).__name__}{takes}{often})")
    return ", ".join(found[:6]) or "none"


def _body(model: nn.Module, path: str) -> str:
    """The innermost model of transformers around the blocks."""
    names = path.split(".")
    for n in range(len(names) - 1, 0, -1):
        inside = ".".join(names[:n])
        if isinstance(model.get_submodule(inside), PreTrainedModel):
            return inside
    return ""


def _final_norm(trace: Trace, last: Call, path: str) -> str | None:
    """The module without matrices that takes what the last block gives."""
    for call in trace.calls:
        given = call.first_input
        outside = not call.path.startswith(path + ".")
        if not outside or call.started < last.ended or has_matrix(call.module) or not given:
            continue
        has_weights = next(call.module.parameters(), None) is not None
        if has_weights and given[1].origin is output_of(last).origin:
            return call.path
    return None


def _shares(trace: Trace, runs: list[Call], path: str) -> bool:
    """Tell whether a block takes anything but the residual stream from earlier blocks."""
    owner = {}
    for node in trace.nodes:
        if node.module.startswith(path + "."):
            owner[node] = int(node.module[len(path) + 1 :].split(".")[0])
    streams = {output_of(run).origin for run in runs} | {output_of(run) for run in runs}
    for node, block in owner.items():
        for given in node.inputs:
            if (
                owner.get(given, block) != block
                and given not in streams
                and given.origin not in streams
            ):
                return True
    return False
