"""Read and replace activations at hook points of models of transformers.

Only the blocks that are needed run: `capture` stops after the last hook point, `run_from` starts at the
hook point's block. Both leave a language model's lm head out; `saeflow.sources.heads.logits` applies it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from math import isqrt
from typing import Any, cast

import torch
from torch import Tensor, nn

from saeflow.errors import UserError
from saeflow.shapes import Shape
from saeflow.sources.attach import Visit, attach, forward_of
from saeflow.sources.blocks import Place
from saeflow.sources.layouts import PLACES, VISION, HookPoint, check_hook_points, check_shape
from saeflow.sources.structure import (
    body_of,
    module_place,
    no_cache,
    structure_of,
)
from saeflow.sources.tower_order import by_image
from saeflow.sources.towers import image_output

__all__ = [
    "HookPoint", "block_input_of", "capture", "check_hook_points", "check_model", "decoder_of", "hook", "resume_at", "run_from", "splice",
]  # fmt: skip


class _Stop(Exception):  # noqa: N818 (a signal, not an error)
    """Raised inside a forward pass when all that was asked for has been seen."""


def decoder_of(model: nn.Module, tower: str = "") -> nn.Module:
    """The part of a language model between token ids and lm head, or the image tower."""
    return model.get_submodule(body_of(model, tower))


def check_model(model: nn.Module, hook_points: Iterable[str]) -> None:
    """Check that a model has some hook points.

    Raises:
        UserError: bad name, a block that the model lacks, a place that a block lacks, or a structure that cannot
            be told.
    """
    for name in hook_points:
        _place(model, HookPoint.parse(name))


def _place(model: nn.Module, point: HookPoint) -> Place:
    """Find a hook point in a model."""
    name = type(model).__name__
    if point.module:
        return module_place(model, point)
    if not point.tower and _is_of_images(model):
        raise UserError(
            f"{name}: expected hook points of its image tower (vision.blocks.N.resid_post), found {point}. Correct it, or "
            "give a language model."
        )
    structure = structure_of(model, point.tower)
    if point.is_embedding:
        if structure.image is None or structure.image.embedding is None:
            raise UserError(
                f"{name}: {point} is an embedding that texts share, found no text tower. Take a hook point of the image "
                "tower, such as its last block's resid_post."
            )
        return structure.image.embedding
    blocks = structure.blocks
    config: Any = model.config
    check_shape(Shape(config.model_type, len(blocks), bool(point.tower)), [str(point)], name)
    block = blocks[point.block]
    if point.place not in block.places:
        raise UserError(
            f"{name}: {block.path} has no {point.place}: {block.missing[point.place]}. It has "
            f"{', '.join(place for place in PLACES if place in block.places)}; other modules can be named as "
            f"module.{block.path}.PATH.output."
        )
    return block.places[point.place]


def _is_of_images(model: Any) -> bool:
    takes = getattr(getattr(model, "base_model", model), "main_input_name", "")
    return hasattr(model, "get_text_features") or takes == "pixel_values"


def resume_at(model: nn.Module, hook_point: str) -> str | None:
    """The block input that the activation at a hook point is, if it is one."""
    point = HookPoint.parse(hook_point)
    if point.module or point.is_embedding:
        return None
    structure = structure_of(model, point.tower)
    found = point.resume_at(len(structure.blocks))
    return None if found is None or not structure.linked else str(found)


def block_input_of(model: nn.Module, hook_point: str) -> str | None:
    """The residual stream before the block that a hook point is in; None if it is in none."""
    point = HookPoint.parse(hook_point)
    if point.is_embedding:
        return None
    if not point.module:
        return str(point.block_input)
    try:
        blocks = structure_of(model, point.tower).blocks
    except UserError:
        return None
    inside = [
        i for i, block in enumerate(blocks) if f"{point.module}.".startswith(f"{block.path}.")
    ]
    return str(HookPoint(inside[0], 0, point.tower)) if inside else None


def _attach(model: nn.Module, point: HookPoint, visit: Visit, *, first: bool = False) -> ExitStack:
    """Register `visit` at a hook point; closing the result takes it away.

    What a module of a language model gives as (batch x position, d_in), as routers do, is seen by context, and what an image
    tower gives by image and in order.
    """
    place = _place(model, point)
    if point.tower:
        ordered, calls = by_image(model, visit)
        calls.enter_context(attach(model, place, ordered, str(point), first=first))
        return calls
    if not point.module:
        return attach(model, place, visit, str(point), first=first)
    contexts: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
        contexts[:] = next(x for x in given if isinstance(x, Tensor)).shape[:2]

    def see(x: Tensor) -> Tensor | None:
        if x.ndim != 2 or len(x) != contexts[0] * contexts[1]:
            return visit(x)
        new = visit(x.reshape(*contexts, -1))
        return None if new is None else new.reshape(x.shape)

    hooks = attach(model, place, see, str(point))
    for one in {model, decoder_of(model)}:
        hooks.callback(one.register_forward_pre_hook(note, with_kwargs=True).remove)
    return hooks


def _run(model: nn.Module, tower: str, inputs: Tensor) -> Tensor:
    """Final hidden states of token ids (batch, position), or embeddings of pixels (batch, 3, h, w)."""
    if tower:
        return image_output(model, inputs)
    body: Any = decoder_of(model)
    hidden_states: Tensor = body(input_ids=inputs, **no_cache(body)).last_hidden_state
    return hidden_states.to(inputs.device)  # a model may be spread over several devices


@torch.no_grad()
def capture(model: nn.Module, hook_points: Iterable[str], inputs: Tensor) -> dict[str, Tensor]:
    """Activations at some hook points; nothing after the last of them runs.

    Args:
        model: a model of language or images, in evaluation mode.
        hook_points: names such as `blocks.8.resid_post`, all of one tower.
        inputs: token ids (batch, position), each position sees those before it; or normalised pixels
            (batch, 3, height, width) for hook points of the image tower.

    Returns:
        By name, in the order asked for: (batch, position, d_in), the embedding (batch, d_in), in the
        model's dtype and device.

    Raises:
        UserError: unknown structure, bad name or a block that the model lacks.
    """
    names = list(hook_points)
    check_model(model, names)
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Visit:
        changed = _place(model, HookPoint.parse(name)).changed

        def visit(x: Tensor) -> None:
            found[name] = x.clone() if changed else x
            if len(found) == len(set(names)):
                raise _Stop

        return visit

    with ExitStack() as hooks:
        for name in set(names):
            hooks.enter_context(_attach(model, HookPoint.parse(name), keep(name)))
        hooks.enter_context(suppress(_Stop))
        point = HookPoint.parse(names[0])
        if point.module and not point.tower:  # in any model, also one without blocks
            cast(Any, model)(input_ids=inputs, **no_cache(model))
        else:
            _run(model, point.tower, inputs)
    if missing := [name for name in names if name not in found]:
        raise UserError(
            f"{type(model).__name__}: {', '.join(missing)}: the module does not run (a fused kernel may take its place). "
            "Name the module around it."
        )
    return {name: found[name] for name in names}


@contextmanager
def splice(
    model: nn.Module, hook_point: str, replace: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """While the context is open, `replace`(activation) takes the activation's place at a hook point.

    Args:
        model: a causal language model or CLIP.
        hook_point: a name such as `blocks.8.resid_post`.
        replace: (batch, position, d_in) to the same shape, dtype and device.
    """
    check_model(model, [hook_point])
    with _attach(model, HookPoint.parse(hook_point), replace):
        yield


@contextmanager
def hook(
    model: nn.Module,
    hook_point: str,
    sae: nn.Module,
    *,
    edit: Callable[[Tensor], Tensor] | Sequence[Callable[[Tensor], Tensor]] | None = None,
    keep_error: bool = False,
    positions: slice | None = None,
) -> Iterator[None]:
    """While the context is open, the model runs on `sae`'s reconstructions at a hook point.

    Gradients flow through. Positions that the SAE's training left out keep their activations, as in the evaluation.

    Args:
        model: a causal language model or CLIP.
        hook_point: a name such as `blocks.8.resid_post`.
        sae: takes and returns raw activations (n, d_in), in its own dtype and on its own device.
        edit: what is done to the latents (n, d_sae) before they are decoded, such as `saeflow.ablate(7)`,
            `clamp`, `scale`, `add`, or any function of them; it may also only look at them. Of several, each takes
            what the one before it gives.
        keep_error: add what the SAE does not reconstruct, x - x_hat, so that the model is changed by the
            edit alone; without an edit nothing is changed then.
        positions: those that the SAE sees, counted from the start of each sequence (so no left padding); None:
            those that it was trained on (`sae.positions`), all of them where that is not known.
    """
    edits = [edit] if callable(edit) else list(edit or ())
    point = HookPoint.parse(hook_point)
    seen = positions if positions is not None else _positions(model, point, sae)
    done = 0

    def count_done(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal done
        cache = kwargs.get("past_key_values")
        done = 0 if cache is None else int(cache.get_seq_length())

    def rebuild(rows: Tensor) -> Tensor:
        if not edits and not keep_error:
            found: Tensor = sae(rows)
            return found
        coder: Any = sae
        latents = coder.encode(rows)
        # A copy: with the error kept, its gradient is that of the decoded latents alone.
        edited = latents.clone() if edits else latents
        for one in edits:
            edited = one(edited)
        decoded: Tensor = coder.decode(edited)
        return decoded + (rows - coder.decode(latents)) if keep_error else decoded

    def replace(x: Tensor) -> Tensor:
        own = next(sae.parameters(), x)
        d_in = getattr(sae, "d_in", x.shape[-1])
        if x.shape[-1] != d_in:
            raise UserError(
                f"{hook_point}: activations have width {x.shape[-1]}, but the SAE expects {d_in}. "
                "Use an SAE that was trained on this model and hook point."
            )
        first, last, _ = seen.indices(done + x.shape[1]) if x.ndim == 3 else (0, 0, 1)
        part = x[:, max(0, first - done) : max(0, last - done)] if x.ndim == 3 else x
        rows = part.reshape(-1, x.shape[-1]).to(device=own.device, dtype=own.dtype)
        if not len(rows):
            return x
        rebuilt = rebuild(rows).reshape(part.shape).to(device=x.device, dtype=x.dtype)
        if part.shape == x.shape:
            return rebuilt
        before, after = x[:, : max(0, first - done)], x[:, max(0, last - done) :]
        return torch.cat([before, rebuilt, after], dim=1)

    body = decoder_of(model, point.tower)
    counting = body.register_forward_pre_hook(count_done, with_kwargs=True)
    try:
        with splice(model, hook_point, replace):
            yield
    finally:
        counting.remove()


def _positions(model: nn.Module, point: HookPoint, sae: nn.Module) -> slice:
    """Positions of a model that an SAE was trained on; in its config 0 is an image's CLS token and 1 the first patch."""
    found: slice = getattr(sae, "positions", slice(None))
    if not point.tower or found.start in (None, 0):
        return found
    image = structure_of(model, point.tower).image
    assert image is not None
    return slice(found.start - 1 + image.prefix, found.stop)


@torch.no_grad()
def run_from(
    model: nn.Module,
    hook_point: str,
    block_input: Tensor | None,
    inputs: Tensor | None,
    replace: Callable[[Tensor], Tensor],
) -> Tensor:
    """Run a model from a hook point's block on, with the activation at the hook point replaced.

    Args:
        model: a causal language model or CLIP, in evaluation mode.
        hook_point: a name such as `blocks.8.mlp_out`.
        block_input: (batch, position, d_model), what `capture` gives at `block_input_of`; None where the hook point is
            in no block, and the whole model runs.
        inputs: (batch, position) the ids that `block_input` came from; they set shape and masks. An image tower's
            pixels may be left out where `block_input` is given.
        replace: (batch, position, d_in) to the same shape.

    Returns:
        (batch, position, d_model) hidden states after the final norm, as the lm head takes them; of an image tower
        with a text tower (batch, d_embedding).
    """
    check_model(model, [hook_point])
    point = HookPoint.parse(hook_point)
    start = block_input_of(model, hook_point)
    with ExitStack() as hooks:
        resumes = (
            start is not None
            and block_input is not None
            and not structure_of(model, point.tower).shares
        )
        if resumes:
            assert start is not None
            before = HookPoint.parse(start)
            hooks.enter_context(_passed_over(model, before))
            given = _attach(model, before, lambda _: block_input, first=True)
            hooks.enter_context(given)
        hooks.enter_context(_attach(model, point, replace))
        if point.tower and inputs is None:
            if not resumes or block_input is None:
                raise UserError(
                    f"{point}: no image embedding is computed from it. Take a hook point in a block."
                )
            inputs = _no_image(model, block_input)
        assert inputs is not None
        return _run(model, point.tower, inputs)


def _no_image(model: nn.Module, block_input: Tensor) -> Tensor:
    """Pixels (batch, 3, height, width), zeros, of images that have as many positions as `block_input`."""
    image = structure_of(model, VISION).image
    assert image is not None
    (height, width), patch = image.size, image.patch
    n, patches = len(block_input), block_input.shape[1] - image.prefix
    if (height // patch[0]) * (width // patch[1]) != patches:  # the tower takes other sizes too
        side = isqrt(patches)
        if side * side != patches:
            raise UserError(
                f"{type(model).__name__}: expected the positions of square images, found {patches} patches."
            )
        height, width = side * patch[0], side * patch[1]
    return block_input.new_zeros(n, 3, height, width)


@contextmanager
def _passed_over(model: nn.Module, before: HookPoint) -> Iterator[None]:
    """While the context is open, the blocks before one give back their input and compute nothing.

    The blocks stay in the model's list, so what a model asks of them (such as their kind of attention)
    is still answered.
    """

    def passing(place_in: Place, place_out: Place, length: int) -> Callable[..., Any]:
        def pass_through(*args: Any, **kwargs: Any) -> Any:
            key = place_in.key
            stream = kwargs[key] if isinstance(key, str) else args[cast(int, key)]
            if place_out.key is None:
                return stream
            return tuple(stream if i == place_out.key else None for i in range(length))

        return pass_through

    blocks = structure_of(model, before.tower).blocks[: before.block]
    with ExitStack() as undo:
        for block in blocks:
            forward = passing(block.places["resid_pre"], block.places["resid_post"], block.length)
            undo.enter_context(forward_of(model.get_submodule(block.path), forward))
        yield
