"""Documents, one string each: from a data set, from local files, or the bundled English."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from saeflow.errors import UserError
from saeflow.files import file_digest
from saeflow.sources import BUNDLED, english, hub

logger = logging.getLogger(__name__)

PASSAGE_CHARACTERS = 4000
"""A .txt file is cut into documents at the first blank line after this many characters."""
_PARQUET_ROWS = 1024


def read_documents(text: Mapping[str, Any]) -> Iterator[str]:
    """Documents in a fixed order, read as they are asked for.

    Args:
        text: {bundled: english | python} | {files, column} | {dataset, name, revision, split, column, streaming}.

    Raises:
        UserError: a file is missing or damaged, or has no such column.
    """
    if "bundled" in text:
        yield from english.documents(text["bundled"])
    elif "files" in text:
        for path in map(Path, text["files"]):
            if not path.is_file():
                raise UserError(f"text.files: no such file: {path}. Mend the path.")
            yield from _READERS[path.suffix](path, text["column"])
    else:
        yield from _dataset(text)


def documents_digests(text: Mapping[str, Any]) -> dict[str, str]:
    """Digests of where documents come from, by name."""
    if "bundled" in text:
        return {f"{BUNDLED}{text['bundled']}": english.digest(text["bundled"])}
    if "files" in text:
        return {path: file_digest(Path(path)) for path in text["files"]}
    local = Path(text["dataset"])
    if local.is_dir():
        files = sorted(path for path in local.rglob("*") if path.is_file())
        return {str(path): file_digest(path) for path in files}
    return {f"dataset:{text['dataset']}": text["revision"]}


def document_kinds(text: Mapping[str, Any]) -> np.ndarray | None:
    """The kind of every document by its number, where they are of several known kinds."""
    if text.get("bundled") != "english":
        return None
    count = english.topics()
    kinds = ["language reference"] * count + ["docstrings"] * (len(english.documents()) - count)
    return np.array(kinds)


def is_evaluation(document: str, share: float) -> bool:
    """Whether a document belongs to the evaluation split: decided by its own text alone.

    Equal documents go to the same split; the same document always does, whatever lies around it.
    """
    digest = hashlib.sha256(document.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _no_column(where: str, column: str, found: Any) -> UserError:
    names = ", ".join(map(str, found)) or "none"
    return UserError(f"{where}: no column {column!r} of text. Columns: {names}. Set text.column.")


def _text(path: Path, column: str) -> Iterator[str]:
    """Passages of whole paragraphs; memory is bounded by the longest paragraph."""
    lines: list[str] = []
    size = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip() and size >= PASSAGE_CHARACTERS:
                yield "".join(lines).strip()
                lines, size = [], 0
            lines.append(line)
            size += len(line)
    if rest := "".join(lines).strip():
        yield rest


def _jsonl(path: Path, column: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: expected one JSON object a line, found {error}. Mend the file."
                ) from None
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                raise _no_column(f"{path}, line {number}", column, row)
            yield row[column]


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow.parquet as parquet
    from pyarrow.lib import ArrowInvalid

    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise _no_column(str(path), column, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    if value is not None:
                        yield str(value)
    except ArrowInvalid as error:
        raise UserError(f"{path}: damaged or no Parquet file ({error}). Mend the file.") from None


_READERS = {".txt": _text, ".jsonl": _jsonl, ".parquet": _parquet}


def _dataset(text: Mapping[str, Any]) -> Iterator[str]:
    name, column = text["dataset"], text["column"]
    rows = hub.open_dataset(text, "text", "text: {files: [...]}")
    for row in hub.rows_of(rows, text, "text"):
        if not isinstance(row.get(column), str):
            raise _no_column(name, column, row)
        yield row[column]
