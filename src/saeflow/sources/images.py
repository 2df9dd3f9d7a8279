"""Images one after the other: from a data set, a folder or generated scenes, decoded on worker processes.

Whatever an image is (grey, palette, alpha, 16 bits, CMYK, animated, turned by EXIF), it comes out as RGB of
the model's size; what cannot be read is named, counted and skipped, up to a stated share.
"""

import io
import logging
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from saeflow.errors import UserError
from saeflow.files import folder_digests, json_digest
from saeflow.sources import hub, scenes

logger = logging.getLogger(__name__)

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
NO_LABEL = -1
_AT_ONCE = 8
"""Images a worker is handed at once."""
_WHITE = (255, 255, 255, 255)


@dataclass(frozen=True)
class Item:
    """An image before it is decoded."""

    id: str
    label: int  # number of its class, NO_LABEL where it has none
    content: bytes | tuple[Mapping[str, Any], int]  # the file, or parameters and number of a scene

    @property
    def identity(self) -> bytes:
        """What makes two images the same."""
        if isinstance(self.content, bytes):
            return self.content
        params, number = self.content
        return f"{params['seed']} {number}".encode()


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a CLIP model wants of an image: the shorter side resized, the centre cut out."""

    shorter_side: int
    height: int
    width: int
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch: int

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.height // self.patch, self.width // self.patch


@dataclass(frozen=True)
class Ready:
    """A decoded image."""

    pixels: np.ndarray  # (height, width, 3) uint8
    cover: np.ndarray | None = (
        None  # (down, across) int16: class of the object on each patch of a scene
    )
    objects: int = 0


Images = tuple[list[str] | None, Iterator[Item]]
"""Class names, if it has classes, and the images in a fixed order."""


def read_images(images: Mapping[str, Any]) -> Images:
    """Open a collection of images.

    Args:
        images: {scenes} | {folder} | {dataset, name, revision, split, image_column, label_column,
            streaming, shuffle_seed}.

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
    return _folder(Path(images["folder"])) if "folder" in images else _dataset(images)


def images_digests(images: Mapping[str, Any]) -> dict[str, str]:
    """Digests of where images come from, by name."""
    if "scenes" in images:
        return {}
    local = Path(images["folder"] if "folder" in images else images["dataset"])
    if local.is_dir():  # one digest, however many files
        return {str(local): json_digest(folder_digests(local))}
    return {f"dataset:{images['dataset']}": images["revision"]}


def _folder(folder: Path) -> Images:
    """Images of a folder: its subfolders are the classes; without any, images have none."""
    if not folder.is_dir():
        raise UserError(f"images.folder: no such folder: {folder}. Mend the path.")
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    places = [(folder / name, label) for label, name in enumerate(classes)] or [(folder, NO_LABEL)]
    found = [
        (path, label)
        for place, label in places
        for path in sorted(place.rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    if not found:
        raise UserError(
            f"{folder}: expected images ({', '.join(sorted(SUFFIXES))}) in it or in one subfolder a class, "
            "found none. Mend images.folder."
        )
    order = np.random.default_rng(0).permutation(len(found))  # classes mixed, always alike
    items = (
        Item(found[i][0].relative_to(folder).as_posix(), found[i][1], found[i][0].read_bytes())
        for i in order
    )
    return classes or None, items


def _dataset(images: Mapping[str, Any]) -> Images:
    from datasets import ClassLabel, Image

    name, column, label_column = images["dataset"], images["image_column"], images["label_column"]
    rows = hub.open_dataset(images, "images", "images: {folder: PATH}")
    features = rows.features or {}
    for wanted in filter(None, (column, label_column)):
        if features and wanted not in features:
            raise UserError(
                f"{name}: no column {wanted!r}. Columns: {', '.join(features)}. Set image_column and "
                "label_column."
            )
    rows = rows.cast_column(column, Image(decode=False))
    if images["shuffle_seed"] is not None:
        rows = rows.shuffle(seed=images["shuffle_seed"])
    classes, number_of = None, None
    if label_column is not None:
        kind = features.get(label_column)
        if isinstance(kind, ClassLabel):
            classes = list(kind.names)
        elif not images["streaming"]:
            classes = sorted({str(value) for value in rows.unique(label_column)})
            number_of = {value: i for i, value in enumerate(classes)}
        else:
            raise UserError(
                f"{name}: the classes of column {label_column!r} are not named in the data set. Set streaming: "
                "false, so that they can be listed."
            )
    return classes, _dataset_items(rows, images, number_of)


def _dataset_items(
    rows: Any, images: Mapping[str, Any], number_of: Mapping[str, int] | None
) -> Iterator[Item]:
    label_column = images["label_column"]
    for number, row in enumerate(hub.rows_of(rows, images, "images")):
        cell = row[images["image_column"]]
        content = cell["bytes"] or Path(cell["path"]).read_bytes()
        value = NO_LABEL if label_column is None else row[label_column]
        label = NO_LABEL if value is None else number_of[str(value)] if number_of else int(value)
        yield Item(f"{images['split']}-{number}", label, content)


# On the worker processes.


def prepare_image(item: Item, preprocessing: Preprocessing) -> Ready | str:
    """Decode one image, or say why it cannot be."""
    from PIL import Image, UnidentifiedImageError

    if not isinstance(item.content, bytes):
        return _prepare_scene(*item.content, preprocessing)
    try:
        with Image.open(io.BytesIO(item.content)) as image:
            return Ready(_fit(as_rgb(image), preprocessing))
    except UnidentifiedImageError:
        return "no image format that is known"
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        return str(error)


def as_rgb(image: Any) -> Any:
    """The first frame of a PIL image of any mode, upright, on white, as RGB."""
    from PIL import Image, ImageOps

    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 bits and more: what PIL would cut off at 255
        values = np.asarray(image, dtype=np.float64)
        most = 65535 if image.mode.startswith("I") else max(1.0, float(values.max()))
        return Image.fromarray((values / most * 255).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
    return image.convert("RGB")


def _fit(image: Any, preprocessing: Preprocessing) -> np.ndarray:
    """(height, width, 3) uint8: the shorter side resized, the centre cut out."""
    wanted, (width, height) = preprocessing.shorter_side, image.size
    short, long = min(width, height), max(width, height)
    longer = int(wanted * long / short)
    size = (wanted, longer) if width <= height else (longer, wanted)
    resized = image.resize(size, resample=preprocessing.resample)
    left, top = (
        (have - want) // 2
        for have, want in zip(
            resized.size, (preprocessing.width, preprocessing.height), strict=True
        )
    )
    box = (left, top, left + preprocessing.width, top + preprocessing.height)
    return np.asarray(resized.crop(box))


def _prepare_scene(
    params: Mapping[str, Any], number: int, preprocessing: Preprocessing
) -> Ready | str:
    from PIL import Image

    scene = scenes.draw_scene(params, number)
    picture, owner = scenes.render(scene)
    pixels = _fit(Image.fromarray(picture), preprocessing)
    labels = np.array([*map(scene.label_of, scene.things), NO_LABEL], np.int16)
    return Ready(pixels, _cover(labels[owner], preprocessing.grid), len(scene.things))


def _cover(labels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(down, across) int16: what covers most of each patch, if it covers a quarter of it."""
    down, across = grid
    found = np.full(grid, NO_LABEL, np.int16)
    for row, band in enumerate(np.array_split(labels, down)):
        for column, patch in enumerate(np.array_split(band, across, axis=1)):
            seen, counts = np.unique(patch[patch != NO_LABEL], return_counts=True)
            if len(seen) and counts.max() >= patch.size / 4:
                found[row, column] = seen[counts.argmax()]
    return found


def _prepare_all(items: Sequence[Item], preprocessing: Preprocessing) -> list[Ready | str]:
    return [prepare_image(item, preprocessing) for item in items]


# On the process that asks.


def ready_images(
    items: Iterator[Item], preprocessing: Preprocessing, workers: int
) -> Iterator[tuple[Item, Ready | str]]:
    """Each image in order with what it became, decoded ahead by worker processes.

    Memory holds a few handfuls of images for each worker, whatever their number.
    """
    work: Callable[[Sequence[Item]], list[Ready | str]] = partial(
        _prepare_all, preprocessing=preprocessing
    )
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        waiting: deque[tuple[list[Item], Future[list[Ready | str]]]] = deque()
        try:
            while True:
                while len(waiting) < 3 * workers and (group := list(islice(items, _AT_ONCE))):
                    waiting.append((group, pool.submit(work, group)))
                if not waiting:
                    return
                group, future = waiting.popleft()
                yield from zip(group, future.result(), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)


class Unreadable:
    """Images that cannot be read: named in the log, counted, refused beyond a share.

    Args:
        share: the largest share of unreadable images.
        wanted: images asked for.
    """

    def __init__(self, share: float, wanted: int) -> None:
        self.share, self.wanted = share, wanted
        self.seen = 0
        self.ids: list[str] = []

    def add(self, item: Item, why: str | None) -> None:
        """Count an image; `why` says what is wrong with it.

        Raises:
            UserError: there are too many unreadable ones.
        """
        self.seen += 1
        if why is None:
            return
        self.ids.append(item.id)
        logger.warning("%s: cannot be read, left out (%s)", item.id, why)
        if len(self.ids) > self.share * max(self.seen, self.wanted):
            raise UserError(
                f"images: {len(self.ids)} of {self.seen} cannot be read, more than unreadable_share "
                f"({self.share:g}) of them; the last is {item.id} ({why}). Mend the images, or raise "
                "unreadable_share."
            )
