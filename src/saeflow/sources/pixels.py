"""Decoded images of each split, appended to files as they come."""

import csv
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from saeflow.errors import UserError
from saeflow.files import read_json
from saeflow.sources.decoding import Ready, Unreadable, ready_images
from saeflow.sources.images import NO_LABEL, Images, Item
from saeflow.sources.preprocessing import Preprocessing

logger = logging.getLogger(__name__)

FACTS = "images.json"
IN_TRAIN = "an image of train"
_LOG_EVERY_S = 30


def image_facts(folder: Path) -> dict[str, Any]:
    """Classes (and templates) of prepared images."""
    return dict(read_json(folder / FACTS))


@dataclass(frozen=True)
class Written:
    """Images that were written."""

    images: dict[str, int]
    """By split."""
    of_class: list[int]
    unreadable: list[str]
    """Ids of those that cannot be read."""
    digests: set[bytes]
    """SHA-256 of what makes each the same as another, of sets with so many of each class."""


def write_images(
    images: Images,
    split_of: Callable[[Item], str | None],
    wanted: Mapping[str, int | None],
    preprocessing: Preprocessing,
    unreadable_share: float,
    workers: int,
    folder: Path,
    left_out: Counter[str],
    per_class: int | None = None,
) -> Written:
    """Write the first readable images of each split, in order.

    Args:
        split_of: the split of an image; None where it is an image of train, and left out.
        wanted: images by split; None: as many as there are.
        left_out: counts the images that are not written, by the reason.
        per_class: at most so many of each class; images without one are left out.

    Raises:
        UserError: too few images, or too many that cannot be read.
    """
    classes, items = images
    writers = {split: PixelWriter(folder, split, n) for split, n in wanted.items()}
    unreadable = Unreadable(unreadable_share, sum(n or 0 for n in wanted.values()))
    counts = [0] * len(classes or [])
    logged = time.monotonic()
    digests: set[bytes] = set()
    own: Counter[str] = Counter()

    def writer_of(item: Item) -> PixelWriter | None:
        """Place of a wanted image, None for one that is not wanted."""
        if per_class is not None and (item.label == NO_LABEL or counts[item.label] >= per_class):
            return None
        split = split_of(item)
        writer = None if split is None else writers.get(split)
        return None if writer is None or writer.is_full else writer

    def done() -> bool:
        full = all(writer.is_full for writer in writers.values())
        return full or (per_class is not None and all(n >= per_class for n in counts))

    def offered() -> Iterator[Item]:
        for item in takewhile(lambda _: not done(), items):
            own["without a class"] += per_class is not None and item.label == NO_LABEL
            own[IN_TRAIN] += split_of(item) is None
            if writer_of(item):
                yield item

    for item, ready in ready_images(offered(), preprocessing, workers):
        unreadable.add(item, ready if isinstance(ready, str) else None)
        writer = writer_of(item)  # decoding runs ahead of what is still wanted
        if isinstance(ready, Ready) and writer is not None:
            writer.add(item, ready)
            if item.label != NO_LABEL:
                counts[item.label] += 1
            if per_class is not None:
                digests.add(item.digest)
        if time.monotonic() - logged > _LOG_EVERY_S:
            logged = time.monotonic()
            logger.info("%s", ", ".join(map(str, writers.values())))
    for split, writer in writers.items():
        if not writer.count and own[IN_TRAIN]:
            raise UserError(
                f"labelled_sets: {split}: every image is one of train too. Give other images, or take fewer for train "
                "(per_class)."
            )
        writer.close()
    logger.info("%s; %d unreadable", ", ".join(map(str, writers.values())), len(unreadable.ids))
    own["unreadable"] = len(unreadable.ids)
    left_out.update(own := +own)
    for reason, number in own.items():
        logger.warning("%d images are left out: %s", number, reason)
    images_of = {split: writer.count for split, writer in writers.items()}
    return Written(images_of, counts, unreadable.ids, digests)


class PixelWriter:
    """The images of one split, appended to files as they come.

    Args:
        folder: where `{split}.npy`, `{split}.csv` and the truth of scenes go.
        split: their name.
        wanted: how many; None for as many as come.
    """

    def __init__(self, folder: Path, split: str, wanted: int | None) -> None:
        self.split, self.wanted = split, wanted
        self.count = 0
        self._folder = folder
        self._pixels = (folder / f"{split}.npy").open("wb")
        self._table = (folder / f"{split}.csv").open("w", newline="", encoding="utf-8")
        self._rows = csv.writer(self._table, lineterminator="\n")
        self._rows.writerow(["context", "id", "label"])
        self._labels: list[int] = []
        self._truth: list[Ready] = []
        self._shape: tuple[int, ...] = ()

    @property
    def is_full(self) -> bool:
        return self.wanted is not None and self.count >= self.wanted

    def __str__(self) -> str:
        return (
            f"{self.split}: {self.count}"
            + (f" of {self.wanted}" if self.wanted else "")
            + " images"
        )

    def add(self, item: Item, ready: Ready) -> None:
        """Append one image."""
        if not self.count:
            self._shape = ready.pixels.shape
            self._header()
        self._pixels.write(np.ascontiguousarray(ready.pixels).tobytes())
        self._rows.writerow([self.count, item.id, item.label])
        self._labels.append(item.label)
        if ready.cover is not None:
            self._truth.append(Ready(np.empty(0), ready.cover, ready.objects))
        self.count += 1

    def _header(self) -> None:
        """The array's header, whose length does not depend on the number of images."""
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *self._shape)}
        self._pixels.seek(0)
        np.lib.format.write_array_header_1_0(self._pixels, header)

    def close(self) -> None:
        """Put everything on disk.

        Raises:
            UserError: there were too few images.
        """
        if not self.count or (self.wanted is not None and not self.is_full):
            raise UserError(
                f"images: they give {self.count} of the {self.split} split, {self.wanted or 'some'} are "
                f"asked for. Lower {self.split}_rows in stores, change evaluation_share, or add images."
            )
        self._header()
        self._pixels.close()
        self._table.close()
        np.save(self._folder / f"{self.split}_labels.npy", np.array(self._labels, np.int32))
        if self._truth:
            covers = np.stack([ready.cover for ready in self._truth if ready.cover is not None])
            objects = np.array([ready.objects for ready in self._truth], np.int32)
            np.save(self._folder / f"{self.split}_cover.npy", covers)
            np.save(self._folder / f"{self.split}_objects.npy", objects)
