"""A store of several windows: a Zarr group whose subgroups are stores of one window each.

Windows are linked into the store, not copied: putting them together takes no room on the disk, and the windows that it was made
of stay whole until it is.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import zarr

from saeflow.errors import UserError
from saeflow.files import files_below, read_json
from saeflow.stores.content import (
    STORE_FORMAT,
    WINDOWS_VERSION,
    metadata_digest,
    window_name,
    windows_digest,
)
from saeflow.stores.merge import SUFFIX, software

_SHARED = (
    "source", "source_params", "made_from", "split", "hook_point", "store_params", "dtype", "d_in", "median_norm",
    "mean", "scale",
)  # fmt: skip
"""Attributes of the first window that are those of the whole store: a stream knows no other when training begins."""
_ADDED = ("rows", "raw_rows", "dropped_rows")
_OF_WINDOW = ("rows", "content_digest", "metadata_digest")


def join(windows: Sequence[Path], hook_points: Sequence[str], folder: Path) -> dict[str, str]:
    """Put the windows of a split together into one Zarr store per hook point.

    Args:
        windows: folders that `finalise` wrote, one a window, in order.
        hook_points: of the source.
        folder: existing folder to write `HOOK_POINT.zarr` into.

    Returns:
        The content digest of each hook point's store.
    """
    for hook_point in hook_points:
        store = folder / f"{hook_point}{SUFFIX}"
        for number, window in enumerate(windows):
            _link(window / store.name, store / window_name(number))
    return _describe([window_facts(window, hook_points) for window in windows], folder)


def window_facts(window: Path, hook_points: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Attributes of a window's store of each hook point."""
    return {
        hook_point: read_json(window / f"{hook_point}{SUFFIX}" / "zarr.json")["attributes"]
        for hook_point in hook_points
    }


def remember(windows: Sequence[Mapping[str, Mapping[str, Any]]], folder: Path) -> dict[str, str]:
    """Write what is known of a split whose windows are gone: a store without rows per hook point.

    Args:
        windows: of each window in order, its `window_facts`.
        folder: existing folder to write `HOOK_POINT.zarr` into.

    Returns:
        The content digest of each hook point's store, that of the same windows if they were kept.
    """
    return _describe(windows, folder, has_rows=False)


def _describe(
    windows: Sequence[Mapping[str, Mapping[str, Any]]], folder: Path, *, has_rows: bool = True
) -> dict[str, str]:
    digests = {}
    for hook_point in windows[0]:
        attributes = joined_attributes([window[hook_point] for window in windows])
        if not has_rows:
            attributes["has_rows"] = False
        store = folder / f"{hook_point}{SUFFIX}"
        group = zarr.create_group(store)
        attributes["metadata_digest"] = metadata_digest(store, attributes)
        group.attrs.put(attributes)
        digests[hook_point] = str(attributes["content_digest"])
    return digests


def joined_attributes(of_windows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Attributes of a store of several windows, its metadata digest aside.

    Args:
        of_windows: attributes of each window, in order.

    Raises:
        UserError: they are not the windows of one extraction, each once.
    """
    for number, window in enumerate(of_windows):
        if window.get("window") != number:
            raise UserError(
                f"windows: expected window {number}, found {window.get('window')}. Give every window once, in order."
            )
    first = of_windows[0]
    facts = {name: first[name] for name in _SHARED}
    added = {name: sum(window[name] for window in of_windows) for name in _ADDED}
    digests = [window["content_digest"] for window in of_windows]
    return {
        "format": STORE_FORMAT, "format_version": WINDOWS_VERSION, **facts, **added, "arrays": {},
        "windows": [{name: window[name] for name in _OF_WINDOW} for window in of_windows],
        "content_digest": windows_digest(first, digests), "software": software(),
    }  # fmt: skip


def _link(folder: Path, target: Path) -> None:
    """Give every file of a folder a second name below another; copy it where the file system knows no links."""
    for path in files_below(folder):
        place = target / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, place)
        except OSError:
            shutil.copyfile(path, place)
