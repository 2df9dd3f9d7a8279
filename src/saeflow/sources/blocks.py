"""Parts that a block adds to the residual stream, and the places where they are read: one block of a trace.

A block's output is followed back through sums to its input. The terms are what its parts add (TransformerLens's attn_out
and mlp_out), whatever the parts are called and however they are nested.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from saeflow.sources.layouts import PLACES, VISION
from saeflow.sources.trace import Call, Node, Trace

BATCH, LENGTH = 2, 6
"""Sizes of the trace: no family has heads, experts or widths that these would be taken for."""


@dataclass(frozen=True)
class Place:
    """Place of a model at which an activation is read or replaced."""

    path: str
    side: str  # "input" or "output"
    key: int | str | None = (
        None  # argument's position or name; place in a tuple; None for a lone tensor
    )
    scale: float = 1.0  # the block adds this multiple of it
    changed: bool = False  # the model overwrites the tensor later
    flat: bool = False  # (batch x position, d_in)
    adds: bool = False  # the activation is the block's input and this
    weight: str = ""  # of `adds`: path of the weight that multiplies the block's input
    stream: "Place | None" = None  # the block's input, where shape or value of it are needed


@dataclass
class Block:
    """A block's places by name, and why others are missing."""

    path: str
    places: dict[str, Place] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    kind: str = ""
    """sequential, parallel, or what adds instead of attention and MLP alone."""
    sum_of: "Expression | None" = None
    """The output as a sum; None where it is none."""
    length: int = 0
    """Length of the tuple that it returns; 0 for a lone tensor."""


@dataclass(frozen=True)
class Expression:
    """A residual stream in terms of places: `scale` times a place, a norm or a weight times a sum, or a sum."""

    scale: float
    place: Place | None = None  # None for the block's input
    norm: str = ""
    weight: str = ""  # path of a parameter or buffer
    terms: "tuple[Expression, ...]" = ()


def input_of(call: Call) -> Node:
    found = stream_of(call)
    assert found is not None
    return found[1]


def stream_of(call: Call, tower: str = VISION) -> "tuple[int | str, Node, int | str | None] | None":
    """The residual stream of a block: its first input (batch, position, width) that an output has the shape of.

    In an image tower that takes images of any size it is (batch x position, width).
    """
    for n_axes in (3, 2) if tower else (3,):
        for key, node in call.inputs.items():
            shape = node.shape
            by_context = len(shape) == 3 and shape[0] == BATCH and (tower or shape[1] == LENGTH)
            if len(shape) != n_axes or not (by_context or (n_axes == 2 and shape[0] % BATCH == 0)):
                continue
            for place, out in call.outputs.items():
                if out.shape == shape:
                    return key, node, place
    return None


def output_of(call: Call) -> Node:
    found = stream_of(call)
    assert found is not None
    return call.outputs[found[2]]


def has_matrix(module: nn.Module) -> bool:
    return any(p.ndim >= 2 for p in module.parameters())


class _Terms:
    """The sum that a block's output is."""

    def __init__(self, trace: Trace, run: Call) -> None:
        self.run = run
        stream = stream_of(run)
        assert stream is not None
        self.key, start, self.place = stream
        self.start, self.end = start.origin, run.outputs[self.place].origin
        inside = run.path + "."
        self.calls = [call for call in trace.calls if call.path.startswith(inside) and run.started < call.started and call.ended < run.ended]  # fmt: skip
        self.given: dict[Node, tuple[Call, Any]] = {}
        self.normed: dict[Node, Call] = {}
        order = sorted(self.calls, key=lambda call: (call.path.count("."), call.ended))
        for call in order:
            for key, node in call.outputs.items():
                self.given.setdefault(node.origin, (call, key))
                if not has_matrix(call.module):
                    self.normed.setdefault(node.origin, call)
        self.trunk: list[tuple[Node, Expression]] = []
        self._seen: dict[Node, tuple[Expression, bool] | None] = {}
        self.leaves: dict[Place, Node] = {}
        found = self.walk(self.end)
        self.sum = found[0] if found and found[1] else None

    def walk(self, node: Node) -> tuple[Expression, bool] | None:
        """A node as a sum of places and whether the block's input is in it; None if it cannot be told."""
        node = node.origin
        if node not in self._seen:
            self._seen[node] = None
            self._seen[node] = found = self._walk(node)
            if found and found[1]:
                self.trunk.append((node, found[0]))
        return self._seen[node]

    def _walk(self, node: Node) -> tuple[Expression, bool] | None:
        if node is self.start:
            return Expression(1.0), True
        inputs = node.inputs
        if not _is_inside(node, self.run.path):
            return None
        if node.operator in ("add", "sub") and len(inputs) == 2:
            parts = [self.walk(one) for one in inputs]
            has_stream = any(part and part[1] for part in parts)
            if has_stream or (node not in self.given and all(parts)):
                if not all(parts):
                    return None
                second = parts[1][0]  # type: ignore[index]
                terms = (parts[0][0], _scaled(second, node.factor or 1.0))  # type: ignore[index]
                return Expression(1.0, terms=terms), has_stream
        if node.operator in ("mul", "div") and node.factor is not None and len(inputs) == 1:
            part = self.walk(inputs[0])
            if part and (part[1] or node not in self.given):
                return _scaled(part[0], node.factor), part[1]
        if node.operator == "mul" and len(inputs) == 2:
            for one, other in (inputs, inputs[::-1]):
                part = self.walk(one) if other.origin.weight else None
                if part and part[1]:
                    return Expression(1.0, weight=other.origin.weight, terms=(part[0],)), True
        norm = self.normed.get(node)
        if norm is not None and norm.first_input:
            part = self.walk(norm.first_input[1])
            if part and part[1]:
                return Expression(1.0, norm=norm.path, terms=(part[0],)), True
        if node not in self.given:
            return None
        call, key = self.given[node]
        place = self.place_of(call, "output", key, call.outputs[key])
        self.leaves[place] = node
        return Expression(1.0, place), False

    def place_of(self, call: Call, side: str, key: int | str | None, node: Node) -> Place:
        """The place of a tensor that a call takes or gives."""
        flat = len(node.shape) == 2 and node.shape[0] == BATCH * LENGTH
        stream = Place(self.run.path, "input", self.key) if flat else None
        return Place(call.path, side, key, changed=node.changed, flat=flat, stream=stream)

    def branch(self, node: Node) -> "Branch":
        """The way from the residual stream to a term."""
        stream = {trunk for trunk, _ in self.trunk}
        reached: set[Node] = set()
        waiting = [node]
        while waiting:
            one = waiting.pop().origin
            if one not in reached:
                reached.add(one)
                waiting += [] if one in stream else one.inputs
        inside = [
            call
            for call in self.calls
            if has_matrix(call.module)
            and any(_is_inside(one, call.path) for one in reached - stream)
            and not any(_is_inside(one, call.path) for one in stream)
        ]
        found = [c for c in inside if not any(c.path.startswith(f"{o.path}.") for o in inside)]
        own = {one for one in reached - stream if _is_inside(one, self.run.path)}
        return Branch(sorted(found, key=lambda call: call.started), reached & stream, own)


@dataclass(frozen=True)
class Branch:
    """The way from the residual stream to what a part of a block adds to it."""

    calls: list[Call]
    """The outermost calls of parts with matrices that hold none of the residual stream's sums, in their order."""
    taken: set[Node]
    """Nodes at which it leaves the residual stream."""
    nodes: set[Node]
    """Nodes of the block on it."""


def _is_inside(node: Node, path: str) -> bool:
    return node.module == path or node.module.startswith(path + ".")


def _scaled(one: Expression, factor: float) -> Expression:
    if factor == 1:
        return one
    return replace(one, scale=one.scale * factor)


def leaves(one: Expression, factor: float = 1.0) -> Iterator[Expression]:
    """The terms of a sum, each with its whole factor; norms and weights are passed through."""
    factor *= one.scale
    if not one.terms:
        yield Expression(factor, one.place)
    for term in one.terms:
        yield from leaves(term, 1.0 if one.norm or one.weight else factor)


def block_of(trace: Trace, run: Call) -> Block:
    terms = _Terms(trace, run)
    block = Block(run.path, length=run.length)
    block.places["resid_pre"] = Place(run.path, "input", terms.key)
    block.places["resid_post"] = Place(run.path, "output", terms.place)
    block.sum_of = terms.sum
    if terms.sum is None:
        why = "its output is no sum of its input and of what parts give"
        for place in PLACES:
            if place not in block.places:
                block.missing[place] = why
        block.kind = "other"
        return block
    found: dict[str, list[tuple[Expression, Branch]]] = {
        "attn": [], "mlp": [], "mixer": [], "other": [],
    }  # fmt: skip
    for term in leaves(terms.sum):
        if term.place is None:
            continue
        branch = terms.branch(terms.leaves[term.place])
        found[_role(trace, branch, run.path)].append((term, branch))
    plain = [one for one in found["attn"] if not _is_named_mlp(one[1].calls, run.path)]
    if len(plain) == 1:  # Inkling 2 has an attention over blocks before its MLP
        found["other"] = [one for one in found["attn"] if one not in plain]
        found["attn"] = plain
    named = [one for one in found["mlp"] if _is_named_mlp(one[1].calls, run.path)]
    if len(named) == 1:
        found["other"] += [one for one in found["mlp"] if one not in named]
        found["mlp"] = named
    for role in ("attn", "mlp"):
        others = [
            b.calls[-1].path.removeprefix(run.path + ".")
            for r in found
            for _, b in found[r]
            if b.calls and r != role
        ]
        if len(found[role]) == 1:
            term, branch = found[role][0]
            assert term.place is not None
            block.places[f"{role}_out"] = replace(term.place, scale=term.scale)
            taken = branch.calls[0].first_input if branch.calls else None
            if taken is not None:
                block.places[f"{role}_in"] = terms.place_of(branch.calls[0], "input", *taken)
        else:
            word = {"attn": "attention", "mlp": "MLP"}[role]
            count = len(found[role])
            why = (
                f"the block has no {word}; it adds what {', '.join(others) or 'no part'} gives"
                if not count
                else f"{count} parts of the block are {word}s: "
                + ", ".join(
                    t.place.path.removeprefix(run.path + ".") for t, _ in found[role] if t.place
                )
            )
            block.missing[f"{role}_in"] = block.missing[f"{role}_out"] = why
    _middle(terms, block, found)
    names = [role for role in found for _ in found[role]]
    block.kind = (
        ("sequential" if "resid_mid" in block.places else "parallel")
        if sorted(names) == ["attn", "mlp"]
        else " + ".join(names) or "nothing"
    )
    return block


def _middle(
    terms: _Terms, block: Block, found: Mapping[str, list[tuple[Expression, Branch]]]
) -> None:
    """The residual stream between what mixes positions and the MLP."""
    block.missing["resid_mid"] = "attention and MLP are not one after the other"
    if len(found["mlp"]) != 1 or not (found["attn"] or found["mixer"]):
        return
    _, branch = found["mlp"][0]
    wanted = {t.place for role in ("attn", "mixer") for t, _ in found[role] if t.place is not None}
    for node, one in terms.trunk:
        inside = {t.place for t in leaves(one) if t.place is not None}
        if {_plain(p) for p in inside} != {_plain(p) for p in wanted} or node not in branch.taken:
            continue
        if node in terms.given:
            call, key = terms.given[node]
            block.places["resid_mid"] = terms.place_of(call, "output", key, call.outputs[key])
        elif (
            len(wanted) == 1
            and len(list(leaves(one))) == 2
            and (found_weight := _of_start(one)) is not None
        ):
            term = next(t for t in leaves(one) if t.place is not None)
            assert term.place is not None
            stream = block.places["resid_pre"]
            block.places["resid_mid"] = replace(
                term.place, scale=term.scale, adds=True, stream=stream, weight=found_weight
            )
    if "resid_mid" in block.places:
        del block.missing["resid_mid"]


def _of_start(one: Expression) -> str | None:
    """The weight of the block's input in its sum with one part, "" where it is 1; None where another is meant."""
    starts = [t for t in one.terms if all(leaf.place is None for leaf in leaves(t))]
    if one.scale != 1 or one.norm or one.weight or len(starts) != 1:
        return None
    (start,) = starts
    inner = start.terms[0] if start.weight and not start.norm else start
    return start.weight if not inner.terms and start.scale == inner.scale == 1 else None


def _plain(place: Place) -> tuple[str, Any]:
    return place.path, place.key


_ATTENTION = re.compile(r"att(entio)?n", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|moe|expert", re.IGNORECASE)
_MLP_CLASS = re.compile(
    r"(MLP|FFN|FeedForward|MoE|Experts)$"
)  # after the family's name, which may be JetMoe
_MIXES = (
    "convolution",
    "conv1d",
    "cumsum",
    "constant_pad_nd",
    "tril",
    "triu",
    "masked_fill",
    "cumprod",
)


def _role(trace: Trace, branch: Branch, block: str) -> str:
    """attn, mlp, or mixer for what mixes positions otherwise (state spaces, convolutions)."""
    calls = branch.calls
    own = branch.nodes | {
        node for node in trace.nodes if any(_is_inside(node, call.path) for call in calls)
    }
    if any(
        "scaled_dot_product" in node.operator
        or (
            node.operator == "_softmax"
            and node.shape[-2:-1] == (LENGTH,)
            and node.shape[-1] in (LENGTH, LENGTH + 1)
        )
        for node in own
    ):
        return "attn"
    names = [call.path.removeprefix(block) + " " + type(call.module).__name__ for call in calls]
    if any(_ATTENTION.search(name) for name in names):
        return "attn"
    if _is_named_mlp(calls, block):
        return "mlp"
    return "mixer" if any(_mixes(node) for node in own) else "mlp"


def _is_named_mlp(calls: list[Call], block: str) -> bool:
    """Tell whether a part's path or class says that it is an MLP; it may hold a convolution too (Inkling, RWKV)."""
    return any(
        _MLP.search(call.path.removeprefix(block)) or _MLP_CLASS.search(type(call.module).__name__)
        for call in calls
    )


def _mixes(node: Node) -> bool:
    """Tell whether an operator mixes positions; a mask does if it is square, those of routers are positions x experts.

    A recurrence that goes step by step puts its steps together at the end.
    """
    if node.operator in ("cat", "stack") and len(node.inputs) == LENGTH:
        return True
    is_square = len(node.shape) > 1 and node.shape[-1] == node.shape[-2]
    return node.operator in _MIXES and (node.operator != "masked_fill" or is_square)
