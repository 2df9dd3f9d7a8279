"""Schedules: how an option reaches its value over the steps of a run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar, overload

from saeflow.config.explain import explained, validator
from saeflow.config.options import Form
from saeflow.errors import UserError

_UNTIL = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
_FROM = {"type": "number", "minimum": 0}
_FORM = {
    "type": "object",
    "oneOf": [
        {
            "additionalProperties": False,
            "required": ["kind"],
            "properties": {"kind": {"const": "constant"}},
        },
        {
            "additionalProperties": False,
            "required": ["kind", "from", "until"],
            "properties": {
                "kind": {"enum": ["linear", "cosine", "exponential"]},
                "from": _FROM,
                "until": _UNTIL,
            },
        },
        {
            "additionalProperties": False,
            "required": ["kind", "from", "until", "steps"],
            "properties": {
                "kind": {"const": "step"},
                "from": _FROM,
                "until": _UNTIL,
                "steps": {"type": "integer", "minimum": 1},
            },
        },
    ],
}
ScheduleForm = Annotated[Mapping[str, Any], Form(_FORM)]
"""Parameters of a schedule: its kind, the value it starts `from`, the share of the steps `until` which it moves."""

Number = TypeVar("Number")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """From `start` to `target` over the first `until` share of the steps; then `target`.

    `linear` and `exponential` move by equal differences and ratios, `cosine` along half a period,
    `step` in `steps` equal jumps; `constant` is at the target from the first step.
    """

    target: float
    kind: str = "constant"
    start: float = 0.0
    until: float = 1.0
    steps: int = 1

    def __call__(self, step: int, total: int) -> float:
        """The value at a step counted from 0, of `total` steps."""
        length = self.until * total
        if self.kind == "constant" or step >= length:
            return self.target
        share = step / length
        match self.kind:
            case "cosine":
                share = (1 - math.cos(math.pi * share)) / 2
            case "step":
                share = math.floor(share * self.steps) / self.steps
            case "exponential":
                result: float = self.start * (self.target / self.start) ** share
                return result
        return self.start + (self.target - self.start) * share


class Moving(Generic[Number]):
    """An attribute of an SAE that a schedule moves: the host's number, and copies that a GPU's kernels read, one of each type.

    A copy stays where it is, so that a step that was recorded once serves while the number moves.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, sae: None, owner: type) -> "Moving[Number]": ...

    @overload
    def __get__(self, sae: Any, owner: type) -> Number: ...

    def __get__(self, sae: Any, owner: type) -> "Moving[Number] | Number":
        if sae is None:
            return self
        number: Number = sae.numbers[self.name]
        return number

    def __set__(self, sae: Any, number: Number) -> None:
        if self.name in sae.numbers and sae.numbers[self.name] == number:
            return
        sae.numbers[self.name] = number
        for (name, _), copy in sae.copies.items():
            if name == self.name:
                copy.fill_(number)


def make_schedule(
    name: str, target: float, params: Mapping[str, Any], low: float, high: float
) -> Schedule:
    """A schedule from its parameters, with its start and target within low..high.

    Raises:
        UserError: an unknown kind or key, or a value out of range.
    """
    where = f"{name}_schedule"
    form = {"properties": {where: _FORM}}
    if problems := explained(validator(form).iter_errors({where: dict(params)})):
        raise UserError(*problems)
    start = params.get("from", target)
    for what, value in (("from", start), (name, target)):
        if not low <= value <= high:
            raise UserError(f"{where}: expected {what} in {low:g}..{high:g}, found {value!r}.")
    if params["kind"] == "exponential" and (start <= 0 or target <= 0):
        raise UserError(f"{where}: an exponential schedule needs values above 0.")
    moves = {name: params[name] for name in ("until", "steps") if name in params}
    return Schedule(target=target, kind=params["kind"], start=start, **moves)
