"""Documents in every encoding, compression and format, with cells that are no text."""

import gzip
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .reading import (
    REFUSED,
    SPECIAL_TEXT,
    WrongError,
    demand,
    nasty,
    other_json,
    read,
    rotten,
    said,
)


def documents_of(path: Path, **options: Any) -> list[str]:
    from saeflow.sources.documents import read_documents

    text = {"files": [str(path)], "column": "text", **options}
    return [document.text for document in read_documents(text)]


def is_whole(text: str) -> bool:
    """Return whether a text has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def jsonl(rng: random.Random, folder: Path) -> None:
    """JSONL in some encoding and compression, some cells no text, some lines damaged."""
    cells: list[Any] = [rng.choice(SPECIAL_TEXT) + str(i) for i in range(rng.randint(1, 12))]
    if rng.random() < 0.6:
        cells[rng.randrange(len(cells))] = nasty(rng)
    rows = [{"id": i, "text": cell} for i, cell in enumerate(cells)]
    if rng.random() < 0.1:
        rows[rng.randrange(len(rows))] = other_json(rng, {"text": "a", "id": 1}, 1)
    is_ascii = rng.random() < 0.5
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    lines = [
        line if is_whole(line) and not is_ascii else json.dumps(row)
        for line, row in zip(lines, rows, strict=True)
    ]
    if rng.random() < 0.05:
        lines[rng.randrange(len(lines))] = rng.choice(["[" * 50_000, '{"text": ' + "[" * 50_000, "", "x", "1", '"text"', "{}"])  # fmt: skip
    end = rng.choice(["\n", "\n", "\r\n"])
    text = end.join(lines) + rng.choice(["", end])
    try:
        data = text.encode(rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"]))
    except UnicodeEncodeError:
        data = text.encode()
    damaged = rng.random() < 0.3
    if damaged:
        data = rotten(rng, data)
    suffix = rng.choice(["", "", ".gz"])
    if suffix:
        data = gzip.compress(data, mtime=0)
        if rng.random() < 0.3:
            data = rotten(rng, data)
            damaged = True
    path = folder / f"a.jsonl{suffix}"
    path.write_bytes(data)
    with said() as log:
        found = read(lambda: documents_of(path), path)
    expected = _jsonl_by_json(data if not suffix else _unzipped(data))
    if expected is None or found is REFUSED:
        demand(
            damaged or found is REFUSED or expected is not None,
            f"read {str(found)[:100]} where a line or cell is no text",
        )
        if found is REFUSED and expected is not None and not damaged:
            raise WrongError("refused text that is whole")
        return
    texts = [cell for cell in expected if cell and is_whole(cell)]
    demand(found == texts, f"expected {str(texts)[:200]}, found {str(found)[:200]}")
    if len(texts) < len(expected):
        demand(any("left out" in line for line in log), "cells are left out and the log is silent")


def _unzipped(data: bytes) -> bytes | None:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, ValueError):
        return None
    except Exception as error:  # zlib.error
        if type(error).__name__ != "error":
            raise
        return None


def _jsonl_by_json(data: bytes | None) -> list[str | None] | None:
    """Cells by Python's own codecs and JSON, None where any line has no cell of text or null."""
    if data is None:
        return None
    text = None
    marks = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    for codec in [next((c for mark, c in marks.items() if data.startswith(mark)), "utf-8")]:
        try:
            text = data.decode(codec)
        except UnicodeDecodeError:
            return None
    cells: list[str | None] = []
    for line in re.split(r"\r\n|\r|\n", text or ""):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(row, dict) or "text" not in row:
            return None
        if row["text"] is not None and not isinstance(row["text"], str):
            return None
        cells.append(row["text"])
    return cells


def plain_text(rng: random.Random, folder: Path) -> None:
    """A .txt in some encoding: no character is lost or made up."""
    text = "\n\n".join(rng.choice(SPECIAL_TEXT[3:8]) for _ in range(rng.randint(1, 9)))
    codec = rng.choice(["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252"])
    try:
        data = text.encode(codec)
    except UnicodeEncodeError:
        codec, data = "utf-8", text.encode()
    damaged = rng.random() < 0.4
    data = rotten(rng, data) if damaged else data
    path = folder / "a.txt"
    path.write_bytes(data)
    found = read(lambda: documents_of(path), path)
    if found is REFUSED:
        is_utf8 = codec.startswith("utf") or text.isascii()
        demand(damaged or not is_utf8, f"refused text in {codec}")
        return
    if not damaged:
        expected, there = ("".join("".join(t).split()) for t in (text, found))
        demand(there == expected, f"{codec}: expected {expected[:80]!r}, found {there[:80]!r}")


def parquet(rng: random.Random, folder: Path) -> None:
    """Parquet columns of every type, with nulls, whole or damaged (pages bear checksums)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    words = [rng.choice(SPECIAL_TEXT[:-2]) + str(i) for i in range(rng.randint(1, 20))]
    texts: list[str | None] = [None if rng.random() < 0.1 else word for word in words]
    columns: dict[str, Callable[[], Any]] = {
        "string": lambda: pa.array(texts, pa.string()),
        "large_string": lambda: pa.array(texts, pa.large_string()),
        "dictionary": lambda: pa.array(texts, pa.string()).dictionary_encode(),
        "string_view": lambda: pa.array(texts, pa.string_view()),
        "null": lambda: pa.nulls(len(texts)),
        "int": lambda: pa.array(range(len(texts))),
        "float": lambda: pa.array([float(i) for i in range(len(texts))]),
        "bool": lambda: pa.array([i % 2 == 0 for i in range(len(texts))]),
        "binary": lambda: pa.array([b"bytes"] * len(texts), pa.binary()),
        "token ids": lambda: pa.array([[1, 2, 3]] * len(texts)),
        "strings": lambda: pa.array([["a", "b"]] * len(texts)),
        "messages": lambda: pa.array([[{"role": "user", "content": "hi"}]] * len(texts)),
        "timestamp": lambda: pa.array([0] * len(texts), pa.timestamp("s")),
    }
    kind = rng.choice([*columns, "string", "string", "string"])
    table = pa.table({"text": columns[kind](), "other": pa.array(words)})
    path = folder / "a.parquet"
    codec = rng.choice(["snappy", "zstd", "none"])
    pq.write_table(
        table, path, compression=codec, write_page_checksum=True, row_group_size=rng.choice([3, 100]),
        use_dictionary=rng.random() < 0.5,
    )  # fmt: skip
    damaged = rng.random() < 0.5
    if damaged:
        path.write_bytes(rotten(rng, path.read_bytes()))
    found = read(lambda: documents_of(path), path)
    is_text = kind in ("string", "large_string", "dictionary", "string_view", "null")
    if found is REFUSED:
        demand(damaged or not is_text, f"refused a column of type {kind}")
        return
    demand(damaged or is_text, f"read a column of type {kind} as text: {found[:2]}")
    expected = [] if kind == "null" else [text for text in texts if text is not None]
    if not damaged or len(found) == len(expected):
        demand(damaged or found == expected, f"expected {expected[:3]}, found {found[:3]}")
