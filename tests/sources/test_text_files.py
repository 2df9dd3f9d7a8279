"""Every encoding and compression gives the same lines, or one line that says what is wrong."""

import bz2
import gzip
import lzma
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest

from saeflow.errors import UserError
from saeflow.sources import text_files
from saeflow.sources.text_files import check_encoding, read_lines

LINES = ["La forêt près du café\n", "\n", "était déjà fermée.\n", "“fin”"]
TEXT = "".join(LINES)


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, "zstd", asbytes=True))


COMPRESS = {
    "none": bytes,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstd,
}


def lines(folder: Path, content: bytes, encoding: str | None = None) -> list[str]:
    path = folder / "a.txt"
    path.write_bytes(content)
    return list(read_lines(path, encoding))


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_and_a_compression_are_recognised(
    encoding: str, compression: str, tmp_path: Path
) -> None:
    content = TEXT.encode(encoding)
    assert lines(tmp_path, COMPRESS[compression](content)) == LINES
    assert lines(tmp_path, COMPRESS[compression](content), encoding) == LINES


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "utf-16-be", "mac-roman"])
def test_other_encodings_are_refused_until_they_are_named(encoding: str, tmp_path: Path) -> None:
    content = TEXT.encode(encoding)
    with pytest.raises(UserError, match=r"a\.txt, .*line 1: expected .*text\.encoding"):
        lines(tmp_path, content)
    assert lines(tmp_path, content, encoding) == LINES


def test_a_byte_order_mark_and_an_encoding_may_not_disagree(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="begins with the byte order mark of utf-8-sig"):
        lines(tmp_path, TEXT.encode("utf-8-sig"), "latin-1")
    big_endian = "\ufeff".encode("utf-16-be") + TEXT.encode("utf-16-be")
    assert lines(tmp_path, big_endian, "utf-16-be") == LINES


def test_files_joined_one_after_another_are_read_whole(tmp_path: Path) -> None:
    for compress in COMPRESS.values():
        assert lines(tmp_path, compress(b"one\n") + compress(b"two\n")) == ["one\n", "two\n"]


@pytest.mark.parametrize("compression", [name for name in COMPRESS if name != "none"])
def test_a_file_that_is_cut_off_is_one_line(compression: str, tmp_path: Path) -> None:
    content = COMPRESS[compression](bytes(str(list(range(20000))), "ascii"))
    with pytest.raises(UserError, match=r"after line 0: cannot be read to its end"):
        lines(tmp_path, content[: len(content) // 2])


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found a NUL character"):
        lines(tmp_path, b"PK\x03\x04\x00\x00")
    with pytest.raises(UserError, match=r"line 2: expected utf-8, found byte 0xff"):
        lines(tmp_path, b"good\n\xff\n")
    with pytest.raises(UserError, match="expected an encoding that Python knows"):
        check_encoding("latin-one")
    with pytest.raises(UserError, match="expected an encoding that Python knows"):
        check_encoding("base64")  # of bytes, not of text


def test_a_line_without_end_is_refused_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "LONGEST_LINE", 1 << 20)
    bomb = gzip.compress(b"a" * (1 << 26))
    tracemalloc.start()
    with pytest.raises(UserError, match="expected at most 1048576 characters a line, found more"):
        lines(tmp_path, bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 25
