"""Read a YAML file strictly: a name given twice, or a number that YAML 1.1 reads as another, is refused."""

import re
from pathlib import Path
from typing import Any

import yaml

from saeflow.errors import UserError


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which YAML would silently let the last one win."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    own: set[Any] = set()  # keys that are written here; one that `<<` brings along may be replaced
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise UserError(
                f"line {line}: expected text as a name, found {key!r}. Put it in quotes."
            )
        if key in own:
            raise UserError(f"line {line}: the name {key!r} is given twice. Rename or delete one.")
        own.add(key)
    loader.flatten_mapping(node)
    return {
        loader.construct_object(key, deep=True): loader.construct_object(value, deep=True)
        for key, value in node.value
    }


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    """A whole number, unless YAML 1.1 reads another one than is written: 010 as 8, 1:30 as 90."""
    if re.fullmatch(r"[-+]?(0[0-9_]+|[0-9_]+(:[0-9_]+)+)", node.value):
        raise UserError(
            f"line {node.start_mark.line + 1}: expected a number, found {node.value}, which YAML 1.1 reads as "
            f"{loader.construct_yaml_int(node)}. Write the number itself."
        )
    return int(loader.construct_yaml_int(node))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def read_yaml(path: Path) -> Any:
    """Read a YAML file, with one line for what is wrong with it."""
    try:
        with path.open(encoding="utf-8") as file:
            return yaml.load(file, Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Give the path of a parameter file.") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # also a date or text that is none
        text = " ".join(str(error).split())
        raise UserError(f"{path}: expected YAML, found: {text}") from None
