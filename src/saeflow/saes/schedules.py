"""Schedules: how an option reaches its value over the steps of a run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from saeflow.config.options import Form
from saeflow.errors import UserError

_UNTIL = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
ScheduleForm = Annotated[
    Mapping[str, Any],
    Form(
        {
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
                        "from": {"type": "number", "minimum": 0},
                        "until": _UNTIL,
                    },
                },
                {
                    "additionalProperties": False,
                    "required": ["kind", "from", "until", "steps"],
                    "properties": {
                        "kind": {"const": "step"},
                        "from": {"type": "number", "minimum": 0},
                        "until": _UNTIL,
                        "steps": {"type": "integer", "minimum": 1},
                    },
                },
            ],
        }
    ),
]
"""How an option gets to its own value: `kind`, the value it starts `from`, and the share of the steps `until` which."""

KINDS = ("constant", "linear", "cosine", "exponential", "step")


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
                return self.start * (self.target / self.start) ** share
        return self.start + (self.target - self.start) * share


def make_schedule(
    name: str, target: float, params: Mapping[str, Any], low: float, high: float
) -> Schedule:
    """A schedule from its parameters, with its start and target within low..high.

    Raises:
        UserError: an unknown kind or key, or a value out of range.
    """
    values = dict(params)
    kind = values.pop("kind", None)
    fields = {"constant": set(), "step": {"from", "until", "steps"}}.get(kind, {"from", "until"})
    if kind not in KINDS or set(values) != fields:
        raise UserError(
            f"{name}_schedule: expected kind (one of {', '.join(KINDS)}) with its keys, found "
            f"{dict(params)}."
        )
    start, until, steps = (
        values.get("from", target),
        values.get("until", 1.0),
        values.get("steps", 1),
    )
    for what, value, least, most in (
        ("from", start, low, high), (name, target, low, high), ("until", until, 0, 1)
    ):  # fmt: skip
        if not _is_number(value) or not least <= value <= most:
            raise UserError(
                f"{name}_schedule: expected {what} in {least:g}..{most:g}, found {value!r}."
            )
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise UserError(f"{name}_schedule: expected steps to be a whole number, found {steps!r}.")
    if kind == "exponential" and (start <= 0 or target <= 0):
        raise UserError(f"{name}_schedule: an exponential schedule needs values above 0.")
    return Schedule(target=target, kind=kind, start=start, until=until, steps=steps)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
