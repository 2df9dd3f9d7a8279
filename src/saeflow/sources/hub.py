"""Files of the Hugging Face hub: fetched by commit, checked by digest, refused in one line where the hub cannot be reached."""

import functools
import hashlib
import logging
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from saeflow.errors import UserError
from saeflow.files import file_digest

logger = logging.getLogger(__name__)

_GIT_BLOB, _SHA256 = 40, 64
"""Digits of the digest that names a file in the hub's cache: of a small file, of a large one."""
_UNREACHED = "the hub cannot be reached"
_TRIES, _RETRY_AFTER_S = 2, 1.0
_NOT_NOW = (408, 429, 500, 502, 503, 504)
"""HTTP's answers that can be others soon."""


_LONGEST = 300
"""Characters of a library's message, which may repeat a whole file."""


def last_line(text: str) -> str:
    """The last line of what a library says, which tells most."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else "no message"
    return last if len(last) <= _LONGEST else f"{last[: _LONGEST - 3]}..."


@contextmanager
def hub_errors(failure: str, advice: str) -> Iterator[None]:
    """Give up on a hub that hangs, and turn whatever its libraries raise into one line.

    Args:
        failure: what cannot be had.
        advice: what to do.

    Raises:
        UserError: in place of their errors.
    """
    _give_up_early()
    try:
        yield
    except _library_errors() as error:
        told = [str(one) for one in _causes(error) if str(one).startswith(_UNREACHED)]
        said = last_line(told[0] if told else str(error) or type(error).__name__)
        raise UserError(f"{failure} ({said}). {advice}") from error


def _library_errors() -> tuple[type[Exception], ...]:
    import httpx2
    from huggingface_hub.errors import EntryNotFoundError

    known = (OSError, ValueError, RuntimeError, httpx2.HTTPError, EntryNotFoundError)
    if (
        "datasets" not in sys.modules
    ):  # which takes a second to import, and a model needs none of it
        return known
    from datasets.exceptions import DatasetsError

    return (*known, DatasetsError)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@functools.cache
def _give_up_early() -> None:
    """Let the hub's library ask a hub that has not answered yet once more, and say nothing of its own.

    By itself it asks six times in 23 seconds, logs each of them, and waits without end for an answer. A hub that
    has answered keeps that patience: a download that has begun is worth it.
    """
    import httpx2
    from huggingface_hub import get_session, set_client_factory
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()
    hooks = get_session().event_hooks
    answered, failures = threading.Event(), list[str]()

    class Client(httpx2.Client):
        def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
            while not answered.is_set():
                if len(failures) == _TRIES:  # an error that makes the library look into its cache
                    raise OfflineModeIsEnabled(f"{_UNREACHED}: {failures[-1]}")
                try:
                    response = super().send(request, **options)
                    if response.status_code not in _NOT_NOW:
                        if not response.is_error:
                            answered.set()
                        return response
                    failures.append(f"HTTP {response.status_code}")
                    response.close()
                except httpx2.TransportError as error:
                    failures.append(str(error) or type(error).__name__)
                if len(failures) < _TRIES:
                    time.sleep(_RETRY_AFTER_S)
            return super().send(request, **options)

    set_client_factory(
        lambda: Client(event_hooks=hooks, follow_redirects=True, timeout=HF_HUB_ETAG_TIMEOUT)
    )


def newest_commit(name: str, kind: str) -> str:
    """The newest commit of a repository of the hub.

    Args:
        name: OWNER/NAME.
        kind: model or dataset.

    Raises:
        UserError: the hub does not tell.
    """
    from huggingface_hub import HfApi

    advice = f"Fix the name, or give {name}@COMMIT, where the hub's cache holds it."
    what = f"{name}: there is no such folder here, and the hub does not tell the newest commit of a {kind} of this name"
    with hub_errors(what, advice):
        return str(HfApi().repo_info(name, repo_type=kind).sha)


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
    advice = "Fix id or revision, or download the model elsewhere and give model: {folder: PATH}."
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
    advice = f"Fix dataset, name, split or revision; without the hub, download the files and give {instead}."
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
