"""Documents come whole, in order and lazily from every kind of text."""

import gzip
import json
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saeflow.errors import UserError
from saeflow.files import file_digest
from saeflow.sources import english
from saeflow.sources.documents import (
    PASSAGE_CHARACTERS,
    Document,
    documents_digests,
    is_evaluation,
    read_documents,
    shuffled,
)

STORIES = [f"Story {i}: once there was a number {i * i}.\n\nThe end — “ended”." for i in range(50)]


def read(text: dict[str, Any]) -> list[str]:
    return [document.text for document in read_documents(text)]


def files(*paths: Path) -> dict[str, Any]:
    return {"files": [str(path) for path in paths], "column": "story"}


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """A folder with two Parquet files of stories, as a data set of the hub is laid out."""
    folder = tmp_path / "stories"
    folder.mkdir()
    for part, rows in enumerate((STORIES[:30], STORIES[30:])):
        table = pd.DataFrame({"id": range(len(rows)), "story": rows})
        table.to_parquet(folder / f"train-{part:05d}-of-00002.parquet")
    return folder


def test_parquet_and_jsonl_rows_are_documents(parquet: Path, tmp_path: Path) -> None:
    jsonl = tmp_path / "stories.jsonl"
    jsonl.write_text("".join(json.dumps({"story": s, "n": 1}) + "\n" for s in STORIES[:5]) + "\n")
    found = read(files(*sorted(parquet.iterdir()), jsonl))
    assert sorted(found) == sorted(STORIES + STORIES[:5])


def test_files_are_read_in_turns_in_proportion_to_their_sizes(
    parquet: Path, tmp_path: Path
) -> None:
    """Whatever number of documents is taken, each file has given its share of them, by its size."""
    large, small = tmp_path / "large.jsonl", tmp_path / "small.jsonl"
    for path, count in ((large, 300), (small, 100)):
        path.write_text(
            "".join(json.dumps({"story": f"{i:03d} " * 20}) + "\n" for i in range(count))
        )
    plain = tmp_path / "plain.txt"
    plain.write_text("\n\n".join(f"{i:03d} " * (PASSAGE_CHARACTERS // 4) for i in range(3)))
    found = list(read_documents(files(large, small, plain)))
    assert Counter(document.file for document in found) == {
        str(large): 300, str(small): 100, str(plain): 3,
    }  # fmt: skip
    for name in (large, small, plain):  # in each file's own order
        numbers = [document.text[:3] for document in found if document.file == str(name)]
        assert numbers == sorted(numbers)
    assert {document.file for document in found[:3]} == {str(large), str(small), str(plain)}
    for taken in (40, 120, 200, 360):
        counts = Counter(document.file for document in found[:taken])
        assert abs(counts[str(large)] - 3 * counts[str(small)]) <= 4
    assert list(read_documents(files(large, small, plain))) == found


def test_compression_and_other_columns_do_not_change_a_files_turn(tmp_path: Path) -> None:
    """Four files of as many equal documents are read alike, though their sizes on disk differ a hundredfold."""
    rows = [{"story": f"{i:03d} " * 20, "meta": "x" * 900} for i in range(400)]
    lines = "".join(json.dumps({"story": row["story"]}) + "\n" for row in rows)
    (tmp_path / "plain.jsonl").write_text(lines)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "wide.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = list(read_documents(files(*sorted(tmp_path.iterdir()))))
    for taken in (40, 200, 800, 1600):
        counts = Counter(document.file for document in found[:taken])
        assert len(counts) == 4
        assert max(counts.values()) - min(counts.values()) <= 2


def test_more_files_than_are_open_at_once_are_all_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saeflow.sources.documents._OPEN_FILES", 3)
    paths = [tmp_path / f"{i}.jsonl" for i in range(10)]
    for i, path in enumerate(paths):
        path.write_text("".join(json.dumps({"story": f"{i} {j}"}) + "\n" for j in range(5)))
    found = read(files(*paths))
    assert sorted(found) == sorted(f"{i} {j}" for i in range(10) for j in range(5))
    assert found == read(files(*paths))


def test_every_files_column_is_checked_before_any_document_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"story": STORIES[0]}) + "\n")
    pq.write_table(pa.table({"tale": ["a", "b"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet: no column 'story' of text. Columns: tale"):
        next(read_documents(files(tmp_path / "a.jsonl", tmp_path / "b.parquet")))


def test_a_text_file_is_cut_at_blank_lines_into_passages(tmp_path: Path) -> None:
    paragraphs = [f"{i} " + "word " * 200 for i in range(40)]
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs))
    found = read(files(path))
    assert "\n\n".join(found).split() == path.read_text().split()
    assert len(found) == 10  # each of four paragraphs of about 1000 characters
    for passage in found[:-1]:
        assert PASSAGE_CHARACTERS <= len(passage) < PASSAGE_CHARACTERS + 1100
        assert passage.split()[0].isdigit()  # whole paragraphs


@pytest.mark.parametrize("streaming", [True, False])
def test_a_data_set_is_read_through_the_datasets_library(streaming: bool, parquet: Path) -> None:
    text = hub_set(parquet, streaming=streaming)
    assert read(text) == STORIES
    with pytest.raises(UserError, match=r"no column 'text' of text\. Columns: id, story"):
        read(text | {"column": "text"})
    with pytest.raises(UserError, match="cannot be opened"):
        read(text | {"split": "validation"})


def test_documents_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "stories.jsonl"
    path.write_text(json.dumps({"story": STORIES[0]}) + "\nbroken\n")
    assert next(read_documents(files(path))).text == STORIES[0]
    with pytest.raises(UserError, match=r"stories\.jsonl, line 2: expected one JSON object"):
        read(files(path))


def test_bundled_english_is_not_cut_short() -> None:
    assert len(list(islice(read_documents({"bundled": "english"}), 100))) == 100


def test_modules_that_give_no_document_are_counted() -> None:
    """Modules of the library with too little text, against a count of the documents themselves."""
    left_out: Counter[str] = Counter()
    documents = list(read_documents({"bundled": "python"}, left_out))
    library = Path(sysconfig.get_path("stdlib"))
    modules = [
        path
        for path in library.rglob("*.py")
        if english.LEFT_OUT.isdisjoint(path.relative_to(library).parts)
    ]
    assert left_out.total() == len(modules) - len(documents) > 0


def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path, parquet: Path) -> None:
    with pytest.raises(UserError, match=r"no such file: .*gone\.txt"):
        read(files(tmp_path / "gone.txt"))
    path = sorted(parquet.iterdir())[0]
    with pytest.raises(UserError, match=r"no column 'text' of text\. Columns: id, story\."):
        read({"files": [str(path)], "column": "text"})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"damaged or no Parquet file"):
        read(files(path))
    (tmp_path / "a.jsonl").write_text('{"story": 7}\n')
    with pytest.raises(
        UserError, match=r"a\.jsonl, line 1: expected text in column 'story', found a JSON int"
    ):
        read(files(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text('{"text": "7"}\n')
    with pytest.raises(
        UserError, match=r"a\.jsonl, line 1: no column 'story' of text. Columns: text"
    ):
        read(files(tmp_path / "a.jsonl"))


CELLS = {
    "token ids": [[1, 2], [3]],
    "chat messages": [[{"role": "user", "content": "Hello"}], []],
    "structs": [{"text": "Hello"}, {"text": ""}],
    "bytes": [b"Hello", b""],
    "whole numbers": [1, 2],
    "numbers": [0.5, 2.0],
    "booleans": [True, False],
}


def hub_set(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "dataset": str(folder), "name": None, "revision": "0" * 40, "split": "train",
        "column": "story", "streaming": False, **changes,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("name", CELLS)
def test_what_is_not_text_is_refused_in_every_format(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    table = pa.table({"story": CELLS[name], "plain": ["a", "b"]})
    pq.write_table(table, folder / "a.parquet")
    expected = r"expected text in column 'story', found .*there are also: plain"
    texts = [files(folder / "a.parquet"), hub_set(folder), hub_set(folder, streaming=True)]
    if name != "bytes":
        (tmp_path / "a.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in table.to_pylist())
        )
        texts.append(files(tmp_path / "a.jsonl"))
    for text in texts:
        with pytest.raises(UserError, match=expected):
            read(text)


def test_nulls_are_left_out_and_counted_in_every_format(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    rows = ["one", None, "two", None]
    pq.write_table(pa.table({"story": rows}), folder / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"story": r}) + "\n" for r in rows))
    texts = {
        "a.parquet, row 2": files(folder / "a.parquet"),
        "a.jsonl, line 2": files(tmp_path / "a.jsonl"),
        "set, row 2": hub_set(folder),
    }
    for place, text in texts.items():
        caplog.clear()
        assert read(text) == ["one", "two"]
        assert f"2 documents: null, left out; the first is {tmp_path}" in caplog.text
        assert place in caplog.text
        left_out: Counter[str] = Counter()
        assert len(list(read_documents(text, left_out))) == 2
        assert left_out == {"null": 2}


def test_files_without_a_document_are_counted_beside_good_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "good.txt").write_text("one")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    pq.write_table(pa.table({"story": pa.array([], pa.string())}), tmp_path / "none.parquet")
    names = ("good.txt", "empty.txt", "blank.jsonl", "none.parquet")
    left_out: Counter[str] = Counter()
    found = list(read_documents(files(*map(tmp_path.joinpath, names)), left_out))
    assert [document.text for document in found] == ["one"]
    assert left_out == {"a file without any": 3}
    assert f"3 documents: a file without any, left out; the first is {tmp_path}" in caplog.text


def test_text_of_any_type_of_arrow_is_read(tmp_path: Path) -> None:
    kinds = [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int8(), pa.string()),
    ]
    for kind in kinds:
        pq.write_table(pa.table({"story": pa.array(["a", "b", "a"], kind)}), tmp_path / "a.parquet")
        assert read(files(tmp_path / "a.parquet")) == ["a", "b", "a"]


def test_half_a_surrogate_pair_is_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = ["whole \U0001f600", "half \ud83d", "lost \ufffd"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"story": r}) + "\n" for r in rows))
    assert read(files(tmp_path / "a.jsonl")) == [rows[0], rows[2]]
    assert "1 documents: half of a surrogate pair, left out; the first is" in caplog.text
    assert re.search(r"with U\+FFFD, .*a\.jsonl, line 3", caplog.text)


@pytest.mark.parametrize("codec", ["snappy", "zstd", "none"])
def test_a_rotten_parquet_page_is_one_line(codec: str, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"story": [f"{i} " * 50 for i in range(5000)]})
    pq.write_table(table, path, compression=codec, use_dictionary=False, write_page_checksum=True)
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 1
    path.write_bytes(held)
    with pytest.raises(UserError, match=r"a\.parquet, after row \d+: damaged or no Parquet file"):
        read(files(path))


def test_a_column_of_text_that_is_no_utf_8_is_one_line(tmp_path: Path) -> None:
    cells = pa.array([b"good", b"caf\xe9"], pa.binary())
    column = pa.StringArray.from_buffers(2, cells.buffers()[1], cells.buffers()[2])
    pq.write_table(pa.table({"story": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 2: expected UTF-8"):
        read(files(tmp_path / "a.parquet"))


def test_digests_name_what_was_read(parquet: Path) -> None:
    paths = sorted(parquet.iterdir())
    expected = {str(path): file_digest(path) for path in paths}
    assert documents_digests(files(*paths)) == expected
    local = {"dataset": str(parquet), "revision": "0" * 40}
    assert documents_digests(local) == expected
    pinned = {"dataset": "someone/stories", "revision": "1" * 40}
    assert documents_digests(pinned) == {"dataset:someone/stories": "1" * 40}


def test_the_split_keeps_its_share_and_depends_on_the_document_alone() -> None:
    documents = [f"document number {i}" for i in range(4000)]
    chosen = [is_evaluation(document, 0.1) for document in documents]
    assert abs(sum(chosen) / 4000 - 0.1) < 4 * (0.1 * 0.9 / 4000) ** 0.5
    larger = [is_evaluation(document, 0.3) for document in documents]
    assert all(b for a, b in zip(chosen, larger, strict=True) if a)  # a larger share only adds
    assert is_evaluation(documents[0], 0.1) == chosen[0]


def test_documents_come_in_a_random_order_of_their_seed() -> None:
    documents = [Document(f"document {i}", "a.txt") for i in range(2000)]
    numbers = [number for number, _ in shuffled(iter(documents), 0)]
    assert sorted(numbers) == list(range(2000))
    assert all(one == documents[number] for number, one in shuffled(iter(documents), 0))
    assert numbers == [number for number, _ in shuffled(iter(documents), 0)]
    assert numbers != [number for number, _ in shuffled(iter(documents), 1)]
    rank = np.corrcoef(numbers, np.arange(2000))[0, 1]
    assert abs(rank) < 4 / 2000**0.5


def test_shuffling_holds_no_more_characters_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saeflow.sources.documents.SHUFFLE_CHARACTERS", 1000)
    read = 0

    def documents() -> Iterator[Document]:
        nonlocal read
        for _ in range(500):
            read += 10
            yield Document("x" * 10, "a.txt")

    given = 0
    for _ in shuffled(documents(), 0):
        assert read - given <= 1010
        given += 10
    assert given == 5000
