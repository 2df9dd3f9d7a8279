"""The data that a first parameter file is for: its entry of `sources`, and how much of it there is."""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from saeflow.errors import UserError
from saeflow.files import files_below
from saeflow.sources import hub
from saeflow.sources.documents import check_files, is_evaluation, read_documents
from saeflow.sources.images import read_images
from saeflow.sources.models import load_tokenizer
from saeflow.sources.text_files import COMPRESSED, check_encoding
from saeflow.sources.tokenizers import found_token
from saeflow.starter.asked import Asked
from saeflow.starter.model import TOKENIZER, Model

logger = logging.getLogger(__name__)

SHARES = (0.1, 0.2, 0.3, 0.5)
"""Shares of documents or images that may be held out: the first that gives enough contexts to evaluate on."""
_ROOM = 4
"""Contexts of text that are looked at for one that is evaluated."""
_COUNT_S = 60.0
"""Seconds of reading after which no more of the data is counted."""
_AT_ONCE = 64
"""Documents that are tokenised at once."""


def source_of(asked: Asked, model: Model, hook_point: str) -> dict[str, Any]:
    """The entry of `sources`, but for the share that is held out."""
    source: dict[str, Any] = {
        "kind": "vision" if model.is_image else "text",
        "model": dict(model.entry),
        "hook_points": [hook_point],
    }
    if model.is_image:
        source["images"] = (
            {"folder": str(asked.images.resolve())}
            if asked.images
            else _dataset(asked, "image_column")
        )
        source["tokens"] = model.tokens
        return source
    if asked.dataset:
        source["text"] = _dataset(asked, "column")
    else:
        source["text"] = {"files": _files(asked.text), "column": asked.column or "text"}
        if asked.encoding:
            check_encoding(asked.encoding)
            source["text"]["encoding"] = asked.encoding
        check_files(source["text"])
    source["context_length"] = model.length
    return source


def _files(paths: tuple[Path, ...]) -> list[str]:
    """Files of text: those named, and those below folders that are named."""
    found: list[str] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"--text: no such file or folder: {path}. Fix the path.")
        below = files_below(path) if path.is_dir() else [path]
        texts = [one for one in below if _is_text(one)]
        if not texts:
            raise UserError(
                f"--text: expected .txt, .jsonl (also compressed) or .parquet, found none: {path}. Give such files."
            )
        found += [str(one.resolve()) for one in texts]
    return found


def _is_text(path: Path) -> bool:
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
    return suffix in (".txt", ".jsonl") or path.suffix == ".parquet"


def _dataset(asked: Asked, column: str) -> dict[str, Any]:
    name, _, revision = asked.dataset.partition("@")
    if Path(name).exists():
        raise UserError(
            f"--dataset: expected OWNER/NAME of the hub, found a file or folder: {name}. Use --text or --images."
        )
    revision = revision or hub.newest_commit(name, "dataset")
    default = "image" if column == "image_column" else "text"
    return {
        "dataset": name, "revision": revision, "split": "train", column: asked.column or default, "streaming": True
    }  # fmt: skip


def count_contexts(
    source: dict[str, Any], whole: Mapping[str, Any], model: Model, most: int
) -> dict[float, dict[str, int]]:
    """Contexts of each split that the data gives, by the share that is held out; as many as are of use.

    Of a text's evaluation contexts a quarter counts, since those that share a run of tokens with the training split are
    left out later.

    Sets `prepend_bos` of a source whose tokenizer has no such token.
    """
    rows = model.length - (not model.is_image)
    enough = {"train": most // rows + 1, "evaluation": _ROOM * (most // 10 // rows + 1)}
    tokens = {share: {"train": 0, "evaluation": 0} for share in SHARES}
    began = time.monotonic()
    if model.is_image:
        counted, length = _of_images(source), 1
    else:
        if "hub" in model.entry:
            hub.snapshot(model.entry["hub"], model.entry["revision"], list(TOKENIZER))
        tokenizer: Any = load_tokenizer(model.folder)
        if found_token(tokenizer, "eos") is None:
            raise UserError(
                f"--model: its tokenizer has no EOS token, which separates documents: {model.entry}."
            )
        if found_token(tokenizer, "bos") is None:
            source["prepend_bos"] = False
        length = model.length - source.get("prepend_bos", True)
        most_of_one = whole["contexts_per_document"] or math.inf
        counted = _of_text(source, tokenizer, most_of_one * length)
    for sizes in counted:
        for share, split, size in sizes:
            tokens[share][split] += size
        first = tokens[SHARES[0]]
        if all(first[split] >= enough[split] * length for split in enough):
            break
        if time.monotonic() - began > _COUNT_S:
            logger.info("stopped counting the data after %.0f s; there is more", _COUNT_S)
            break
    kept = {"train": 1, "evaluation": 1 if model.is_image else _ROOM}
    return {
        share: {
            split: min(count // length // kept[split], enough[split])
            for split, count in splits.items()
        }
        for share, splits in tokens.items()
    }


def _of_text(
    source: Mapping[str, Any], tokenizer: Any, most: float
) -> Iterator[list[tuple[float, str, int]]]:
    documents = read_documents(source["text"])
    while texts := [document.text for document in islice(documents, _AT_ONCE)]:
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        yield [
            (
                share,
                "evaluation" if is_evaluation(text, share) else "train",
                int(min(len(own) + 1, most)),
            )
            for text, own in zip(texts, ids, strict=True)
            for share in SHARES
        ]


def _of_images(source: Mapping[str, Any]) -> Iterator[list[tuple[float, str, int]]]:
    images = {"name": None, "label_column": None, "shuffle_seed": None, **source["images"]}
    for item in read_images(images)[1]:
        place = int.from_bytes(item.digest[:8], "big") / 2**64
        yield [(share, "evaluation" if place < share else "train", 1) for share in SHARES]
