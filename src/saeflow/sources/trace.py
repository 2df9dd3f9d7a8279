"""A record of what a model's modules take, give and add; made of a model without weights.

The operators that run are recorded as a graph of tensors, so that a module's output can be followed to the sum
that it ends in. Values play no part: fake tensors (shapes alone) are enough.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_ALIASES = (
    "view", "_unsafe_view", "reshape", "_to_copy", "clone", "detach", "alias", "squeeze", "unsqueeze",
    "_reshape_alias", "lift_fresh",
)  # fmt: skip
"""Operators that give the values of their first input."""


@dataclass(eq=False)
class Node:
    """A tensor at the time when an operator gave it."""

    operator: str  # without namespace and overload, "" for what no operator gave
    inputs: "list[Node]" = field(default_factory=list)
    factor: float | None = None  # of a product with a number, or of the second term of a sum
    module: str = ""  # path of the innermost module that ran
    shape: tuple[int, ...] = ()
    changed: bool = False  # the tensor was overwritten later
    weight: str = ""  # path, if it is a parameter or buffer of the model

    @property
    def origin(self) -> "Node":
        """The node that these values come from, behind views and copies."""
        node = self
        while node.operator in _ALIASES and node.inputs:
            node = node.inputs[0]
        return node


@dataclass(eq=False)
class Call:
    """One run of a module."""

    path: str
    module: nn.Module
    inputs: dict[int | str, Node] = field(default_factory=dict)
    """Floating tensors among the arguments, by position or name."""
    outputs: dict[int | str | None, Node] = field(default_factory=dict)
    """Floating tensors of the result, by place in a tuple; None for a lone tensor."""
    length: int = 0
    """Length of the result, if it is a tuple."""
    started: int = 0
    ended: int = 0

    @property
    def first_input(self) -> tuple[int | str, Node] | None:
        """The first floating tensor that it takes."""
        return next(iter(self.inputs.items()), None)


class Trace(TorchDispatchMode):
    """Operators and calls of modules while it is open."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        """In the order in which they ended."""
        self.nodes: list[Node] = []
        self.result: Node | None = None
        """Output of the whole run, where whoever runs it says so."""
        self._found: dict[int, Node] = {}
        self._alive: list[Tensor] = []  # so that no two tensors share an id
        self._paths: list[str] = []
        self._time = 0

    def node(self, x: Tensor) -> Node:
        """The node of a tensor as it is now."""
        found = self._found.get(id(x))
        if found is None:
            found = Node("", shape=tuple(x.shape))
            self._keep(x, found)
        return found

    def _keep(self, x: Tensor, node: Node) -> None:
        self._alive.append(x)
        self._found[id(x)] = node

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = list(_tensors((args, kwargs or {})))
        inputs = [self.node(x) for x in given]
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        changes = name.endswith("_") and not name.endswith("__")
        module = self._paths[-1] if self._paths else ""
        if changes and inputs:
            inputs[0].changed = True
        for x in _tensors(result):
            if not changes and any(x is one for one in given):
                continue
            node = Node(name.rstrip("_") if changes else name, inputs, _factor(name, args, kwargs), module, tuple(x.shape))  # fmt: skip
            self.nodes.append(node)
            self._keep(x, node)
            if changes and given and given[0] is not x:
                self._keep(given[0], node)
        return result

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """While the context is open, the model's modules tell when they run."""
        open_calls: list[Call] = []
        for path, weight in chain(model.named_parameters(), model.named_buffers()):
            self.node(weight).weight = path

        def before(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            self._paths.append(path)
            self._time += 1
            call = Call(path, module, started=self._time)
            for key, value in [*enumerate(args), *kwargs.items()]:
                if isinstance(value, Tensor) and value.is_floating_point():
                    call.inputs[key] = self.node(value)
            open_calls.append(call)

        def after(module: nn.Module, args: Any, result: Any) -> None:
            self._paths.pop()
            call = open_calls.pop()
            self._time += 1
            call.ended = self._time
            values: dict[Any, Any] = {None: result}
            if isinstance(result, tuple | list):
                values, call.length = dict(enumerate(result)), len(result)
            elif isinstance(result, Mapping):
                values, call.length = dict(enumerate(result.values())), len(result)
            for key, value in values.items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    call.outputs[key] = self.node(value)
            self.calls.append(call)

        with ExitStack() as handles:
            for path, module in model.named_modules():
                hook = module.register_forward_pre_hook(
                    lambda module, args, kwargs, path=path: before(path, module, args, kwargs),
                    with_kwargs=True,
                )
                handles.callback(hook.remove)
                handles.callback(module.register_forward_hook(after).remove)
            yield


def _factor(name: str, args: Any, kwargs: Any) -> float | None:
    """The number that a product or the second term of a sum is multiplied by."""
    numbers = [x for x in args if isinstance(x, int | float) and not isinstance(x, bool)]
    if name.startswith(("mul", "div")) and numbers:
        return float(numbers[0]) if name.startswith("mul") else 1 / float(numbers[0])
    if name.startswith(("add", "sub")):
        alpha = float((kwargs or {}).get("alpha", 1))
        return alpha if name.startswith("add") else -alpha
    return None


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
