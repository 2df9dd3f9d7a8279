"""Read and replace activations at hook points of Hugging Face causal language models and of CLIP.

Only the blocks that are needed run: `capture` stops after the last hook point, `run_from` starts at the
hook point's block. Both leave a language model's lm head out; `logits` applies it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from saeflow.errors import UserError
from saeflow.sources.layouts import (
    HookPoint,
    Layout,
    Shape,
    check_hook_points,
    check_shape,
    layout_of,
)

__all__ = [
    "HookPoint", "capture", "check_hook_points", "check_model", "decoder_of", "hook", "logits",
    "resume_at", "run_from", "splice",
]  # fmt: skip

Visit = Callable[[Tensor], Tensor | None]
"""Sees the activation (batch, position, d_in), an image's embedding (batch, d_in); returns what takes its place, or None to keep it."""


class _Stop(Exception):  # noqa: N818 (a signal, not an error)
    """Raised inside a forward pass when all that was asked for has been seen."""


def _layout(model: nn.Module, tower: str) -> Layout:
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return layout_of(model_type, type(model).__name__, tower)


def decoder_of(model: nn.Module, tower: str = "") -> nn.Module:
    """The part of a causal language model between token ids and lm head, or CLIP's image tower."""
    path = _layout(model, tower).decoder
    try:
        return model.get_submodule(path)
    except AttributeError:
        kind = (
            "a CLIP model with its image tower"
            if tower
            else "a causal language model with its decoder"
        )
        loader = "CLIPModel" if tower else "AutoModelForCausalLM"
        raise UserError(
            f"{type(model).__name__}: expected {kind} at {path}. Load it with {loader}."
        ) from None


def _blocks(model: nn.Module, tower: str) -> Any:
    return decoder_of(model, tower).get_submodule(_layout(model, tower).blocks)


def check_model(model: nn.Module, hook_points: Iterable[str]) -> None:
    """Check that a model has some hook points.

    Raises:
        UserError: unknown layout, bad name or a block that the model lacks.
    """
    config: Any = getattr(model, "config", None)
    for name in hook_points:
        tower = HookPoint.parse(name).tower
        _layout(model, tower)
        shape = Shape(config.model_type, len(_blocks(model, tower)))
        check_shape(shape, [name], type(model).__name__)


def resume_at(model: nn.Module, hook_point: str) -> str | None:
    """The block input that the activation at a hook point is, if it is one."""
    point = HookPoint.parse(hook_point)
    found = point.resume_at(len(_blocks(model, point.tower)))
    return None if found is None else str(found)


def _attach(model: nn.Module, point: HookPoint, visit: Visit) -> Any:
    """Register `visit` at a hook point; the handle's `remove` takes it away."""

    def visit_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = visit(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = visit(kwargs["hidden_states"])
        return None if new is None else (args, kwargs | {"hidden_states": new})

    def visit_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            new = visit(output[0])
            return None if new is None else (new, *output[1:])
        return visit(output)

    if point.is_embedding:
        return cast(nn.Module, model.visual_projection).register_forward_hook(visit_output)
    layout, block = _layout(model, point.tower), _blocks(model, point.tower)[point.block]
    if point.place == "resid_pre":
        return block.register_forward_pre_hook(visit_input, with_kwargs=True)
    path = {"attn_out": layout.attention, "mlp_out": layout.mlp, "resid_post": ""}[point.place]
    return block.get_submodule(path).register_forward_hook(visit_output)


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the lm head of a causal language model."""
    body = decoder_of(model)
    found = [part for name, part in body.named_children() if name in _FINAL_NORMS]
    if len(found) != 1:
        raise UserError(
            f"{type(model).__name__}: expected its final norm under one of {', '.join(_FINAL_NORMS)}, found "
            f"{len(found)}. Use a model of a known layout."
        )
    return found[0]


_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm")


def _run(model: nn.Module, tower: str, inputs: Tensor) -> Tensor:
    """Final hidden states of token ids (batch, position), or embeddings of pixels (batch, 3, h, w)."""
    body: Any = decoder_of(model, tower)
    if tower:
        embedding: Tensor = cast(nn.Module, model.visual_projection)(body(inputs).pooler_output)
        return embedding
    hidden: Tensor = body(input_ids=inputs, use_cache=False).last_hidden_state
    return hidden


@torch.no_grad()
def capture(model: nn.Module, hook_points: Iterable[str], inputs: Tensor) -> dict[str, Tensor]:
    """Activations at some hook points; nothing after the last of them runs.

    Args:
        model: a causal language model of a known layout or CLIP, in evaluation mode.
        hook_points: names such as `blocks.8.resid_post`, all of one tower.
        inputs: token ids (batch, position), each position sees those before it; or normalised pixels
            (batch, 3, height, width) for hook points of the image tower.

    Returns:
        By name, in the order asked for: (batch, position, d_in), the embedding (batch, d_in), in the
        model's dtype and device.

    Raises:
        UserError: unknown layout, bad name or a block that the model lacks.
    """
    names = list(hook_points)
    check_model(model, names)
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Visit:
        def visit(x: Tensor) -> None:
            found[name] = x
            if len(found) == len(set(names)):
                raise _Stop

        return visit

    with ExitStack() as hooks:
        for name in set(names):
            hooks.callback(_attach(model, HookPoint.parse(name), keep(name)).remove)
        hooks.enter_context(suppress(_Stop))
        _run(model, HookPoint.parse(names[0]).tower, inputs)
    return {name: found[name] for name in names}


@contextmanager
def splice(
    model: nn.Module, hook_point: str, replace: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """While the context is open, `replace`(activation) takes the activation's place at a hook point.

    Args:
        model: a causal language model of a known layout or CLIP.
        hook_point: a name such as `blocks.8.resid_post`.
        replace: (batch, position, d_in) to the same shape, dtype and device.
    """
    check_model(model, [hook_point])
    handle = _attach(model, HookPoint.parse(hook_point), replace)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def hook(
    model: nn.Module,
    hook_point: str,
    sae: nn.Module,
    *,
    edit: Callable[[Tensor], Tensor] | None = None,
    keep_error: bool = False,
    positions: slice | None = None,
) -> Iterator[None]:
    """While the context is open, the model runs on `sae`'s reconstructions at a hook point.

    Gradients flow through. Positions that the SAE's training left out keep their activations, as in the evaluation.

    Args:
        model: a causal language model of a known layout or CLIP.
        hook_point: a name such as `blocks.8.resid_post`.
        sae: takes and returns raw activations (n, d_in), in its own dtype and on its own device.
        edit: what is done to the latents (n, d_sae) before they are decoded, such as `saeflow.ablate(7)`,
            `clamp`, `scale`, `add`, or any function of them; it may also only look at them.
        keep_error: add what the SAE does not reconstruct, x - x_hat, so that the model is changed by the
            edit alone; without an edit nothing is changed then.
        positions: those that the SAE sees, counted from the start of each sequence (so no left padding); None:
            those that it was trained on (`sae.positions`), all of them where that is not known.
    """
    seen = positions if positions is not None else getattr(sae, "positions", slice(None))
    done = 0

    def count_done(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal done
        cache = kwargs.get("past_key_values")
        done = 0 if cache is None else int(cache.get_seq_length())

    def rebuild(rows: Tensor) -> Tensor:
        if edit is None and not keep_error:
            found: Tensor = sae(rows)
            return found
        coder: Any = sae
        latents = coder.encode(rows)
        # A copy: with the error kept, its gradient is that of the decoded latents alone.
        decoded: Tensor = coder.decode(latents if edit is None else edit(latents.clone()))
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

    body = decoder_of(model, HookPoint.parse(hook_point).tower)
    counting = body.register_forward_pre_hook(count_done, with_kwargs=True)
    try:
        with splice(model, hook_point, replace):
            yield
    finally:
        counting.remove()


@torch.no_grad()
def run_from(
    model: nn.Module,
    hook_point: str,
    block_input: Tensor,
    inputs: Tensor | None,
    replace: Callable[[Tensor], Tensor],
) -> Tensor:
    """Run a model from a hook point's block on, with the activation at the hook point replaced.

    Args:
        model: a causal language model of a known layout or CLIP, in evaluation mode.
        hook_point: a name such as `blocks.8.mlp_out`.
        block_input: (batch, position, d_model), what `capture` gives at `HookPoint.block_input`.
        inputs: (batch, position) the ids that `block_input` came from; they set shape and masks. The
            image tower needs none.
        replace: (batch, position, d_in) to the same shape.

    Returns:
        (batch, position, d_model) hidden states after the final norm, as the lm head takes them; of the
        image tower (batch, d_embedding).
    """
    check_model(model, [hook_point])
    point = HookPoint.parse(hook_point)
    with ExitStack() as hooks:
        hooks.enter_context(_passed_over(_blocks(model, point.tower)[: point.block]))
        hooks.callback(_attach(model, point.block_input, lambda _: block_input).remove)
        hooks.callback(_attach(model, point, replace).remove)
        if not point.tower:
            assert inputs is not None
            return _run(model, point.tower, inputs)
        body: Any = decoder_of(model, point.tower)
        hidden = body.encoder(inputs_embeds=block_input).last_hidden_state
        embedding: Tensor = cast(nn.Module, model.visual_projection)(
            body.post_layernorm(hidden[:, 0])
        )
        return embedding


@contextmanager
def _passed_over(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """While the context is open, these blocks give back their input and compute nothing.

    The blocks stay in the model's list, so what a model asks of them (such as their kind of attention)
    is still answered.
    """

    def pass_through(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    with ExitStack() as undo:
        for block in blocks:
            own = block.__dict__.get("forward")
            if own is None:
                undo.callback(block.__dict__.pop, "forward")
            else:
                undo.callback(block.__dict__.__setitem__, "forward", own)
            block.__dict__["forward"] = pass_through
        yield


def logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Next-token logits from final hidden states, with the soft cap of models that have one.

    Args:
        model: a causal language model.
        hidden: (..., d_model), what `run_from` gives.

    Returns:
        (..., vocabulary) logits in nats, dtype of the lm head.
    """
    causal: Any = model
    scores: Tensor = causal.get_output_embeddings()(hidden)
    cap = getattr(causal.config.get_text_config(), "final_logit_softcapping", None)
    return scores if cap is None else torch.tanh(scores / cap) * cap
