"""Documents, one string each: from a data set, from local files, or the bundled English."""

import hashlib
import heapq
import json
import logging
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saeflow.errors import UserError
from saeflow.files import file_digest, files_below
from saeflow.sources import BUNDLED, english, hub
from saeflow.sources.text_files import COMPRESSED, content_size, read_lines

logger = logging.getLogger(__name__)

PASSAGE_CHARACTERS = 4000
"""A .txt file is cut into documents at the first blank line after this many characters."""
_PARQUET_ROWS = 1024

SHUFFLE_CHARACTERS = 1 << 24
"""Documents are drawn at random from so many characters of those that were read; a smaller text is shuffled whole."""

_OPEN_FILES = 64
"""Files that are read in turn; of more, the next is opened where one ends."""


class Document(NamedTuple):
    """A document, and the file or data set that it is of."""

    text: str
    file: str


class Cell(NamedTuple):
    """A document's place and its text; None for a null."""

    file: str
    unit: str  # what is counted in the file: row, line, passage
    number: int  # from 1 on; 0 stands for a file that holds none
    text: str | None
    share: float = 0.0  # of the file's content that was read for it, about

    @property
    def place(self) -> str:
        return f"{self.file}, {self.unit} {self.number}" if self.number else self.file


def read_documents(
    text: Mapping[str, Any], left_out: Counter[str] | None = None
) -> Iterator[Document]:
    """Documents in a fixed order, read as they are asked for.

    Of several files, documents are taken in turn, so that at any moment each file has been read to the same
    share of its content: rows of Parquet, bytes of text, those of a compressed file at the ratio of its beginning.

    Args:
        text: {bundled: english | python} | {files, column, encoding} |
            {dataset, name, revision, split, column, streaming}.
        left_out: counts what is no document, by the reason, as it is met.

    Raises:
        UserError: a file is missing or damaged, has no such column, or one that does not hold text.
    """
    counts = Counter[str]() if left_out is None else left_out
    if "bundled" in text:
        kind = text["bundled"]
        counts.update(english.left_out(kind))
        yield from (Document(one, f"{BUNDLED}{kind}") for one in english.documents(kind))
    else:
        yield from _only_text(_files(text) if "files" in text else _dataset(text), counts)


def shuffled(documents: Iterable[Document], seed: int) -> Iterator[tuple[int, Document]]:
    """Documents with the numbers of the order that they come in, in random order; memory stays bounded."""
    random = np.random.default_rng(seed)
    waiting: list[tuple[int, Document]] = []
    characters = 0

    def draw() -> tuple[int, Document]:
        place = int(random.integers(len(waiting)))
        waiting[place], waiting[-1] = waiting[-1], waiting[place]
        return waiting.pop()

    for numbered in enumerate(documents):
        waiting.append(numbered)
        characters += len(numbered[1].text)
        while characters > SHUFFLE_CHARACTERS:
            drawn = draw()
            characters -= len(drawn[1].text)
            yield drawn
    while waiting:
        yield draw()


def _only_text(cells: Iterable[Cell], left_out: Counter[str]) -> Iterator[Document]:
    """The documents among some cells; what is left out, and what was lost before, is named in the log."""
    noted: Counter[str] = Counter()
    first: dict[str, str] = {}
    before = Counter(left_out)
    try:
        for cell in cells:
            if reason := _no_document(cell):
                left_out[reason] += 1
                first.setdefault(reason, cell.place)
                continue
            document = str(cell.text)
            for sign, what in _SIGNS.items():
                if sign in document:
                    noted[what] += 1
                    first.setdefault(what, cell.place)
            yield Document(document, cell.file)
    finally:
        for reason, number in (left_out - before).items():
            logger.warning(
                "text: %d documents: %s, left out; the first is %s", number, reason, first[reason]
            )
        for what, number in noted.items():
            logger.warning("text: %d documents: %s; the first is %s", number, what, first[what])


def _no_document(cell: Cell) -> str | None:
    """Why a cell is left out; None where it is not."""
    text = cell.text
    if cell.number == 0:
        return "a file without any"
    if text is None:
        return "null"
    if not text:
        return "empty"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair"  # which no tokenizer takes
    return None


_SIGNS = {
    "\ufffd": "with U+FFFD, in the place of characters that were lost before",
    "\ufeff": "with U+FEFF, a byte order mark, inside",
}


def _files(text: Mapping[str, Any]) -> Iterator[Cell]:
    """Cells of all files in turn: the next one is of the file that has been read to the smallest share."""
    paths = [Path(name) for name in text["files"]]
    check_files(text)
    if len(paths) > _OPEN_FILES:  # the first ones are no better sample than any others
        paths = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))]
    waiting = iter(enumerate(paths))
    turns: list[tuple[float, int, Iterator[Cell]]] = []

    def open_next() -> None:
        for number, path in islice(waiting, 1):
            start = turns[0][0] if turns else 0.0
            heapq.heappush(turns, (start, number, _cells(path, text)))

    for _ in range(_OPEN_FILES):
        open_next()
    while turns:
        share, number, cells = heapq.heappop(turns)
        cell = next(cells, None)
        if cell is None:
            open_next()
            continue
        yield cell
        heapq.heappush(turns, (share + cell.share, number, cells))


def check_files(text: Mapping[str, Any]) -> None:
    """Check that each file is there and begins with text in the column that is named.

    Raises:
        UserError: one does not.
    """
    for path in map(Path, text["files"]):
        if not path.is_file():
            raise UserError(f"text.files: no such file: {path}. Fix the path.")
        cells = _cells(path, text)
        next(cells, None)
        cells.close()


def _cells(path: Path, text: Mapping[str, Any]) -> Generator[Cell]:
    """Cells of a file; of one that holds none, a cell that says so."""
    cells = _cells_of(path, text)
    yield next(cells, None) or Cell(str(path), "file", 0, "", 1.0)
    yield from cells


def _cells_of(path: Path, text: Mapping[str, Any]) -> Generator[Cell]:
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
    if suffix == ".parquet":
        return _parquet(path, text["column"])
    read = _jsonl if suffix == ".jsonl" else _text
    return read(path, text["column"], text.get("encoding"))


def documents_digests(text: Mapping[str, Any]) -> dict[str, str]:
    """Digests of where documents come from, by name."""
    if "bundled" in text:
        return {f"{BUNDLED}{text['bundled']}": english.digest(text["bundled"])}
    if "files" in text:
        return {path: file_digest(Path(path)) for path in text["files"]}
    local = Path(text["dataset"])
    if local.is_dir():
        return {str(path): file_digest(path) for path in files_below(local)}
    return {f"dataset:{text['dataset']}": text["revision"]}


def document_kinds(text: Mapping[str, Any]) -> np.ndarray | None:
    """The kind of every document by its number, where they are of several known kinds."""
    if text.get("bundled") != "english":
        return None
    count = english.topics()
    kinds = ["language reference"] * count + ["docstrings"] * (len(english.documents()) - count)
    return np.array(kinds)


def is_evaluation(document: str, share: float) -> bool:
    """Return whether a document belongs to the evaluation split; its own text alone decides.

    Equal documents go to the same split; the same document always does, whatever lies around it.
    """
    digest = hashlib.sha256(document.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _no_column(where: str, column: str, found: Any) -> UserError:
    names = ", ".join(map(str, found)) or "none"
    return UserError(f"{where}: no column {column!r} of text. Columns: {names}. Set text.column.")


def _not_text(where: str, column: str, found: str, columns: Iterable[str] = ()) -> UserError:
    """The error for a column that holds something else than text."""
    others = ", ".join(name for name in columns if name != column)
    return UserError(
        f"{where}: expected text in column {column!r}, found {found}. Set text.column to a column of text"
        f"{f' (there are also: {others})' if others else ''}, or write its text into one first (such as chat "
        "messages joined, token ids decoded)."
    )


def _text(path: Path, column: str, encoding: str | None) -> Generator[Cell]:
    """Passages of whole paragraphs; memory is bounded by the longest paragraph."""
    lines: list[str] = []
    size, number, whole = 0, 1, content_size(path)
    for line in read_lines(path, encoding):
        if not line.strip() and size >= PASSAGE_CHARACTERS:
            passage = "".join(lines)
            yield Cell(str(path), "passage", number, passage.strip(), _bytes(passage) / whole)
            lines, size, number = [], 0, number + 1
        lines.append(line)
        size += len(line)
    if rest := "".join(lines).strip():
        yield Cell(str(path), "passage", number, rest, _bytes(rest) / whole)


def _jsonl(path: Path, column: str, encoding: str | None) -> Generator[Cell]:
    place, whole = f"{path}, line", content_size(path)
    for number, line in enumerate(read_lines(path, encoding), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{place} {number}: expected one JSON object a line, found {error}. Fix the file."
            ) from None
        if not isinstance(row, dict) or column not in row:
            raise _no_column(f"{place} {number}", column, row if isinstance(row, dict) else ())
        cell = row[column]
        if cell is not None and not isinstance(cell, str):
            raise _not_text(f"{place} {number}", column, f"a JSON {type(cell).__name__}", row)
        yield Cell(str(path), "line", number, cell, _bytes(line) / whole)


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _parquet(path: Path, column: str) -> Generator[Cell]:
    import pyarrow.parquet as parquet
    from pyarrow.lib import ArrowException

    place, number = f"{path}, row", 0
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            if schema.names.count(column) != 1:
                raise _no_column(str(path), column, schema.names)
            kind = schema.field(column).type
            if not _is_text(kind):
                raise _not_text(str(path), column, str(kind), _text_columns(schema))
            share = 1 / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[column]):
                for cell in batch.column(0):
                    number += 1
                    yield Cell(str(path), "row", number, cell.as_py(), share)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place} {number}: expected UTF-8, found {error.reason} in a column of text. Write the file again."
        ) from None
    except (ArrowException, OSError) as error:
        said = hub.last_line(str(error))
        raise UserError(
            f"{path}, after row {number}: damaged or no Parquet file ({said}). Download or write it again."
        ) from None


def _is_text(kind: Any) -> bool:
    """Return whether a pyarrow type is text; a column of nulls alone counts as text."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    known = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    return any(is_kind(kind) for is_kind in known)


def _text_columns(schema: Any) -> list[str]:
    return [name for name in schema.names if _is_text(schema.field(name).type)]


def _dataset(text: Mapping[str, Any]) -> Iterator[Cell]:
    name, column = text["dataset"], text["column"]
    rows = hub.open_dataset(text, "text", "text: {files: [...]}")
    if rows.features:
        if column not in rows.features:
            raise _no_column(name, column, rows.features)
        schema = rows.features.arrow_schema
        if not _is_text(schema.field(column).type):
            found = str(rows.features[column])
            raise _not_text(name, column, found, _text_columns(schema))
        rows = rows.select_columns([column])
    place = f"{name}, row"
    for number, row in enumerate(hub.rows_of(rows, text, "text"), start=1):
        if column not in row:
            raise _no_column(f"{place} {number}", column, row)
        cell = row[column]
        if cell is not None and not isinstance(cell, str):
            raise _not_text(f"{place} {number}", column, f"a {type(cell).__name__}", row)
        yield Cell(name, "row", number, cell)
