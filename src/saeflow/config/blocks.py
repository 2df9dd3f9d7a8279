"""Hook points of all blocks or of a range: `blocks.*.resid_post` and `blocks.0-5.resid_post`, written out.

A source's list is written out from the number of blocks of its model, and so is every list of stores that names the same.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from saeflow.errors import UserError
from saeflow.shapes import known_shape

_SEVERAL = re.compile(
    r"(?P<before>(?:.*/)?(?:vision\.)?blocks)\.(?P<blocks>\*|\d+-\d+)\.(?P<place>\w+)"
)


def written_out(params: Any) -> Any:
    """Parameters whose hook points and stores each name one block.

    Parameters that are not of the right form are returned as they are, for the schema to refuse.

    Raises:
        UserError: all blocks of a model whose number of blocks is not known, or a range that is none.
    """
    sources = params.get("sources") if isinstance(params, Mapping) else None
    if not isinstance(sources, Mapping):
        return params
    found = {**params, "sources": {name: _source(name, one) for name, one in sources.items()}}
    for part, key in (("saes", "store"), ("complexity", "probe_at")):
        entries = params.get(part)
        if isinstance(entries, Mapping):
            found[part] = {
                name: _entry(f"{part}.{name}", one, key, sources) for name, one in entries.items()
            }
    return found


def _source(name: str, source: Any) -> Any:
    points = source.get("hook_points") if isinstance(source, Mapping) else None
    if not isinstance(points, list):
        return source
    where = f"sources.{name}.hook_points"
    return {**source, "hook_points": list(_each(where, points, source))}


def _entry(where: str, entry: Any, key: str, sources: Mapping[str, Any]) -> Any:
    named = entry.get(key) if isinstance(entry, Mapping) else None
    stores = named if isinstance(named, list) else [named]
    if not any(isinstance(store, str) and _SEVERAL.fullmatch(store) for store in stores):
        return entry
    found: list[Any] = []
    for store in stores:
        source = sources.get(store.partition("/")[0]) if isinstance(store, str) else None
        found += _each(f"{where}.{key}", [store], source)
    return {**entry, key: found}


def _each(where: str, names: list[Any], source: Any) -> Iterator[Any]:
    for name in names:
        match = _SEVERAL.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            yield name
        else:
            for block in _blocks(where, name, match["blocks"], source):
                yield f"{match['before']}.{block}.{match['place']}"


def _blocks(where: str, name: str, asked: str, source: Any) -> range:
    if asked != "*":
        first, last = map(int, asked.split("-"))
        if last < first:
            raise UserError(
                f"{where}: expected FIRST-LAST in rising order, found {name}. Swap them."
            )
        return range(first, last + 1)
    model = source.get("model") if isinstance(source, Mapping) else None
    shape = known_shape(model) if isinstance(model, Mapping) and model else None
    if shape is None or shape.n_blocks is None:
        raise UserError(
            f"{where}: {name}: expected a model whose number of blocks is known before it is fetched (a local folder, a GGUF "
            "file, a pin in saeflow/shapes/shapes.yaml, or one whose config.json is in the hub's cache), found another. Name "
            "them as blocks.0-11.PLACE."
        )
    return range(shape.n_blocks)
