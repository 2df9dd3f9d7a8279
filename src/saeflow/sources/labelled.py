"""Labelled sets: images with classes that a vision model is to tell apart, decoded to its size."""

import logging
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from saeflow.errors import UserError
from saeflow.files import write_json
from saeflow.sources.images import Item, read_images
from saeflow.sources.pixels import FACTS, IN_TRAIN, write_images
from saeflow.sources.preprocessing import load_preprocessing

logger = logging.getLogger(__name__)


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
