"""Functions put at a place of a model, to read or replace what is there."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from torch import Tensor, nn

from saeflow.errors import UserError
from saeflow.sources.blocks import Place

Visit = Callable[[Tensor], Tensor | None]
"""Sees the activation (batch, position, d_in), an image's embedding (batch, d_in); returns what takes its place, or None to keep it."""


def attach(
    model: nn.Module, place: Place, visit: Visit, point: str, *, first: bool = False
) -> ExitStack:
    """Register `visit` at a place; closing the result takes it away.

    Args:
        point: the place's name, for messages.
        first: before other hooks of the same module, which then see what takes the activation's place.
    """
    handles = ExitStack()
    before: dict[str, Tensor] = {}

    def see(found: Any, others: Sequence[Any] = ()) -> Tensor | None:
        if not isinstance(found, Tensor):
            tensors = [f"output.{i}" for i, one in enumerate(others) if isinstance(one, Tensor)]
            raise UserError(
                f"{type(model).__name__}: {point}: expected a tensor, found {type(found).__name__}. "
                + (f"Name {' or '.join(tensors)}." if tensors else "Name another module.")
            )
        x = found.reshape((*before["stream"].shape[:-1], -1)) if place.flat else found
        x = x if place.scale == 1 else x * place.scale
        # A model spread over several devices gives a block its input on the device of the one before.
        base = before["stream"].to(x.device) if place.adds else None
        if base is not None and place.weight:
            base = base * weight_at(model, place.weight).to(base.device)
        new = visit(x if base is None else base + x)
        if new is None:
            return None
        new = new if base is None else new.to(base.device) - base
        return (new if place.scale == 1 else new / place.scale).reshape(found.shape)

    def visit_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = place.key
        if key is None:
            key = (
                0
                if args
                else next((name for name, x in kwargs.items() if isinstance(x, Tensor)), 0)
            )
        if isinstance(key, str):
            new = see(kwargs.get(key))
            return None if new is None else (args, kwargs | {key: new})
        new = see(args[key] if key < len(args) else None)
        return None if new is None else ((*args[:key], new, *args[key + 1 :]), kwargs)

    def visit_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple | list):
            key = place.key if isinstance(place.key, int) else 0
            if key >= len(output):
                raise UserError(
                    f"{type(model).__name__}: {point}: the module gives {len(output)} values (0..{len(output) - 1}), "
                    f"found output.{key}. Choose one below {len(output)}."
                )
            new = see(output[key], output)
            return None if new is None else type(output)((*output[:key], new, *output[key + 1 :]))
        if isinstance(output, dict):  # an output of transformers
            names, key = list(output), place.key if isinstance(place.key, int) else 0
            if key >= len(names):
                raise UserError(
                    f"{type(model).__name__}: {point}: the module gives {len(names)} values ({', '.join(names)}), found "
                    f"output.{key}. Choose one below {len(names)}."
                )
            name = names[key]
            new = see(output[name], list(output.values()))
            if new is not None:
                output[name] = new
            return None
        return see(output)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert place.stream is not None
        key = place.stream.key
        before["stream"] = kwargs[key] if isinstance(key, str) else args[cast(int, key)]

    module = model.get_submodule(place.path)
    if place.stream is not None:
        block = model.get_submodule(place.stream.path)
        handles.callback(block.register_forward_pre_hook(note, with_kwargs=True).remove)
    if place.side == "input":
        handle = module.register_forward_pre_hook(visit_input, prepend=first, with_kwargs=True)
        handles.callback(handle.remove)
    else:
        handles.callback(module.register_forward_hook(visit_output).remove)
    return handles


def weight_at(model: nn.Module, path: str) -> Tensor:
    """A parameter or buffer of a model."""
    where, _, name = path.rpartition(".")
    found: Tensor = getattr(model.get_submodule(where), name)
    return found


@contextmanager
def forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While the context is open, `forward` takes the place of a module's own."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
