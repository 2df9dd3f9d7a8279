"""Lines of text files, whatever their encoding and compression: recognised by their first bytes, decoded strictly."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from saeflow.errors import UserError

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_SAMPLE = 1 << 22
"""Bytes of a compressed file's text that its ratio is taken from."""
LONGEST_LINE = 1 << 26
"""Characters; a longer line is refused, so that memory stays bounded."""
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig", ("utf-8", "utf-8-sig")),
    (
        codecs.BOM_UTF32_LE,
        "utf-32",
        ("utf-32", "utf-32-le"),
    ),  # before UTF-16's, with which it begins
    (codecs.BOM_UTF32_BE, "utf-32", ("utf-32", "utf-32-be")),
    (codecs.BOM_UTF16_LE, "utf-16", ("utf-16", "utf-16-le")),
    (codecs.BOM_UTF16_BE, "utf-16", ("utf-16", "utf-16-be")),
)
"""Byte order mark, the encoding that takes it away, and the encodings that may be asked for with it."""


def check_encoding(encoding: str) -> None:
    """Check that Python knows an encoding of text.

    Raises:
        UserError: it does not.
    """
    try:
        "".encode(encoding)
    except LookupError:
        raise UserError(
            f"text.encoding: expected an encoding that Python knows, such as latin-1 or cp1252, found {encoding!r}."
        ) from None


def read_lines(path: Path, encoding: str | None) -> Iterator[str]:
    """Lines of a text file with their ends, as universal newlines.

    A byte order mark tells the encoding and is no part of the text. Gzip, Zstandard, bzip2 and xz are known by
    their first bytes, not by the file's name.

    Args:
        path: the file.
        encoding: as Python names it; None is UTF-8, or what a byte order mark says.

    Raises:
        UserError: another encoding, damaged compression, a NUL character, or a line above LONGEST_LINE.
    """
    number = 0
    try:
        with path.open("rb") as raw, io.TextIOWrapper(*_decoder(raw, path, encoding)) as text:
            while line := text.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise UserError(
                        f"{path}, line {number}: expected at most {LONGEST_LINE} characters a line, found more. "
                        "Cut it into several."
                    )
                if "\0" in line:
                    raise UserError(
                        f"{path}, line {number}: expected text, found a NUL character: a binary file, or UTF-16 "
                        "without a byte order mark. Set text.encoding (utf-16-le, utf-16-be), or give another file."
                    )
                yield line
    except UnicodeDecodeError as error:
        found = error.object[error.start : error.start + 1].hex()
        number += 1 + error.object.count(b"\n", 0, error.start)  # decoding runs ahead of lines
        raise UserError(
            f"{path}, line {number}: expected {error.encoding}, found byte 0x{found} ({error.reason}). Set "
            "text.encoding (of `saeflow init`: --encoding) to the file's own, such as latin-1 or cp1252, or save the file as UTF-8."
        ) from None
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise UserError(
            f"{path}, after line {number}: cannot be read to its end ({error}). Fix or download the file again."
        ) from None


def content_size(path: Path) -> float:
    """Bytes of a file's text; of a compressed one about, at the ratio of its first megabytes."""
    size = float(max(1, path.stat().st_size))
    with path.open("rb") as raw:
        content = _decompressed(raw)
        if content.raw is raw:
            return size
        try:
            found = len(content.read(_SAMPLE))
        except (EOFError, OSError, zlib.error, lzma.LZMAError):
            return size  # `read_lines` says what is wrong
        return size * max(1, found) / raw.tell()


def _decoder(raw: IO[bytes], path: Path, encoding: str | None) -> tuple[Any, str]:
    """A file's bytes without compression, and their encoding."""
    buffered = _decompressed(raw)
    start = buffered.peek(4)[:4]
    for mark, marked, same in _MARKS:
        if start.startswith(mark):
            if encoding is not None and codecs.lookup(encoding).name not in same:
                raise UserError(
                    f"{path}: text.encoding is {encoding}, but the file begins with the byte order mark of {marked}. "
                    "Leave encoding out, or read this file as a source of its own."
                )
            return buffered, marked
    return buffered, encoding or "utf-8"


def _decompressed(raw: IO[bytes]) -> io.BufferedReader:
    start = raw.read(6)
    raw.seek(0)
    opened: Any
    if start.startswith(b"\x1f\x8b"):
        opened = gzip.GzipFile(fileobj=raw)
    elif start.startswith(b"BZh"):
        opened = bz2.BZ2File(raw)
    elif start.startswith(b"\xfd7zXZ\0"):
        opened = lzma.LZMAFile(raw)  # noqa: SIM115 (the caller closes)
    elif start.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow

        opened = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    else:
        opened = raw
    return io.BufferedReader(opened, 1 << 20)
