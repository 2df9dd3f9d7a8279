"""The options of every variant, with the presets of papers: what an entry of `saes` states, and what it leaves out.

The files of variants import torch, which takes seconds, so only the parts of them that state the options are run here.
"""

import ast
import functools
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saeflow.config.options import VariantOptions, defaults
from saeflow.errors import UserError
from saeflow.files import package_yaml

SAES = Path(__file__).parents[1] / "saes"
PRESETS = SAES / "presets.yaml"
_PACKAGE = "saeflow.saes."


@functools.cache
def variants() -> dict[str, type[VariantOptions]]:
    """The options of each variant of the table `saes.variants.VARIANTS`, by the variant's name."""
    table = _statements("variants")["VARIANTS"]
    assert isinstance(table, ast.AnnAssign)
    assert isinstance(table.value, ast.Dict)
    found = {}
    for key, value in zip(table.value.keys, table.value.values, strict=True):
        assert isinstance(key, ast.Constant)
        assert isinstance(value, ast.Name)
        origin = _statements("variants")[value.id]
        assert isinstance(origin, ast.ImportFrom)
        module = str(origin.module).removeprefix(_PACKAGE)
        found[str(key.value)] = _take(module, f"{value.id}Options")
    return found


def with_options(params: Any) -> Any:
    """Parameters whose `saes` entries have every option.

    An option that an entry does not state comes from the preset that it names
    (`options: {preset: NAME, ...}`), or else from the defaults of its variant. Parameters that are not of
    the right form are returned as they are, for the schema to refuse.

    Raises:
        UserError: an unknown preset, or one of another variant.
    """
    entries = params.get("saes") if isinstance(params, Mapping) else None
    if not isinstance(entries, Mapping):
        return params
    return {**params, "saes": {name: _whole(name, entry) for name, entry in entries.items()}}


def with_defaults(variant: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options, then the variant's defaults of those that are not stated."""
    known = variants().get(variant) if isinstance(variant, str) else None
    rest = defaults(known) if known else {}
    return {**options, **{name: v for name, v in rest.items() if name not in options}}


def with_preset(name: str, variant: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the entry `name`, in place of those of the preset that they name.

    Raises:
        UserError: an unknown preset, or one of another variant.
    """
    if "preset" not in options:
        return dict(options)
    presets, chosen = _presets(), options["preset"]
    if not isinstance(chosen, str) or chosen not in presets:
        known = ", ".join(sorted(presets))
        raise UserError(f"saes.{name}.options.preset: expected one of {known}, found {chosen!r}.")
    preset = presets[chosen]
    if preset["variant"] != variant:
        raise UserError(
            f"saes.{name}.options.preset: {chosen} is of the variant {preset['variant']}, found variant "
            f"{variant!r}. Change one of them."
        )
    return {**preset["options"], **{key: v for key, v in options.items() if key != "preset"}}


def _whole(name: str, entry: Any) -> Any:
    options = entry.get("options") if isinstance(entry, Mapping) else None
    if not isinstance(options, Mapping):
        return entry
    variant = entry.get("variant")
    return {
        **entry,
        "options": with_defaults(variant, with_preset(name, variant, options)),
    }


@functools.cache
def _presets() -> dict[str, Any]:
    return dict(package_yaml(PRESETS))


# The part of a module that states options.


@functools.cache
def _statements(module: str) -> dict[str, ast.stmt]:
    """The statement of a module of `saes` that binds each of its names."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse((SAES / f"{module}.py").read_text(encoding="utf-8")).body:
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                found[name] = node
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                found[name] = node
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                found |= {alias.asname or alias.name: node for alias in aliases}
    return found


@functools.cache
def _take(module: str, name: str) -> Any:
    """Return what a module of `saes` binds to a name, without running the rest of the module."""
    node = _statements(module)[name]
    if isinstance(node, ast.ImportFrom) and node.module:
        alias = next(alias for alias in node.names if (alias.asname or alias.name) == name)
        if node.module.startswith(_PACKAGE):
            return _take(node.module.removeprefix(_PACKAGE), alias.name)
        return getattr(importlib.import_module(node.module), alias.name)
    used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} - {name}
    scope = {other: _take(module, other) for other in used & set(_statements(module))}
    scope["__name__"] = _PACKAGE + module
    code = compile(ast.Module([node], type_ignores=[]), str(SAES / f"{module}.py"), "exec")
    exec(code, scope)
    return scope[name]
