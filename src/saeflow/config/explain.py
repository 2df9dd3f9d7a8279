"""Check values by a JSON schema, and say in one line each what is wrong with them."""

import difflib
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

DESCRIBED = "docs/parameters.md"
"""The document that describes every key."""
BOUNDS = {
    "minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below",
}  # fmt: skip
"""Words for the bounds of a schema."""
TYPES = {
    "integer": "whole number", "boolean": "true or false", "string": "text", "object": "mapping", "array": "list",
}  # fmt: skip
"""Words for the types of a schema."""
_WITHOUT_ARTICLE = ("boolean", "string", "null")
_CHOICES = 12
"""More names than this are not listed in a message."""


def _is_whole(checker: Any, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(checker: Any, value: Any) -> bool:
    return _is_whole(checker, value) or (isinstance(value, float) and math.isfinite(value))


def validator(schema: Mapping[str, Any]) -> Any:
    """A validator to which 1.0 is no integer, and neither infinity nor NaN a number."""
    return _strict()(schema)


@functools.cache
def _strict() -> Any:
    import jsonschema  # a tenth of a second, which most jobs of the workflow do not need

    draft = jsonschema.Draft202012Validator
    types = draft.TYPE_CHECKER.redefine_many({"integer": _is_whole, "number": _is_finite})
    return jsonschema.validators.extend(draft, type_checker=types)


def explained(errors: Iterable[Any]) -> list[str]:
    """A line for each error of a validator, in the order of their places, none twice."""
    ordered = sorted(errors, key=lambda error: list(map(str, error.path)))
    return list(dict.fromkeys(map(_explain, ordered)))


def listed(names: Any) -> str:
    """Names in order, for a message."""
    return ", ".join(sorted(names)) or "none"


def counted(number: int, of: str) -> str:
    """Return a number of things in words, such as `1 SAE` and `2,000 SAEs`."""
    return f"{number:,} {of}{'' if number == 1 else 's'}"


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _choices(error: Any) -> str:
    """List the allowed names; of many, those most like the one that was found."""
    names = sorted(map(str, error.validator_value))
    if len(names) <= _CHOICES:
        return ", ".join(names)
    near = difflib.get_close_matches(str(error.instance), names, n=3, cutoff=0)
    return f"{', '.join(near)} and {len(names) - len(near)} others of {DESCRIBED}"


def _wanted(branch: list[Any]) -> str:
    """Say what an alternative asks of a value that is no mapping and no list; nothing where that takes more than some words."""
    error = branch[0]
    if len(branch) > 1 or error.path:
        return ""
    match error.validator:
        case "type":
            return _types(error)
        case "enum":
            return _choices(error)
        case "minimum":
            return f"{BOUNDS['minimum']} {error.validator_value}"
        case _:
            return ""


def _types(error: Any) -> str:
    """Say of which types a value may be, such as `a whole number or null`."""
    return " or ".join(
        ("" if kind in _WITHOUT_ARTICLE else "a ") + TYPES.get(kind, kind)
        for kind in as_list(error.validator_value)
    )


def _explain(error: Any) -> str:
    """One line for a schema error: where, what was expected, what was found."""
    if error.validator in ("oneOf", "anyOf") and error.context:
        branches: dict[Any, list[Any]] = {}
        for nested in error.context:
            branches.setdefault(nested.schema_path[0], []).append(nested)
        meant = [b for b in branches.values() if not any(e.validator == "const" for e in b)]
        types = [
            [e.validator_value for e in b if e.validator == "type" and not e.path] for b in meant
        ]
        if isinstance(error.instance, Mapping | list):  # a mistake in it, not that it is no null
            meant = [b for b, other in zip(meant, types, strict=True) if not other] or meant
        elif (
            len(types) > 1
            and (all(types) or ["array"] not in types)
            and all(words := [*map(_wanted, meant)])
        ):  # of a sweep, a list beside a value: the mistake in the value
            where = ".".join(str(part) for part in error.absolute_path)
            return f"{where}: expected {' or '.join(words)}, found {error.instance!r}."
        if meant:  # the alternative with the fewest mistakes, and in it the deepest one
            fewest = min(meant, key=lambda branch: len(branch))
            return _explain(max(fewest, key=lambda nested: len(nested.absolute_path)))
    where = ".".join(str(part) for part in error.absolute_path) or "the file"
    found = repr(error.instance)
    found = found if len(found) < 80 else found[:77] + "..."
    match error.validator:
        case "additionalProperties" | "unevaluatedProperties":
            known = set(error.schema.get("properties", {}))
            unknown = sorted(set(error.instance) - known)
            return f"{where}: unknown key {listed(unknown)}. Known keys: {listed(known)}."
        case "required":
            missing = [key for key in error.validator_value if key not in error.instance]
            if len(missing) > 1:
                return (
                    f"{where}: the keys {listed(missing)} are missing. Add them (see {DESCRIBED})."
                )
            return f"{where}: the key {listed(missing)} is missing. Add it (see {DESCRIBED})."
        case "type":
            return f"{where}: expected {_types(error)}, found {found}."
        case bound if bound in BOUNDS:
            return f"{where}: expected {BOUNDS[bound]} {error.validator_value}, found {found}."
        case "enum":
            return f"{where}: expected one of {_choices(error)}, found {found}."
        case "const":
            return f"{where}: expected {error.validator_value!r}, found {found}."
        case "pattern" if "description" in error.schema:
            words = error.schema["description"].removesuffix(".")
            if words[1:2].islower() or words[1:2] == " ":
                words = words[0].lower() + words[1:]
            return f"{where}: expected {words}; found {found}."
        case _:
            hint = error.schema.get("description", "").removesuffix(".")
            return f"{where}: {error.message}" + (f" ({hint})" if hint else "") + "."
