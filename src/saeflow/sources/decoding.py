"""Decode images on worker processes, to the pixels that a model is given.

Whatever an image is (grey, palette, alpha, 16 bits, CMYK, animated, turned by EXIF), it comes out as RGB of
the model's size; what cannot be read is named, counted and skipped, up to a stated share.
"""

import io
import logging
import multiprocessing
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import Any

import numpy as np

from saeflow.errors import UserError
from saeflow.sources import scenes
from saeflow.sources.images import NO_LABEL, Item
from saeflow.sources.preprocessing import Preprocessing, fit

logger = logging.getLogger(__name__)

_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats that are decoded."""
MOST_PIXELS = 1 << 26
"""An image whose header says more is not decoded, so that a worker stays below 2 GB."""
_AT_ONCE = 8
"""Images a worker is handed at once."""
_WHITE = (255, 255, 255, 255)
_NAMED = 3
"""Examples in a message."""


@dataclass(frozen=True)
class Ready:
    """A decoded image."""

    pixels: np.ndarray  # (height, width, 3) uint8
    cover: np.ndarray | None = (
        None  # (down, across) int16: class of the object on each patch of a scene
    )
    objects: int = 0


# On the worker processes.


_DAMAGED = (
    OSError, ValueError, SyntaxError, EOFError, TypeError, AttributeError, LookupError, OverflowError, RuntimeError,
    MemoryError, ZeroDivisionError, struct.error, zlib.error,
)  # fmt: skip
"""Errors that Pillow raises at damaged files and their EXIF."""


@cache
def _formats() -> list[str]:
    from PIL import Image

    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def prepare_image(item: Item, preprocessing: Preprocessing) -> Ready | str:
    """Decode one image, or say why it cannot be."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(item.content, str):
        return item.content
    if not isinstance(item.content, bytes):
        return _prepare_scene(*item.content, preprocessing)
    try:
        with Image.open(io.BytesIO(item.content), formats=_formats()) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                return f"{width} x {height} pixels, more than {MOST_PIXELS} in all"
            rgb = as_rgb(image)
    except UnidentifiedImageError:
        return "no image format that is known"
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        return f"{type(error).__name__}: {error}"
    return Ready(fit(rgb, preprocessing))


def as_rgb(image: Any) -> Any:
    """The first frame of a PIL image of any mode, upright, on white, as RGB."""
    from PIL import Image, ImageOps

    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 bits and more: what PIL would cut off at 255
        values = np.array(image, dtype=np.float64)
        most = 65535 if image.mode.startswith("I") else max(1.0, float(values.max()))
        values /= most  # in place, to keep memory low
        values *= 255
        return Image.fromarray(values.clip(0, 255, out=values).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
    return image.convert("RGB")


def _prepare_scene(
    params: Mapping[str, Any], number: int, preprocessing: Preprocessing
) -> Ready | str:
    from PIL import Image

    scene = scenes.draw_scene(params, number)
    picture, owner = scenes.render(scene)
    pixels = fit(Image.fromarray(picture), preprocessing)
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
                try:
                    ready = future.result()
                except BrokenProcessPool:
                    some = ", ".join(item.id for item in group[:_NAMED])
                    raise UserError(
                        f"images: a process that decodes ended (at {some} ...), mostly for lack of memory. Give fewer "
                        "threads, or take the image out."
                    ) from None
                yield from zip(group, ready, strict=True)
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
                f"({self.share:g}) of them; the last is {item.id} ({why}). Fix the images, or raise "
                "unreadable_share."
            )
