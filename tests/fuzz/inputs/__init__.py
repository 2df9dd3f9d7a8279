"""Inputs from outside that are changed at random: documents, images, SAEs of other libraries, models.

Each change must give the right result or one line that names the file (and the row), within 2 GB. What is right is
known from how the input was made, or from an independent reader. `try_inputs` is deterministic in its seed.
"""

import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import documents, images, models, saes
from .reading import WrongError


@dataclass(frozen=True)
class Kind:
    """A kind of input: makes one, reads it, and raises WrongError where that is not as it should be."""

    share: int
    """Share of a hundred inputs."""
    check: Callable[[random.Random, Path], None]


KINDS: dict[str, Kind] = {
    "jsonl": Kind(22, documents.jsonl),
    "txt": Kind(7, documents.plain_text),
    "parquet": Kind(15, documents.parquet),
    "image": Kind(20, images.image),
    "image folder": Kind(5, images.image_folder),
    "SAELens SAE": Kind(11, saes.saelens),
    "dictionary_learning SAE": Kind(7, saes.dictionary_learning),
    "tokenizer": Kind(6, models.tokenizer),
    "image processor": Kind(5, models.processor),
    "model": Kind(2, models.model_files),
}


def try_inputs(count: int, seed: int, on_wrong: Callable[[str, int, str], None]) -> dict[str, int]:
    """Try `count` inputs; returns how many of each kind.

    Args:
        count: inputs in all.
        seed: of the whole campaign.
        on_wrong: told kind, number and what is wrong; `try_one` repeats it.
    """
    tried = {}
    for name, kind in KINDS.items():
        tried[name] = max(1, round(count * kind.share / sum(k.share for k in KINDS.values())))
        for number in range(tried[name]):
            try:
                try_one(name, seed, number)
            except WrongError as error:
                on_wrong(name, number, str(error))
    return tried


def try_one(name: str, seed: int, number: int) -> None:
    """One input of a kind.

    Raises:
        WrongError: what is wrong with how it was read.
    """
    folder = Path(tempfile.mkdtemp(prefix="saeflow-input-"))
    try:
        KINDS[name].check(random.Random(f"{seed} {name} {number}"), folder)
    finally:
        shutil.rmtree(folder)
