"""The schema of `params.yaml`, and parameters in its form: defaults filled in, every number written one way."""

import copy
import functools
import math
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from saeflow.config.explain import as_list, explained, validator
from saeflow.config.options import options_schema
from saeflow.config.variants import variants
from saeflow.errors import UserError
from saeflow.files import package_yaml

CARRIED = "_project"
"""Folder of an installed package that holds the workflow, which is no code of a job (setup.py)."""
_HERE = Path(__file__).parents[1]
ROOT = _HERE / CARRIED if (_HERE / CARRIED).is_dir() else Path(__file__).parents[3]
"""Folder of the Snakefile, rules, profiles, lock and presets: the checkout, or CARRIED."""
SCHEMA = Path(__file__).with_name("params.schema.yaml")
_OF_TRAINING = ("training", "table_training_cost")
"""Default figures that need an entry of `saes` that is trained (`figures.needs.TRAINED`)."""
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")
_WORDS = {"true": True, "false": False, "null": None}


@functools.cache
def params_schema() -> dict[str, Any]:
    """The JSON schema of `params.yaml`: the file's own, with the options that each variant states."""
    schema: dict[str, Any] = package_yaml(SCHEMA)
    trained = schema["properties"]["saes"]["additionalProperties"]["else"]
    shared = schema["properties"]["training"]["properties"]
    for name, about in shared.items():  # an entry takes what it does not state from `training`
        trained["properties"][name] = {k: v for k, v in about.items() if k != "default"}
    trained["properties"]["variant"]["enum"] = list(variants())
    trained["allOf"] = [
        {
            "if": {"required": ["variant"], "properties": {"variant": {"const": name}}},
            "then": {"properties": {"options": options_schema(options, is_swept=True)}},
        }
        for name, options in variants().items()
    ]
    return schema


def conform(params: Any) -> tuple[Any, list[str]]:
    """Parameters with the schema's defaults and each number in its one form, and all that is wrong with them.

    A whole number written as a float (1.0e+6, 256.0) becomes an integer where the schema asks for one. Text that
    spells a number, true, false or null becomes that where the schema takes no text: YAML 1.1 reads 3e-05 as
    text, and `snakemake --config` gives all that is inside a mapping or a list as text.
    """
    return _conform(params_schema(), _without_figures_of_training(params))


def _without_figures_of_training(params: Any) -> Any:
    """Default figures that show no training, where no entry of `saes` is trained; else the parameters as they are."""
    if not isinstance(params, Mapping):
        return params
    saes, figures = params.get("saes"), params.get("figures") or {}
    if not (isinstance(saes, Mapping) and saes and isinstance(figures, Mapping)):
        return params
    is_imported = all(isinstance(entry, Mapping) and "import" in entry for entry in saes.values())
    if not is_imported or "names" in figures:
        return params
    usual = params_schema()["properties"]["figures"]["properties"]["names"]["default"]
    names = [name for name in usual if name not in _OF_TRAINING]
    return {**params, "figures": {**figures, "names": names}}


def conform_entry(name: str, value: Any, definition: str) -> Any:
    """One entry of the parameters, such as a source, that stands alone; as `conform` gives it.

    Args:
        name: what it is called where it stands, for messages.
        value: the entry.
        definition: its name under `$defs` of the schema.

    Raises:
        UserError: all that is wrong with it, a line each.
    """
    schema = {
        "$defs": params_schema()["$defs"],
        "properties": {name: {"$ref": f"#/$defs/{definition}"}},
    }
    changed, wrong = _conform(schema, {name: value})
    if wrong:
        raise UserError(*wrong)
    return changed[name]


def _conform(schema: Mapping[str, Any], value: Any) -> tuple[Any, list[str]]:
    """A value in the form that a schema asks for, and all that is wrong with it."""
    changed = _filled(schema, value)
    check = validator(schema)
    while True:
        errors = list(check.iter_errors(changed))
        meant = dict(_meant(errors))
        if not meant:
            return changed, explained(errors)
        for path, one in meant.items():
            node = changed
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = one


def _filled(schema: Mapping[str, Any], value: Any) -> Any:
    """A copy of a value, with the default of each key that a schema gives one."""
    if not isinstance(value, Mapping):
        return copy.deepcopy(value)
    filled = dict(value)
    properties: dict[str, Any] = {}
    for part in _parts(schema, value):
        properties |= part.get("properties", {})
        others = part.get("additionalProperties")
        if isinstance(others, Mapping):
            properties |= {name: others for name in value if name not in part.get("properties", {})}
    for name, about in properties.items():
        if name not in filled and "default" in about:
            filled[name] = about["default"]
    return {name: _filled(properties.get(name, {}), one) for name, one in filled.items()}


def _parts(schema: Mapping[str, Any], value: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The parts of a schema that concern a mapping: itself, what it refers to, and the alternatives that apply."""
    yield schema
    if "$ref" in schema:
        yield from _parts(params_schema()["$defs"][schema["$ref"].rpartition("/")[2]], value)
    for part in schema.get("allOf", ()):
        yield from _parts(part, value)
    if "if" in schema:
        chosen = "then" if _applies(schema["if"], value) else "else"
        yield from _parts(schema.get(chosen, {}), value)
    alternatives = [
        part
        for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ()))
        if part.get("type", "object") == "object" and set(part.get("required", ())) <= set(value)
    ]
    if len(alternatives) == 1:
        yield from _parts(alternatives[0], value)


def _applies(condition: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    """Return whether a mapping has the keys, and the words under some keys, that an `if` of the schema asks for."""
    words = condition.get("properties", {})
    return set(condition.get("required", ())) <= set(value) and all(
        value[name] in about.get("enum", [about.get("const")])
        for name, about in words.items()
        if name in value
    )


def _meant(errors: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the path and value of each entry whose type differs from the schema's but whose meaning fits."""
    for error in errors:
        yield from _meant(error.context or ())
        if error.validator == "type" and error.absolute_path:
            for wanted in as_list(error.validator_value):
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
