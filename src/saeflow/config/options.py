"""Options of SAEs: what an entry of `saes` states, its preset, and the variant's defaults for the rest.

This module imports no model code. `saes/options.yaml` holds the defaults, `saes/presets.yaml` the presets.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from saeflow.errors import UserError

_FOLDER = Path(__file__).parents[1] / "saes"
DEFAULTS, PRESETS = _FOLDER / "options.yaml", _FOLDER / "presets.yaml"


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
    defaults = _read(DEFAULTS).get(variant, {}) if isinstance(variant, str) else {}
    return {**options, **{name: v for name, v in defaults.items() if name not in options}}


def with_preset(name: str, variant: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the entry `name`, in place of those of the preset that they name.

    Raises:
        UserError: an unknown preset, or one of another variant.
    """
    if "preset" not in options:
        return dict(options)
    presets, chosen = _read(PRESETS), options["preset"]
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
def _read(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
