"""What comes from the Hugging Face hub: by commit, checked by its digests, one line where it cannot be had."""

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from saeflow.errors import UserError
from saeflow.files import file_digest

logger = logging.getLogger(__name__)

_GIT_BLOB, _SHA256 = 40, 64
"""Digits of the digest that names a file in the hub's cache: of a small file, of a large one."""


def last_line(text: str) -> str:
    """The last line of what a library says, which tells most."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


@contextmanager
def hub_errors(failure: str, advice: str) -> Iterator[None]:
    """Give up on a hub that hangs, and turn whatever its libraries raise into one line.

    Args:
        failure: what cannot be had.
        advice: what to do.

    Raises:
        UserError: in place of their errors.
    """
    import httpx2
    from datasets.exceptions import DatasetsError
    from huggingface_hub import get_session
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT
    from huggingface_hub.errors import EntryNotFoundError

    libraries = (httpx2.HTTPError, DatasetsError, EntryNotFoundError)
    get_session().timeout = HF_HUB_ETAG_TIMEOUT  # by itself it would wait for ever
    try:
        yield
    except (OSError, ValueError, RuntimeError, *libraries) as error:
        said = last_line(str(error)) if str(error).strip() else type(error).__name__
        raise UserError(f"{failure} ({said}). {advice}") from error


def config_file(name: str, revision: Any) -> Path:
    """A hub model's config.json, fetched where it is not in the hub's cache.

    Raises:
        UserError: the revision is no commit, or the hub does not give the file, or gives other bytes.
    """
    from huggingface_hub import hf_hub_download

    if not re.fullmatch("[0-9a-f]{40}", str(revision)):
        raise UserError(
            f"model.revision: expected the commit of {name} (40 hex digits), found {revision!r}. A branch "
            "or tag can move: write the commit that the model's page on the hub shows."
        )
    with _model_errors(name, revision):
        path = Path(hf_hub_download(name, "config.json", revision=revision))
    _check_blob(path)
    return path


def snapshot(name: str, revision: str, patterns: list[str], *, is_cached: bool = False) -> Path:
    """The folder of a hub model's files in the hub's cache.

    Args:
        name: owner/name.
        revision: its commit.
        patterns: names of the files that are needed.
        is_cached: they were fetched before, and are only fetched again where the cache lost them.

    Raises:
        UserError: the hub does not give them, or other bytes than it says.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted: dict[str, Any] = {
        "revision": revision, "allow_patterns": patterns, "ignore_patterns": ["*/*"]
    }  # fmt: skip
    if is_cached:
        try:
            return Path(snapshot_download(name, **wanted, local_files_only=True))
        except LocalEntryNotFoundError:
            logger.info("downloading %s again: it is not in the hub's cache any more", name)
    with _model_errors(name, revision):
        folder = Path(snapshot_download(name, **wanted))
    for path in folder.iterdir():
        _check_blob(path)
    return folder


def _model_errors(name: str, revision: str) -> AbstractContextManager[None]:
    advice = "Mend id or revision, or download the model elsewhere and give model: {folder: PATH}."
    return hub_errors(f"{name} at {revision}: cannot be fetched from the hub", advice)


def _check_blob(path: Path) -> None:
    """Compare a cached file with the digest that the hub gave for it, which is its name in the cache."""
    blob = path.resolve()
    if blob == path or re.fullmatch("[0-9a-f]+", blob.name) is None:
        return
    if len(blob.name) == _GIT_BLOB:
        content = blob.read_bytes()
        digest = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    elif len(blob.name) == _SHA256:
        digest = file_digest(blob)
    else:
        return
    if digest != blob.name:
        raise UserError(
            f"{path}: not the bytes that the hub names (expected digest {blob.name}, found {digest}): a "
            f"damaged download. Delete {blob} and run the step again."
        )


def open_dataset(dataset: Mapping[str, Any], where: str, instead: str) -> Any:
    """Open a data set of the hub, or of a local folder; runs no code from it.

    Args:
        dataset: {dataset, name, revision, split, streaming}.
        where: the parameter that names it.
        instead: what can be given without the hub.

    Raises:
        UserError: it cannot be opened.
    """
    from datasets import load_dataset

    name = dataset["dataset"]
    failure = f"{where}.dataset: {name} at {dataset['revision']} cannot be opened"
    advice = f"Mend dataset, name, split or revision; without the hub, download the files and give {instead}."
    with hub_errors(failure, advice):
        return load_dataset(
            name,
            dataset["name"],
            split=dataset["split"],
            revision=None if Path(name).is_dir() else dataset["revision"],
            streaming=dataset["streaming"],
        )


def rows_of(rows: Any, dataset: Mapping[str, Any], where: str) -> Iterator[Any]:
    """Rows of an open data set, as they come.

    Raises:
        UserError: the hub stops giving them.
    """
    source, done = iter(rows), object()
    failure = f"{where}.dataset: {dataset['dataset']} cannot be read to its end"
    while True:
        with hub_errors(failure, "Run the same command again."):
            row = next(source, done)
        if row is done:
            return
        yield row
