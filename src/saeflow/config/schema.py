"""The schema of `params.yaml`: every number in its one form, and one line for the first mistake."""

import copy
import difflib
import functools
import math
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from saeflow.errors import UserError

ROOT = Path(__file__).parents[3]
SCHEMA = Path(__file__).with_name("params.schema.yaml")
_CHOICES = 12
"""More names than this are not listed in a message."""
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")
_WORDS = {"true": True, "false": False, "null": None}


def conform(params: Any) -> Any:
    """Parameters that follow the schema, each number in its one form.

    A whole number written as a float (1.0e+6, 256.0) becomes an integer where the schema asks for one. Text that
    spells a number, true, false or null becomes that where the schema takes no text: YAML 1.1 reads 3e-05 as
    text, and `snakemake --config` gives all that is inside a mapping or a list as text.

    Raises:
        UserError: the first thing that is wrong, in one line.
    """
    changed = copy.deepcopy(params)
    while True:
        errors = sorted(
            _validator().iter_errors(changed), key=lambda error: list(map(str, error.path))
        )
        if not errors:
            return changed
        meant = dict(_meant(errors))
        if not meant:
            raise UserError(_explain(errors[0]))
        for path, value in meant.items():
            node = changed
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value


def listed(names: Any) -> str:
    """Names in order, for a message."""
    return ", ".join(sorted(names)) or "none"


def _is_whole(checker: Any, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(checker: Any, value: Any) -> bool:
    return _is_whole(checker, value) or (isinstance(value, float) and math.isfinite(value))


@functools.cache
def params_schema() -> dict[str, Any]:
    """The JSON schema of `params.yaml`."""
    return dict(yaml.safe_load(SCHEMA.read_text(encoding="utf-8")))


@functools.cache
def _validator() -> Any:
    """A validator to which 1.0 is no integer, and neither infinity nor NaN a number."""
    import jsonschema  # a tenth of a second, which no job of the workflow needs

    draft = jsonschema.Draft202012Validator
    types = draft.TYPE_CHECKER.redefine_many({"integer": _is_whole, "number": _is_finite})
    return jsonschema.validators.extend(draft, type_checker=types)(params_schema())


def _meant(errors: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the path and value of each entry whose type differs from the schema's but whose meaning fits."""
    for error in errors:
        yield from _meant(error.context or ())
        if error.validator == "type" and error.absolute_path:
            for wanted in _as_list(error.validator_value):
                found = _read_as(wanted, error.instance)
                if found is not error.instance:
                    yield tuple(error.absolute_path), found
                    break


def _read_as(wanted: str, value: Any) -> Any:
    """Return a value as a type of the schema; the value itself where it fits none."""
    if wanted in ("boolean", "null") and isinstance(value, str):
        word = _WORDS.get(value, value)
        is_wanted = isinstance(word, bool) if wanted == "boolean" else word is None
        return word if is_wanted else value
    if wanted not in ("integer", "number"):
        return value
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        exact = Decimal(value)
        if exact == exact.to_integral_value() and exact.adjusted() < 300:
            return int(exact)
        return float(exact) if wanted == "number" and math.isfinite(float(exact)) else value
    if wanted == "integer" and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _choices(error: Any) -> str:
    """List the allowed names; of many, those most like the one that was found."""
    names = sorted(map(str, error.validator_value))
    if len(names) <= _CHOICES:
        return ", ".join(names)
    near = difflib.get_close_matches(str(error.instance), names, n=3, cutoff=0)
    return f"{', '.join(near)} and {len(names) - len(near)} others of {SCHEMA.relative_to(ROOT)}"


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
        elif len(types) > 1 and all(types):
            where = ".".join(str(part) for part in error.absolute_path)
            wanted = " or ".join(str(value) for other in types for value in other)
            return f"{where}: expected {wanted}, found {error.instance!r}."
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
            return f"{where}: the key {listed(missing)} is missing. Add it (see docs/own-data.md)."
        case "type":
            wanted = " or ".join(_as_list(error.validator_value))
            return f"{where}: expected {wanted}, found {found}."
        case "enum":
            return f"{where}: expected one of {_choices(error)}, found {found}."
        case "const":
            return f"{where}: expected {error.validator_value!r}, found {found}."
        case _:
            hint = error.schema.get("description", "")
            return f"{where}: {error.message}" + (f" ({hint})" if hint else "") + "."
