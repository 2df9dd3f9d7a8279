"""Read and replace activations at hook points of Hugging Face causal language models.

Only the blocks that are needed run: `capture` stops after the last hook point, `run_from` starts at the
hook point's block. Both leave the lm head out; `logits` applies it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

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
    "run_from", "splice",
]  # fmt: skip

Visit = Callable[[Tensor], Tensor | None]
"""Sees the activation (batch, position, d_in); returns what takes its place, or None to keep it."""


class _Stop(Exception):  # noqa: N818 (a signal, not an error)
    """Raised inside a forward pass when all that was asked for has been seen."""


def _layout(model: nn.Module) -> Layout:
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return layout_of(model_type, type(model).__name__)


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of a causal language model between token ids and lm head."""
    path = _layout(model).decoder
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise UserError(
            f"{type(model).__name__}: expected a causal language model with its decoder at {path}. "
            "Load it with AutoModelForCausalLM."
        ) from None


def _blocks(model: nn.Module) -> Any:
    return getattr(decoder_of(model), _layout(model).blocks)


def check_model(model: nn.Module, hook_points: Iterable[str]) -> None:
    """Check that a model has some hook points.

    Raises:
        UserError: unknown layout, bad name or a block that the model lacks.
    """
    config: Any = getattr(model, "config", None)
    _layout(model)
    check_shape(Shape(config.model_type, len(_blocks(model))), hook_points, type(model).__name__)


def _attach(model: nn.Module, point: HookPoint, visit: Visit) -> Any:
    """Register `visit` at a hook point; the handle's `remove` takes it away."""
    layout, block = _layout(model), _blocks(model)[point.block]

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

    if point.place == "resid_pre":
        return block.register_forward_pre_hook(visit_input, with_kwargs=True)
    path = {"attn_out": layout.attention, "mlp_out": layout.mlp, "resid_post": ""}[point.place]
    return block.get_submodule(path).register_forward_hook(visit_output)


@torch.no_grad()
def capture(model: nn.Module, hook_points: Iterable[str], token_ids: Tensor) -> dict[str, Tensor]:
    """Activations at some hook points; no block after the last of them runs, nor does the lm head.

    Args:
        model: a causal language model of a known layout, in evaluation mode.
        hook_points: names such as `blocks.8.resid_post`.
        token_ids: (batch, position) integers; each position sees those before it.

    Returns:
        By name, in the order asked for: (batch, position, d_in) in the model's dtype and device.

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
        decoder_of(model)(input_ids=token_ids, use_cache=False)
    return {name: found[name] for name in names}


@contextmanager
def splice(
    model: nn.Module, hook_point: str, replace: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """While the context is open, `replace`(activation) takes the activation's place at a hook point.

    Args:
        model: a causal language model of a known layout.
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
def hook(model: nn.Module, hook_point: str, sae: nn.Module) -> Iterator[None]:
    """While the context is open, the model runs on `sae`'s reconstructions at a hook point.

    Gradients flow through. The SAE sees every position, also those that its training left out.

    Args:
        model: a causal language model of a known layout.
        hook_point: a name such as `blocks.8.resid_post`.
        sae: takes and returns raw activations (n, d_in), in its own dtype and on its own device.
    """

    def replace(x: Tensor) -> Tensor:
        own = next(sae.parameters(), x)
        d_in = getattr(sae, "d_in", x.shape[-1])
        if x.shape[-1] != d_in:
            raise UserError(
                f"{hook_point}: activations have width {x.shape[-1]}, but the SAE expects {d_in}. "
                "Use an SAE that was trained on this model and hook point."
            )
        rows = x.reshape(-1, x.shape[-1]).to(device=own.device, dtype=own.dtype)
        reconstructed: Tensor = sae(rows)
        return reconstructed.reshape(x.shape).to(device=x.device, dtype=x.dtype)

    with splice(model, hook_point, replace):
        yield


@torch.no_grad()
def run_from(
    model: nn.Module,
    hook_point: str,
    block_input: Tensor,
    token_ids: Tensor,
    replace: Callable[[Tensor], Tensor],
) -> Tensor:
    """Run a model from a hook point's block on, with the activation at the hook point replaced.

    Args:
        model: a causal language model of a known layout, in evaluation mode.
        hook_point: a name such as `blocks.8.mlp_out`.
        block_input: (batch, position, d_model), what `capture` gives at `HookPoint.block_input`.
        token_ids: (batch, position) the ids that `block_input` came from; they set shape and masks.
        replace: (batch, position, d_in) to the same shape.

    Returns:
        (batch, position, d_model) hidden states after the final norm, as the lm head takes them.
    """
    check_model(model, [hook_point])
    point = HookPoint.parse(hook_point)
    with ExitStack() as hooks:
        hooks.enter_context(_passed_over(_blocks(model)[: point.block]))
        hooks.callback(_attach(model, point.block_input, lambda _: block_input).remove)
        hooks.callback(_attach(model, point, replace).remove)
        hidden: Tensor = decoder_of(model)(input_ids=token_ids, use_cache=False).last_hidden_state
        return hidden


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
