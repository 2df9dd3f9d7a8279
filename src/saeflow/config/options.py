"""State the options of an SAE variant, each once: meaning, type, unit, bounds and default.

A variant's own file holds one dataclass of them. The schema of `saes.ENTRY.options`, the checks and their messages,
the defaults, `saeflow parameters` and docs/parameters.md follow from it. This module imports no model code.
"""

import copy
import dataclasses
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from saeflow.config.explain import explained, validator
from saeflow.errors import UserError

COUNT_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Form:
    """The JSON schema of the values of an `Annotated` type."""

    schema: Mapping[str, Any]


FoundK = Annotated[
    int,
    Form(
        {
            "anyOf": [
                {"type": "integer", "maximum": COUNT_MAX},
                {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["mean_l0_of"],
                    "properties": {"mean_l0_of": {"type": "string", "pattern": "^[^/]+/[^/]+$"}},
                },
            ]
        }
    ),
]
"""A number of latents. A parameter file may also say {mean_l0_of: ENTRY/LABEL}; training replaces it by the number."""

_TYPES = {
    bool: "boolean", int: "integer", float: "number", str: "string", types.NoneType: "null",
}  # fmt: skip


@dataclass(frozen=True)
class Stated:
    """All that is stated of an option besides its type and default; see `option`."""

    meaning: str
    unit: str
    bounds: Mapping[str, float]  # by JSON schema's name
    counts_latents: bool


def option(
    meaning: str,
    *,
    default: Any = MISSING,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    counts_latents: bool = False,
) -> Any:
    """State an option, as a field of a `VariantOptions`.

    Args:
        meaning: one sentence or more.
        default: the value where an entry of `saes` states none; without a default every entry must state one.
        unit: of the option's numbers.
        low, high, above: bounds of the option's numbers, which may equal `low` and `high` but not `above`.
        counts_latents: its numbers, or those that its schedule starts from, lie in 1..d_sae.
    """
    bounds = {"minimum": low, "maximum": high, "exclusiveMinimum": above}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    metadata = {"stated": Stated(meaning, unit, given, counts_latents)}
    if default is MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class VariantOptions:
    """Base of every variant's options. The type of a field says which values it takes.

    A field is of int, float, bool, str, None, a `Literal`, unions of these, or `Annotated` with a `Form`.
    """

    orthogonality_weight: float = option(
        "Weight of OrtSAE's penalty (arXiv:2509.22033) on similar decoder directions: the mean over latents of the square of "
        "the largest cosine, where above 0, with another latent of the same chunk; 0 for none.",
        default=0.0,
        low=0,
        high=1e30,
    )
    orthogonality_chunk: int = option(
        "Latents of a chunk of that penalty; chunks are drawn anew in every step.",
        default=8192,
        unit="latents",
        low=2,
        high=COUNT_MAX,
    )
    aligned: bool = option(
        "true: the inner product of each latent's encoder and decoder direction is held at 1 (aligned training, "
        "arXiv:2605.18629).",
        default=False,
    )

    @classmethod
    def read(cls, values: Mapping[str, Any], d_sae: int) -> Self:
        """Options of an SAE of d_sae latents from plain values, defaults for those that are not stated.

        Raises:
            UserError: an unknown or missing option, a value out of bounds, or values that do not fit each other.
        """
        names = [field.name for field in fields_of(cls)]
        whole = {**defaults(cls), **values} if isinstance(values, Mapping) else {}
        if set(whole) != set(names):
            found = ", ".join(map(str, values)) if isinstance(values, Mapping) else repr(values)
            raise UserError(f"expected the options {', '.join(names)}, found {found or 'none'}.")
        if problems := explained(validator(options_schema(cls)).iter_errors(whole)):
            raise UserError(*problems)
        made = cls.of(whole)
        if problems := list(made.problems(d_sae)):
            raise UserError(*problems)
        return made

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Options from plain values of every option, each within its bounds; whole numbers become floats."""
        return cls(**_as_typed(cls, values))

    def problems(self, d_sae: int) -> Iterator[str]:
        """Say of each value within its bounds what does not fit the number of latents or another value."""
        for name in counts_of_latents(type(self)):
            for where, count in numbers_of(name, getattr(self, name)):
                if not 1 <= count <= d_sae:
                    yield f"{where}: expected 1..{d_sae} (d_sae), found {count}."

    def misfits(self, source: Mapping[str, Any], input_scale: str) -> Iterator[str]:
        """Say what does not fit the source or the input scale of the entry; a line begins with a key of the entry."""
        yield from ()


@dataclass(frozen=True, kw_only=True)
class AuxKOptions(VariantOptions):
    """Options of variants with the AuxK loss."""

    auxk_weight: float = option(
        "Weight of the AuxK loss (Gao et al. 2024, appendix A.2).",
        default=0.03125,
        low=0,
        high=1e30,
    )
    auxk_latents: Literal["dead", "underused"] = option(
        "Latents that AuxK trains. dead: those silent for dead_after_tokens; underused: also those that fired in the last 100 "
        "steps less than half as often as Zipf's law, fitted to all of them, expects of their rank (aux_zipf, "
        "arXiv:2411.02124).",
        default="dead",
    )


def fields_of(options: type[VariantOptions]) -> list["dataclasses.Field[Any]"]:
    """Fields of a variant's options: its own, then those of every variant."""
    common = dataclasses.fields(VariantOptions)
    own = [field for field in dataclasses.fields(options) if field not in common]
    return [*own, *common]


def stated(field: "dataclasses.Field[Any]") -> Stated:
    """All that is stated of an option."""
    found = field.metadata["stated"]
    assert isinstance(found, Stated)
    return found


def defaults(options: type[VariantOptions]) -> dict[str, Any]:
    """The default of every option that has one."""
    return {
        field.name: field.default_factory()
        for field in fields_of(options)
        if field.default_factory is not MISSING
    }


def counts_of_latents(options: type[VariantOptions]) -> list[str]:
    """Names of the options that count latents, and of their schedules."""
    return [field.name for field in fields_of(options) if stated(field).counts_latents]


def numbers_of(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers that an option names, each with its place: itself, or the start of its schedule."""
    if isinstance(value, Mapping):
        if "from" in value:
            yield f"{name}.from", value["from"]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def options_schema(options: type[VariantOptions], *, is_swept: bool = False) -> dict[str, Any]:
    """The JSON schema of a variant's options.

    Args:
        is_swept: each may also be a list of values, as in a parameter file.
    """
    properties = {}
    for field in fields_of(options):
        about = stated(field)
        one = _schema_of(field.type, about.bounds)
        if is_swept:
            one = {"anyOf": [one, {"type": "array", "minItems": 1, "items": one}]}
        properties[field.name] = {"description": about.meaning, **one}
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(properties),
        "properties": properties,
    }


def _schema_of(kind: Any, bounds: Mapping[str, float]) -> dict[str, Any]:
    """The JSON schema of a type."""
    origin = get_origin(kind)
    if origin is Annotated:
        return dict(kind.__metadata__[0].schema)
    if origin is Literal:
        return {"enum": list(get_args(kind))}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema_of(part, bounds) for part in get_args(kind)]}
    schema: dict[str, Any] = {"type": _TYPES[kind]}
    if kind is int:
        schema |= {"maximum": COUNT_MAX}
    return {**schema, **(bounds if kind in (int, float) else {})}


def _as_typed(options: type[VariantOptions], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values, whole numbers as floats where the type has floats alone."""
    kinds = {field.name: field.type for field in fields_of(options)}
    return {
        name: float(value)
        if type(value) is int and float in (kinds[name], *get_args(kinds[name]))
        else value
        for name, value in values.items()
    }
