"""Vision sources: a CLIP model looks at images.

Images are decoded once, to the model's own size, when inputs are prepared; the step that runs the model
then reads pixels mapped from disk and never waits for a decoder.
"""

import csv
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saeflow.errors import UserError
from saeflow.files import read_json, write_json
from saeflow.sources.base import Column, positions
from saeflow.sources.decoding import Ready, Unreadable, ready_images
from saeflow.sources.images import NO_LABEL, Images, Item, images_digests, read_images
from saeflow.sources.layouts import EMBEDDING, check_hook_points
from saeflow.sources.model_source import ModelSource
from saeflow.sources.preprocessing import Preprocessing, load_preprocessing, normalised

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

FACTS = "images.json"
_LOG_EVERY_S = 30


def check(name: str, params: Mapping[str, Any], folder: Path) -> None:
    """Check hook points as far as they can be told before the model is fetched."""
    check_hook_points(name, params, folder)
    if EMBEDDING in params["hook_points"] and params["tokens"] != "cls":
        raise UserError(
            f"sources.{name}.tokens: expected cls with {EMBEDDING}, which is one vector an image, found "
            f"{params['tokens']}. Set tokens: cls, or make it a source of its own."
        )


def external_inputs(params: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the images."""
    return images_digests(params["images"])


def open_source(params: Mapping[str, Any], folder: Path, device: str) -> "VisionSource":
    """Open the model and the pixels in `folder`."""
    return VisionSource(params, folder, device)


def rows_per_context(params: Mapping[str, Any], preprocessing: Preprocessing) -> int:
    """Rows that each image gives: the CLS token, its patches, or both."""
    down, across = preprocessing.grid
    return {"all": down * across + 1, "cls": 1, "patches": down * across}[params["tokens"]]


def prepare_inputs(
    params: Mapping[str, Any],
    rows: Mapping[str, int],
    model: Path,
    folder: Path,
    workers: int = 1,
) -> dict[str, Any]:
    """Decode the images of both splits to the model's size; memory stays bounded.

    An image's own bytes decide its split, so that equal images share one.

    Args:
        params: a vision source.
        rows: rows asked for by split, rounded up to whole images.
        model: the folder that `fetch_model` wrote.
        folder: written, by split: `{split}.npy` (images, height, width, 3) uint8, `{split}.csv` with
            id and label of each, of scenes `{split}_objects.npy` (images,) and `{split}_cover.npy`
            (images, down, across), the class of the object on each patch; and images.json.
        workers: processes that decode.

    Returns:
        What was read, for the record: `images` by split, and `left_out`, how many by the reason.

    Raises:
        UserError: too few images, or too many that cannot be read.
    """
    preprocessing = load_preprocessing(model)
    wanted = {s: math.ceil(n / rows_per_context(params, preprocessing)) for s, n in rows.items()}
    left_out: Counter[str] = Counter()
    images = read_images(params["images"], left_out)

    def split_of(item: Item) -> str:
        share = int.from_bytes(item.digest[:8], "big") / 2**64
        return "evaluation" if share < params["evaluation_share"] else "train"

    written = write_images(
        images,
        split_of,
        wanted,
        preprocessing,
        params["unreadable_share"],
        workers,
        folder,
        left_out,
    )
    write_json(folder / FACTS, {"classes": images[0], "unreadable": written.unreadable})
    return {"images": written.images, "left_out": dict(left_out)}


def prepare_labelled(
    labelled: Mapping[str, Any], model: Path, folder: Path, workers: int = 1
) -> dict[str, Any]:
    """Decode a labelled set's images, at most so many of each class.

    Where train and test are one collection, no image of test is one of train, byte by byte: they share it out.
    Of two collections, images that stand in both are counted.

    Args:
        labelled: an entry of `evaluation.labelled_sets`: train and test (images), per_class,
            unreadable_share, templates, class_names.
        model: the folder that `fetch_model` wrote.
        folder: written: as `prepare_inputs` does, with the splits train and test; images.json has the
            classes and the templates too.

    Returns:
        What was read, for the record: `images` by split, `left_out`, how many by the reason, and `in_both`, the
        images of test that are images of train too.

    Raises:
        UserError: images without classes, different ones in train and test, a class without images, or
            templates that take no class name.
    """
    preprocessing = load_preprocessing(model)
    left_out: Counter[str] = Counter()
    found = {split: read_images(labelled[split], left_out) for split in ("train", "test")}
    classes = found["train"][0] or []
    for split, (own, _) in found.items():
        where = f"labelled_sets: {split}"
        if own is None:
            raise UserError(
                f"{where}: expected images with classes, found none. Give label_column, or a folder with "
                "one subfolder a class."
            )
        if own != classes:
            raise UserError(
                f"{where}: expected the classes {_some(classes)}, found {_some(own)}. Train and test must have the "
                "same classes in the same order."
            )
    if labelled["class_names"] is not None:
        classes = _named(classes, labelled["class_names"])
    for template in labelled["templates"]:
        if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
            raise UserError(
                f"labelled_sets.templates: expected one {{}} for the class in each, found {template!r}."
            )
    read: dict[str, int] = {}
    is_one = labelled["train"] == labelled["test"]
    in_train: set[bytes] = set()
    in_both = 0
    for split, images in found.items():
        written = write_images(
            images, partial(_unless_in, in_train if is_one else set(), split), {split: None}, preprocessing, labelled["unreadable_share"],
            workers, folder, left_out, labelled["per_class"][split],
        )  # fmt: skip
        if missing := [name for i, name in enumerate(classes) if not written.of_class[i]]:
            again = left_out[IN_TRAIN]
            raise UserError(
                f"labelled_sets: {split}: no images of {len(missing)} of {len(classes)} classes, such as "
                f"{missing[0]}{f' ({again} are images of train too)' if again else ''}. Give images of every "
                "class, which are not all taken for train (per_class)."
            )
        read |= written.images
        in_both = len(in_train & written.digests)
        in_train |= written.digests
    if in_both:
        logger.warning("labelled_sets: %d images of test are images of train too", in_both)
    names = [name.replace("_", " ") for name in classes]
    totals = {f"{split}_images": count for split, count in read.items()}
    write_json(
        folder / FACTS, {"classes": names, **totals, "templates": list(labelled["templates"])}
    )
    return {"images": read, "left_out": dict(left_out), "in_both": in_both}


def _named(classes: list[str], names: list[str]) -> list[str]:
    """Names given to classes by their order, where that order is beyond doubt.

    Raises:
        UserError: too few or too many names, or classes that can be counted in two ways.
    """
    where = "labelled_sets.class_names"
    if len(names) != len(classes):
        raise UserError(
            f"{where}: expected the classes {_some(classes)}, found {_some(names)}. Give a name for each class, in "
            "their order."
        )
    if sorted(names) == sorted(classes) and names != classes:
        raise UserError(
            f"{where}: they are the names of the classes in another order: {_some(names)}, not {_some(classes)}. "
            "Set class_names: null."
        )
    if all(re.fullmatch(r"-?[0-9]+", name) for name in classes):
        values = [int(name) for name in classes]
        if values != list(range(values[0], values[0] + len(values))):
            raise UserError(
                f"{where}: the classes are the numbers {_some(classes)}, with gaps between, so that a name cannot be told "
                "by its place. Name the classes in the data, or give images of all of them."
            )
    elif sorted(classes, key=_natural) != classes:
        raise UserError(
            f"{where}: the classes {_some(classes)} have another order as text than by their numbers. Pad the numbers "
            "with zeros (class_02), or set class_names: null."
        )
    return names


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts the numbers inside names by value."""
    parts = re.split(r"([0-9]+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _unless_in(others: set[bytes], split: str, item: Item) -> str | None:
    """The split of an image, None where it is one of some others."""
    return None if others and item.digest in others else split


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" ... ({len(names)})" if len(names) > 3 else "")


IN_TRAIN = "an image of train"


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
        """Where an image is wanted, None where it is not."""
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


class VisionSource(ModelSource):
    """Activations of CLIP's image tower at its hook points, image by image.

    Position 0 is the CLS token (or the embedding), position 1 + i the i-th patch, row by row.

    Args:
        params: a vision source.
        folder: results/sources/NAME, with model/ and inputs/.
        device: where the model runs.
    """

    def __init__(self, params: Mapping[str, Any], folder: Path, device: str) -> None:
        self.preprocessing = load_preprocessing(folder / "model")
        n_rows = rows_per_context(params, self.preprocessing)
        super().__init__(params, folder, device, positions(params), n_rows)
        names = ["label"] + (["objects", "cover"] if "scenes" in params["images"] else [])
        self._names = names
        self.columns: dict[str, Column] = {
            "context": (np.dtype(np.int64), ()),
            "position": (np.dtype(np.int32), ()),
            **{name: (np.dtype(np.int32), ()) for name in names},
        }

    @cached_property
    def d_in(self) -> dict[str, int]:
        """Width of the activations by hook point."""
        from saeflow.sources.models import load_config

        config = load_config(self.folder / "model")
        widths = {EMBEDDING: int(config.projection_dim)}
        return {
            name: widths.get(name, int(config.vision_config.hidden_size))
            for name in self.hook_points
        }

    def model_input(self, inputs: "Tensor") -> "Tensor":
        """(n, 3, height, width) normalised pixels."""
        return normalised(inputs, self.preprocessing)

    def known(self, split: str, start: int, stop: int) -> dict[str, np.ndarray]:
        """Return each row's class of image; of scenes also its objects and the class of the one it shows."""
        columns = {}
        for name in self._names:
            path = self.folder / "inputs" / f"{split}_{'labels' if name == 'label' else name}.npy"
            values = np.load(path, mmap_mode="r")[start:stop].astype(np.int32)
            if name == "cover":
                patches = values.reshape(len(values), -1)
                cls = np.full((len(values), 1), NO_LABEL, np.int32)
                columns[name] = np.concatenate([cls, patches], 1)[:, self.positions]
            else:
                columns[name] = np.repeat(values[:, None], self.rows_per_context, axis=1)
        return columns


def image_facts(folder: Path) -> dict[str, Any]:
    """Classes (and templates) of prepared images."""
    return dict(read_json(folder / FACTS))
