"""Digests of the user's own files that parameters name, so that changed data makes its jobs run again.

A digest is kept under the file's size, time of change and inode in results/.digests.json: planning a run whose
files are as they were reads none of them.
"""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from saeflow.files import file_digest, files_below, write_json

KEPT = Path("results/.digests.json")
_NAMES = ("file", "files", "folder", "gguf", "dataset")
"""Keys of parameters that name local files; `dataset` is a hub id unless a folder has that name."""
_RECENT_S = 2.0
"""A file that changed so recently may change again at the same time of change: its digest is not kept."""


def content_digests(params: Any) -> dict[str, str]:
    """Return the SHA-256 of every local file that some parameters name; of a folder, of each file below it.

    Args:
        params: a parameter or a tree of them. Names of files that are not there are passed over: the job that
            needs them says so.
    """
    paths = sorted(set(_paths(params)))
    if not paths:
        return {}
    known = _read()
    found, states = {}, dict(known)
    for path in paths:
        status = path.stat()
        state = f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"
        name = str(path.absolute())
        if known.get(name, {}).get("state") == state:
            found[str(path)] = known[name]["digest"]
            continue
        found[str(path)] = file_digest(path)
        if time.time() - status.st_mtime > _RECENT_S:
            states[name] = {"state": state, "digest": found[str(path)]}
    if states != known:
        write_json(KEPT, states)
    return found


def _paths(params: Any, name: str = "") -> Iterator[Path]:
    if isinstance(params, Mapping):
        for key, value in params.items():
            yield from _paths(value, str(key))
    elif isinstance(params, list | tuple):
        for value in params:
            yield from _paths(value, name)
    elif isinstance(params, str) and name in _NAMES:
        path = Path(params)
        if path.is_dir():
            yield from files_below(path)
        elif path.is_file():
            yield path


def _read() -> dict[str, dict[str, str]]:
    """Return what was kept; nothing where that cannot be read, which costs a reading of the files."""
    try:
        kept = json.loads(KEPT.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}
