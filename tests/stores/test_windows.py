"""Stores of several windows: each window a uniform shuffle of its own contexts, all of them read as one store."""

import shutil
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from saeflow.config import contexts_of, n_windows
from saeflow.errors import UserError
from saeflow.stores import batches, finalise, join, open_store, verify, write_part
from saeflow.stores.permutation import Permutation

ROWS, WINDOWS = 37 * 7, 4
"""Rows of the tiny source (contexts times rows of each), and windows that they are cut into."""


def write_windows(
    folder: Path, source: Any, store: dict[str, Any], params: dict[str, Any], parts: int = 1
) -> dict[str, str]:
    """Extract and merge window by window, and put the windows together in `folder`."""
    merged = []
    for window in range(n_windows(store, "train")):
        folders = [folder.with_name(f"{folder.name}.{window}.{part}") for part in range(parts)]
        for part, place in enumerate(folders):
            place.mkdir(parents=True)
            write_part(source, "train", part, parts, store, place, window=window)
        merged.append(folder.with_name(f"{folder.name}.window.{window}"))
        merged[-1].mkdir()
        made_from = {"model": "0" * 64}
        finalise(folders, "tiny", params, "train", store, made_from, merged[-1], window)
        for place in folders:
            shutil.rmtree(place)
    folder.mkdir()
    digests = join(merged, source.hook_points, folder)
    for place in merged:
        shutil.rmtree(place)
    return digests


@pytest.fixture
def params(store_params: dict[str, Any]) -> dict[str, Any]:
    return {**store_params, "train_rows": ROWS, "window_rows": 70}


@pytest.mark.parametrize(
    ("rows", "of_window", "expected"),
    [(100, None, 1), (100, 100, 1), (100, 99, 2), (100, 50, 2), (100, 10, 10), (101, 10, 11)],
)
def test_windows_hold_no_more_rows_than_they_may(
    rows: int, of_window: int | None, expected: int
) -> None:
    store = {"train_rows": rows, "window_rows": of_window}
    assert n_windows(store, "train") == expected
    assert n_windows(store, "evaluation") == 1


@pytest.mark.parametrize(("contexts", "windows"), [(37, 4), (8, 8), (1000, 7), (5, 1)])
def test_every_context_is_in_one_window(contexts: int, windows: int) -> None:
    found = [contexts_of(window, windows, contexts) for window in range(windows)]
    assert [context for window in found for context in window] == list(range(contexts))
    assert {len(window) for window in found} <= {contexts // windows, contexts // windows + 1}


@pytest.mark.parametrize("hook_point", ["a", "b"])
def test_each_window_is_a_shuffle_of_its_own_contexts(
    tmp_path: Path, source: Any, params: dict[str, Any], source_params: dict[str, Any], hook_point: str
) -> None:  # fmt: skip
    write_windows(tmp_path / "s", source, params, source_params)
    store = open_store(tmp_path / "s" / f"{hook_point}.zarr")
    rows = source.all_rows("train", hook_point)
    edges = [0, 9, 18, 27, 37]  # 37 contexts in 4 windows
    expected = []
    for window, (start, stop) in enumerate(pairwise(edges)):
        n = (stop - start) * 7
        ids = start * 7 + Permutation(n, 5, window).inverse(np.arange(n))
        expected.append(ids)
    ids = np.concatenate(expected)
    assert store.rows == ROWS
    np.testing.assert_array_equal(store.read(0, ROWS).numpy(), rows[ids])
    np.testing.assert_array_equal(store.column("context"), ids // 7)
    np.testing.assert_array_equal(store.column("token"), ids // 7 * 100 + ids % 7)
    for start, stop in [(0, 1), (60, 70), (62, 200), (250, 300), (300, 400), (20, 10)]:
        assert torch.equal(store.read(start, stop), store.read(0, ROWS)[start:stop])
    first = store.read(0, 63).double()
    np.testing.assert_allclose(store.mean.numpy(), first.mean(0).numpy(), atol=1e-15)
    assert store.scale == pytest.approx(float(first.square().mean().sqrt()), rel=1e-14)


def test_windows_are_shuffled_differently() -> None:
    first, second = (Permutation(1000, 5, window).forward(np.arange(1000)) for window in (0, 1))
    assert np.mean(first == second) < 0.02
    np.testing.assert_array_equal(Permutation(1000, 5, 0).forward(np.arange(1000)), first)


@pytest.mark.parametrize(
    "changed", [{"block_contexts": 1}, {"block_contexts": 100}, {"chunk_rows": 8}, {"codec": "zstd"}], ids=str
)  # fmt: skip
def test_digests_depend_on_content_only(
    tmp_path: Path, source: Any, params: dict[str, Any], source_params: dict[str, Any], changed: dict[str, Any]
) -> None:  # fmt: skip
    one = write_windows(tmp_path / "one", source, params, source_params)
    assert write_windows(tmp_path / "two", source, params | changed, source_params, parts=3) == one
    assert verify(tmp_path / "two" / "b.zarr") == one["b"]
    other = write_windows(tmp_path / "x", source, params | {"window_rows": 100}, source_params)
    assert other["a"] != one["a"]


def test_a_window_of_all_rows_is_the_store_of_no_windows(
    tmp_path: Path, source: Any, params: dict[str, Any], make_store: Callable[..., dict[str, str]]
) -> None:
    plain = {name: value for name, value in params.items() if name != "window_rows"}
    expected = make_store(tmp_path / "one", source, plain)
    whole = make_store(tmp_path / "two", source, params | {"window_rows": ROWS})
    assert whole == expected
    assert "window" not in open_store(tmp_path / "two" / "a.zarr").attrs


@pytest.mark.parametrize("batch_size", [1, 10, 16, 77, 300])
@pytest.mark.parametrize("group_bytes", [200, 3000, 1 << 22])
def test_an_epoch_of_batches_gives_every_row_of_all_windows_once(
    tmp_path: Path, source: Any, params: dict[str, Any], source_params: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch, batch_size: int, group_bytes: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(batches, "GROUP_BYTES", group_bytes)
    monkeypatch.setattr(batches, "RUN_ROWS", 4)
    write_windows(tmp_path / "s", source, params, source_params)
    store = open_store(tmp_path / "s" / "a.zarr")
    count = -(-2 * ROWS // batch_size)
    given = [batch.x.clone() for batch in islice(store.batches(batch_size, seed=3), count)]
    rows = np.sort(store.read(0, ROWS).numpy()[:, 0])
    found = torch.cat(given).numpy()[:, 0]
    for epoch in range(2):
        np.testing.assert_array_equal(np.sort(found[epoch * ROWS : (epoch + 1) * ROWS]), rows)
    late = [b.x.clone() for b in islice(store.batches(batch_size, 3, count // 2), 1)]
    assert torch.equal(late[0], given[count // 2])


def test_zarr_reads_the_same_rows(
    tmp_path: Path, source: Any, params: dict[str, Any], source_params: dict[str, Any]
) -> None:
    write_windows(tmp_path / "s", source, params, source_params)
    store = open_store(tmp_path / "s" / "a.zarr")
    group: Any = zarr.open_group(store.path, mode="r")
    found = [group[f"window-{window:05d}/activations"][:] for window in range(WINDOWS)]
    np.testing.assert_array_equal(np.concatenate(found), store.read(0, ROWS).numpy())


def test_damage_is_found_and_named(
    tmp_path: Path, source: Any, params: dict[str, Any], source_params: dict[str, Any]
) -> None:
    write_windows(tmp_path / "s", source, params, source_params)
    path = tmp_path / "s" / "a.zarr"
    first, second = path / "window-00001", path / "window-00002"
    shard = second / "activations/c/0/0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(UserError, match=r"window-00002/activations/c/0/0"):
        verify(path)
    shard.write_bytes(whole)
    for ours, theirs in ((first, "swapped"), (second, first.name), (path / "swapped", second.name)):
        ours.rename(path / theirs)
    with pytest.raises(UserError, match=r"window-00001/zarr\.json: .*found another window"):
        open_store(path)
    shutil.rmtree(second)
    with pytest.raises(UserError, match=r"window-0000[12]"):
        open_store(path)


def test_a_window_too_few_or_in_another_place_is_refused(
    tmp_path: Path, source: Any, params: dict[str, Any], source_params: dict[str, Any]
) -> None:
    places = []
    for window in (0, 1):
        part, place = tmp_path / f"part{window}", tmp_path / f"{window}"
        part.mkdir()
        place.mkdir()
        write_part(source, "train", 0, 1, params, part, window=window)
        if window:
            with pytest.raises(UserError, match="expected a block with window 0, found 1"):
                finalise([part], "tiny", source_params, "train", params, {}, place)
            shutil.rmtree(place)
            place.mkdir()
        finalise([part], "tiny", source_params, "train", params, {}, place, window)
        places.append(place)
    (tmp_path / "s").mkdir()
    with pytest.raises(UserError, match="expected window 0, found 1"):
        join(places[::-1], source.hook_points, tmp_path / "s")


def test_a_window_without_a_context_is_refused(
    tmp_path: Path, source: Any, params: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="expected a context of 7 rows at least, found 3"):
        write_part(source, "train", 0, 1, params | {"window_rows": 3}, tmp_path, window=0)
