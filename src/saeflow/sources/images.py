"""Images one after the other: files and labels from a data set, a folder or generated scenes.

Everything under a folder and every cell of a data set is an image, or named, counted or refused.
"""

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saeflow.errors import UserError
from saeflow.files import files_below, folder_digests, json_digest
from saeflow.sources import hub, scenes

logger = logging.getLogger(__name__)

SUFFIXES = {
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".jxl", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
"""Suffixes of images, also of those that Pillow may have no decoder for."""
NO_LABEL = -1
_MOST_BYTES = 1 << 28


@dataclass(frozen=True)
class Item:
    """An image before it is decoded."""

    id: str
    label: int  # number of its class, NO_LABEL where it has none
    content: bytes | str | tuple[Mapping[str, Any], int]
    """The file, why there is none, or parameters and number of a scene."""

    @property
    def identity(self) -> bytes:
        """Return the bytes that two equal images share."""
        if isinstance(self.content, bytes):
            return self.content
        if isinstance(self.content, str):
            return self.id.encode()
        params, number = self.content
        return f"{params['seed']} {number}".encode()

    @property
    def digest(self) -> bytes:
        """SHA-256 of `identity`."""
        return hashlib.sha256(self.identity).digest()


Images = tuple[list[str] | None, Iterator[Item]]
"""Class names, if it has classes, and the images in a fixed order."""


def read_images(images: Mapping[str, Any], left_out: Counter[str] | None = None) -> Images:
    """Open a collection of images.

    Args:
        images: {scenes} | {folder} | {dataset, name, revision, split, image_column, label_column,
            streaming, shuffle_seed}.
        left_out: counts the files of a folder that are no images, by the reason.

    Raises:
        UserError: it is missing, or has no images.
    """
    if "scenes" in images:
        params = images["scenes"]
        items = (
            Item(f"scene-{params['seed']}-{n}", scene.label, (params, n))
            for n, scene in enumerate(scenes.scenes(params))
        )
        return list(scenes.CLASSES), items
    if "folder" in images:
        return _folder(Path(images["folder"]), Counter() if left_out is None else left_out)
    return _dataset(images)


def images_digests(images: Mapping[str, Any]) -> dict[str, str]:
    """Digests of where images come from, by name."""
    if "scenes" in images:
        return {}
    local = Path(images["folder"] if "folder" in images else images["dataset"])
    if local.is_dir():  # one digest, however many files
        return {str(local): json_digest(folder_digests(local))}
    return {f"dataset:{images['dataset']}": images["revision"]}


def _folder(folder: Path, left_out: Counter[str]) -> Images:
    """Images of a folder: its subfolders are the classes; without any, images have none."""
    if not folder.is_dir():
        raise UserError(f"images.folder: no such folder: {folder}. Fix the path.")
    found: list[tuple[Path, str | None]] = []
    others: Counter[str] = Counter()
    for path in files_below(folder):
        parts = path.relative_to(folder).parts
        suffix = path.suffix.lower()
        if any(_is_hidden(part) for part in parts):
            others["hidden"] += 1
        elif suffix not in SUFFIXES:
            others[suffix or "no suffix"] += 1
        else:
            found.append((path, parts[0] if len(parts) > 1 else None))
    suffixes = Counter(path.suffix.lower() for path, _ in found)
    logger.info("%s: %d images (%s)", folder, len(found), _counts(suffixes))
    if others:
        logger.warning("%s: %d files are left out (%s)", folder, others.total(), _counts(others))
    left_out.update({f"a file that is no image ({kind})": count for kind, count in others.items()})
    if not found:
        raise UserError(
            f"{folder}: expected images ({', '.join(sorted(SUFFIXES))}) in it or in one subfolder a class, "
            "found none. Fix images.folder."
        )
    places = [path.name for path in folder.iterdir() if path.is_dir() and not _is_hidden(path.name)]
    classes = in_order(_printable(place) for place in places)
    beside = sum(place is None for _, place in found)
    if classes and beside:
        logger.warning(
            "%s: %d images lie beside the class folders: they have no class", folder, beside
        )
    number_of = {name: number for number, name in enumerate(classes)}
    order = np.random.default_rng(0).permutation(len(found))  # classes mixed, always alike
    items = (
        Item(
            _printable(path.relative_to(folder).as_posix()),
            NO_LABEL if place is None else number_of[_printable(place)],
            _file_content(path),
        )
        for path, place in (found[i] for i in order)
    )
    return classes or None, items


def _counts(kinds: Counter[str]) -> str:
    return ", ".join(f"{kind}: {count}" for kind, count in sorted(kinds.items()))


def _is_hidden(name: str) -> bool:
    """Return whether a file or folder is one that programs keep for themselves."""
    return name.startswith(".") or name == "__MACOSX"


def _printable(name: str) -> str:
    """A file's name as text, also where it is no UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _file_content(path: Path) -> bytes | str:
    try:
        if (size := path.stat().st_size) > _MOST_BYTES:
            return f"a file of {size} bytes"
        return path.read_bytes()
    except OSError as error:
        return str(error.strerror)


def in_order(names: Iterable[str]) -> list[str]:
    """Names of classes in a fixed order: whole numbers by value, others as text."""
    found = sorted(names)
    if all(re.fullmatch(r"-?[0-9]+", name) for name in found):
        return sorted(found, key=int)
    return found


def _dataset(images: Mapping[str, Any]) -> Images:
    from datasets import Image

    name, column, label_column = images["dataset"], images["image_column"], images["label_column"]
    rows = hub.open_dataset(images, "images", "images: {folder: PATH}")
    features = rows.features or {}
    for wanted in filter(None, (column, label_column)):
        if features and wanted not in features:
            raise UserError(
                f"{name}: no column {wanted!r}. Columns: {', '.join(features)}. Set image_column and "
                "label_column."
            )
    classes, number_of = _classes(rows, features, images)
    with hub.hub_errors(
        f"{name}: column {column!r} does not hold images, but {features.get(column)}",
        "Set image_column to a column of images.",
    ):
        try:
            rows = rows.cast_column(column, Image(decode=False))
        except TypeError as error:
            raise ValueError(str(error)) from None
    if images["shuffle_seed"] is not None:
        rows = rows.shuffle(seed=images["shuffle_seed"])
    return classes, _dataset_items(rows, images, number_of)


def _classes(
    rows: Any, features: Mapping[str, Any], images: Mapping[str, Any]
) -> tuple[list[str] | None, Mapping[Any, int]]:
    """Names of a data set's classes, and the number of each value of its label column."""
    from datasets import ClassLabel

    name, column = images["dataset"], images["label_column"]
    if column is None:
        return None, {}
    kind = features.get(column)
    if isinstance(kind, ClassLabel):
        return list(kind.names), {NO_LABEL: NO_LABEL} | {i: i for i in range(len(kind.names))}
    if images["streaming"]:
        raise UserError(
            f"{name}: the classes of column {column!r} are not named in the data set. Set streaming: "
            "false, so that they can be listed."
        )
    if not re.match("u?int|bool|string|large_string", str(getattr(kind, "dtype", ""))):
        raise UserError(
            f"{name}: expected whole numbers or text in column {column!r}, found {kind}. Set label_column to a "
            "column of classes."
        )
    names = {value: str(value) for value in rows.unique(column) if value is not None}
    classes = in_order(names.values())
    return classes, {value: classes.index(own) for value, own in names.items()}


def _dataset_items(
    rows: Any, images: Mapping[str, Any], number_of: Mapping[Any, int]
) -> Iterator[Item]:
    column = images["label_column"]
    unlabelled = 0
    try:
        for number, row in enumerate(hub.rows_of(rows, images, "images")):
            label = NO_LABEL
            if column is not None and row[column] is not None:
                if row[column] not in number_of:
                    raise UserError(
                        f"{images['dataset']}, row {number + 1}: label {row[column]} is none of its {len(number_of)} "
                        "classes. Fix the data set."
                    )
                label = number_of[row[column]]
            unlabelled += column is not None and label == NO_LABEL
            content = _cell_content(row[images["image_column"]], images)
            yield Item(f"{images['split']}-{number}", label, content)
    finally:
        if unlabelled:
            logger.warning("%s: %d images have no label", images["dataset"], unlabelled)


def _cell_content(cell: Any, images: Mapping[str, Any]) -> bytes | str:
    """The file in a cell of an image column, or why there is none."""
    if cell is None or not (cell.get("bytes") or cell.get("path")):
        return "a null"
    if cell.get("bytes"):
        return bytes(cell["bytes"])
    path = str(cell["path"])
    if re.match("https?://", path):
        return f"an address, {path}: download the images first"
    outer = Path(path.rpartition("::")[2])  # the archive, of a file inside one
    if Path(images["dataset"]).is_dir() and not _is_pinned(outer, Path(images["dataset"])):
        return f"{path} is outside the data set's folder, so that no digest covers it"
    if "://" in path:  # inside an archive, or on the hub
        from datasets.utils.file_utils import xopen

        try:
            with xopen(path, "rb") as file:
                return bytes(file.read())
        except (OSError, ValueError, RuntimeError, LookupError) as error:
            return str(error)
    return _file_content(Path(path))


def _is_pinned(path: Path, folder: Path) -> bool:
    """Return whether a file belongs to a local data set: in its folder, or from an archive there."""
    from datasets import config

    roots = (folder, Path(config.HF_DATASETS_CACHE), Path(config.DOWNLOADED_DATASETS_PATH))
    return any(path.resolve().is_relative_to(root.resolve()) for root in roots)
