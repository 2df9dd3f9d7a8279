"""Describe every key of `params.yaml`: meaning, unit, allowed values and default, as text or as docs/parameters.md."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from saeflow.config.explain import BOUNDS, TYPES
from saeflow.config.options import VariantOptions, fields_of, options_schema, stated
from saeflow.config.schema import params_schema
from saeflow.config.variants import variants
from saeflow.errors import UserError

_NAME = "NAME"
"""Stands for a name that the user gives."""
_REQUIRED = "required"
_LARGE = 2**31 - 1
"""Bounds from here on only say what a computer holds."""
_INTRODUCTION = """\
# Parameters

Every key of `params.yaml`, and every option of a variant. A key with a default need not be stated; *required* keys must
be, where the mapping that they belong to is there. `NAME` stands for a name of your own. A list of alternatives such as
those of `model` is described key by key; which keys go together, a mistake's message says.

`make docs` writes this page from `src/saeflow/config/params.schema.yaml` and the options that each file of
`src/saeflow/saes/` states. `saeflow parameters KEY` prints a part of it.
"""
_OF_OPTIONS = """\
`saes.NAME.options` takes those of the entry's variant. A list of values is swept.

A schedule leads an option to its own value: `{kind: constant}` has it from the first step on; `{kind: linear, from: 64, until:
0.2}` moves from 64 to it over the first 20 % of the steps, as `cosine` and `exponential` do; `{kind: step, from: 64, until: 0.2,
steps: 4}` makes four equal jumps.
"""


@dataclass(frozen=True)
class Key:
    """One key of `params.yaml`, or one option.

    Attributes:
        kind: the `kind` of the mapping that takes the key, where others do not.
        allowed: the values it takes, in words; one for each alternative.
        default: as YAML writes it; `required`; or empty where the key may be absent.
    """

    path: tuple[str, ...]
    kind: str
    meaning: str
    unit: str
    allowed: tuple[str, ...]
    default: str

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def values(self) -> str:
        return " or ".join(self.allowed)


def keys() -> list[Key]:
    """Every key of `params.yaml`, each once, in the schema's order, without the options of variants."""
    found: dict[tuple[tuple[str, ...], str], Key] = {}
    for key in _below(params_schema(), (), ""):
        known = found.setdefault((key.path, key.kind), key)
        allowed = tuple(dict.fromkeys((*known.allowed, *key.allowed)))
        found[key.path, key.kind] = dataclasses.replace(known, allowed=allowed)
    return list(found.values())


def options_of(variant: type[VariantOptions]) -> list[Key]:
    """Every option of a variant."""
    properties = options_schema(variant)["properties"]
    return [
        Key(
            (field.name,),
            "",
            stated(field).meaning,
            stated(field).unit,
            (_allowed(properties[field.name]),),
            _REQUIRED
            if field.default_factory is dataclasses.MISSING
            else _as_yaml(field.default_factory()),
        )
        for field in fields_of(variant)
    ]


def as_text(prefix: str) -> str:
    """Describe some keys.

    Args:
        prefix: the first names of a key, such as `stores` or `evaluation.bootstrap`; a variant, for its options;
            nothing, for every key.

    Raises:
        UserError: no key begins so.
    """
    if prefix in variants():
        chosen = options_of(variants()[prefix])
    else:
        wanted = tuple(filter(None, prefix.split(".")))
        chosen = [key for key in keys() if key.path[: len(wanted)] == wanted]
    if not chosen:
        raise UserError(
            f"{prefix}: expected the start of a key ({', '.join(params_schema()['properties'])}) or a variant "
            f"({', '.join(variants())}), found neither."
        )
    lines = []
    for key in chosen:
        of_kind = key.kind and f" (kind: {key.kind})"
        default = f"default {key.default}" if key.default not in ("", _REQUIRED) else key.default
        facts = "; ".join(filter(None, (key.values, key.unit, default)))
        lines += [f"{key.name}{of_kind}", f"    {key.meaning}", f"    {facts}"]
    return "\n".join(lines)


def as_markdown() -> str:
    """The page docs/parameters.md."""
    parts = [_INTRODUCTION]
    of_section: dict[str, list[Key]] = {}
    for key in keys():
        of_section.setdefault(key.path[0], []).append(key)
    for section, (own, *below) in of_section.items():
        parts += [f"## {section}\n", f"{own.meaning}\n"]
        shown = [dataclasses.replace(key, path=key.path[1:]) for key in below] or [own]
        for kind in dict.fromkeys(key.kind for key in shown):
            parts += [f"### {section} of kind {kind}\n"] if kind else []
            parts += [_table(key for key in shown if key.kind == kind)]
    parts += [
        "## Options of variants\n",
        _OF_OPTIONS,
    ]
    for name, options in variants().items():
        parts += [f"### {name}\n", _table(options_of(options))]
    return "\n".join(parts)


def _below(schema: Mapping[str, Any], path: tuple[str, ...], kind: str) -> Iterator[Key]:
    """The keys that a schema describes, and all below them."""
    for part, of_kind in _parts(schema, kind):
        for name, about in part.get("properties", {}).items():
            is_known = of_kind != kind and name == "kind"  # said of all kinds together
            if not is_known:
                is_required = name in part.get("required", ())
                yield from _key(about, (*path, name), of_kind, is_required)
        others = part.get("additionalProperties")
        if isinstance(others, Mapping):
            yield from _key(others, (*path, _NAME), of_kind, False)


def _key(
    about: Mapping[str, Any], path: tuple[str, ...], kind: str, is_required: bool
) -> Iterator[Key]:
    whole = _resolved(about)
    default = _as_yaml(whole["default"]) if "default" in whole else _REQUIRED * is_required
    meaning = " ".join(whole.get("description", "").split())
    yield Key(path, kind, meaning, whole.get("unit", ""), (_allowed(whole),), default)
    yield from _below(whole, path, kind)


def _parts(schema: Mapping[str, Any], kind: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """A schema and its alternatives, each with the kind that it is for; without the options of variants."""
    whole = _resolved(schema)
    yield whole, kind
    for word in ("anyOf", "oneOf"):
        for part in whole.get(word, ()):
            yield from _parts(part, kind)
    for part in whole.get("allOf", ()):
        about = part["if"]["properties"]
        if "kind" in about:
            yield from _parts(part["then"], ", ".join(_words(about["kind"])))
    for word in ("then", "else"):
        if word in whole:
            yield from _parts(whole[word], kind)


def _resolved(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema with what it refers to; its own words come first."""
    if "$ref" not in schema:
        return dict(schema)
    referred = params_schema()["$defs"][schema["$ref"].rpartition("/")[2]]
    return _resolved(referred) | {name: about for name, about in schema.items() if name != "$ref"}


def _allowed(schema: Mapping[str, Any]) -> str:
    """The values that a schema takes, in words."""
    whole = _resolved(schema)
    if "const" in whole or "enum" in whole:
        return " or ".join(_words(whole))
    alternatives = [*whole.get("anyOf", ()), *whole.get("oneOf", ())]
    if alternatives:
        own = {"type": "object"} if whole.get("type") == "object" else {}
        found = (_allowed({**own, **_resolved(part)}) for part in alternatives)
        return " or ".join(dict.fromkeys(found))
    kinds = whole.get("type", ())
    if kinds == "object":
        names = ", ".join(whole.get("properties", ()))
        return f"{{{names}}}" if names else "mapping"
    if kinds == "array":
        return f"list of {_allowed(whole['items'])}"
    words = [TYPES.get(one, one) for one in ([kinds] if isinstance(kinds, str) else kinds)]
    bounds = [
        f"{said} {whole[word]:g}"
        for word, said in BOUNDS.items()
        if word in whole and whole[word] < _LARGE
    ]
    if words and bounds:
        words[0] += f" {' and '.join(bounds)}"
    return " or ".join(words)


def _words(schema: Mapping[str, Any]) -> list[str]:
    """The values of a constant or a choice."""
    return [_as_yaml(value) for value in schema.get("enum", [schema.get("const")])]


def _as_yaml(value: Any) -> str:
    """A value on one line, as YAML writes it."""
    return (
        yaml.safe_dump(
            value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True
        )
        .removesuffix("...\n")
        .strip()
    )


def _table(described: Iterable[Key]) -> str:
    lines = ["| key | meaning | values | unit | default |", "|---|---|---|---|---|"]
    for key in described:
        default = (
            f"*{_REQUIRED}*" if key.default == _REQUIRED else key.default and f"`{key.default}`"
        )
        cells = (f"`{key.name}`", key.meaning, key.values, key.unit, default)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"
