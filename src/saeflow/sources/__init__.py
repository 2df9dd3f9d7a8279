"""Sources of activations: models that read text or see images, and synthetic data whose truth is known.

A kind of source is one module and one line in `saeflow.sources.kinds`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saeflow.errors import UserError
from saeflow.files import file_digest, folder_digests, json_digest
from saeflow.sources.base import Block, ImageInputs, Inputs, Source
from saeflow.sources.kinds import KINDS, SourceKind, kind_named, kind_of

__all__ = [
    "KINDS", "Block", "ImageInputs", "Inputs", "Source", "SourceKind", "check_source", "external_digest", "external_inputs",
    "kind_named", "kind_of", "open_source", "prepare_inputs",
]  # fmt: skip

BUNDLED = "bundled:"
PINNED = ("hub:", "wheel:", "dataset:")
"""Names of things from outside that carry their own digest: a commit, or the SHA-256 of an archive."""


def check_source(name: str, params: Mapping[str, Any], folder: Path) -> None:
    """Refuse parameters that the source's first job would refuse; loads no weights, uses no network.

    Args:
        name: the source's name, for messages.
        params: one entry of `sources`.
        folder: the source's results folder, which may hold its model already.

    Raises:
        UserError: a layer that the model lacks, an unknown structure, impossible synthetic data.
    """
    kind_of(params).check(name, params, folder)


def external_inputs(params: Mapping[str, Any]) -> dict[str, str]:
    """Digests of what `prepare_inputs` reads from outside the results, by name."""
    return kind_of(params).external_inputs(params)


def external_digest(name: str) -> str | None:
    """The present digest of something from outside; None where its name pins it already.

    Raises:
        UserError: the file or folder is missing.
    """
    if name.startswith(PINNED):
        return None
    if name.startswith(BUNDLED):
        from saeflow.sources.english import digest

        return digest(name.removeprefix(BUNDLED))
    path = Path(name)
    if path.is_dir():
        return json_digest(folder_digests(path))
    if not path.is_file():
        raise UserError(f"{path}: the file is missing, results were made from it. Restore it.")
    return file_digest(path)


def prepare_inputs(
    params: Mapping[str, Any],
    rows: Mapping[str, int],
    model: Path,
    folder: Path,
    workers: int = 1,
) -> dict[str, Any]:
    """Write what a source reads: token ids of its text, pixels of its images, or its true dictionary.

    Args:
        params: one entry of `sources`.
        rows: rows asked for, by split; rounded up to whole contexts.
        model: the folder that `fetch_model` wrote (text and vision sources).
        folder: existing folder to write into.
        workers: processes that may help.

    Returns:
        What was read and what was left out, for the record.
    """
    return dict(kind_of(params).prepare_inputs(params, rows, model, folder, workers))


def open_source(params: Mapping[str, Any], folder: Path, device: str) -> Source:
    """Open a source whose model and inputs are in `folder`/model and `folder`/inputs.

    Args:
        params: one entry of `sources`.
        folder: results/sources/NAME.
        device: where the model runs; activations come back on the CPU.
    """
    return kind_of(params).open(params, folder, device)
