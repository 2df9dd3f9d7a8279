"""The sizes of pinned models, known before a model is fetched; loads no model code by itself."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from saeflow.errors import UserError

SHAPES = Path(__file__).with_name("shapes.yaml")


@functools.cache
def _table() -> dict[str, Any]:
    return dict(yaml.safe_load(SHAPES.read_text(encoding="utf-8")))


def pinned_config(model: Mapping[str, Any]) -> dict[str, Any] | None:
    """The sizes of a model by its pin, as its config.json has them; None where its pin is not in the table.

    Args:
        model: {hub, revision} | {wheel, sha256, file} | another, which has no pin.
    """
    pin = model.get("revision") if "hub" in model else model.get("sha256")
    return _table().get(str(pin))


def check_config(model: Mapping[str, Any], folder: Path) -> None:
    """Compare a fetched model's configuration with the sizes that were planned with.

    Args:
        model: as for `pinned_config`.
        folder: holds its config.json.

    Raises:
        UserError: they differ.
    """
    expected = pinned_config(model)
    if expected is None:
        return
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    found = config.to_dict()
    for name, value, other in _differences(expected, found):
        raise UserError(
            f"{folder / 'config.json'}: expected {name} {value!r} of the pinned model, found {other!r}. Fetch the "
            f"model again, or correct {SHAPES.name} of saeflow, which jobs and needs are planned with."
        )


def _differences(
    expected: Mapping[str, Any], found: Mapping[str, Any], where: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for name, value in expected.items():
        other = found.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            yield from _differences(value, other, f"{where}{name}.")
        elif value != other:
            yield where + name, value, other
