"""Shuffled batches: every row once an epoch, resumable anywhere, well mixed, in bounded memory."""

import gc
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from saeflow.batch import Batch
from saeflow.errors import UserError
from saeflow.stores import Store, batches, open_store
from saeflow.stores.batches import on_device, read_ahead

THREAD = "saeflow-batches"
needs_gpu = pytest.mark.gpu


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD)]


@pytest.fixture(scope="module")
def store(
    tmp_path_factory: pytest.TempPathFactory,
    make_source: Callable[..., Any],
    make_store: Callable[..., Any],
) -> Store:
    """1001 rows in 63 chunks; each row's values tell its number."""

    class Numbered(make_source):  # type: ignore[misc]
        def activations(self, split: str, context: int, hook_point: str) -> np.ndarray:
            number = context * 7 + np.arange(7, dtype=np.float32)
            return np.stack([number, number // 7, *[number * 0] * 4], axis=1)

    folder = tmp_path_factory.mktemp("numbered") / "s"
    make_store(folder, Numbered({"train": 143}))
    return open_store(folder / "a.zarr")


@pytest.fixture(params=[200, 3000, 1 << 22])
def group_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(batches, "GROUP_BYTES", request.param)
    monkeypatch.setattr(batches, "RUN_ROWS", 4)
    return int(request.param)


def take(store: Store, count: int, batch_size: int, **options: Any) -> list[torch.Tensor]:
    return [batch.x.clone() for batch in islice(store.batches(batch_size, **options), count)]


@pytest.mark.parametrize("batch_size", [1, 10, 16, 77, 1001, 2500])
@pytest.mark.usefixtures("group_bytes")
def test_every_epoch_gives_every_row_once(store: Store, batch_size: int) -> None:
    needed = -(-3 * 1001 // batch_size)
    given = take(store, needed, batch_size, seed=4)
    assert {tuple(x.shape) for x in given} == {(batch_size, 6)}
    numbers = torch.cat(given)[:, 0].numpy()
    for epoch in range(3):
        np.testing.assert_array_equal(
            np.sort(numbers[epoch * 1001 : (epoch + 1) * 1001]), np.arange(1001)
        )
    assert not np.array_equal(numbers[:1001], numbers[1001:2002])


@pytest.mark.parametrize("batch_size", [10, 16, 77, 2500])
@pytest.mark.usefixtures("group_bytes")
def test_a_stream_can_start_at_any_batch(store: Store, batch_size: int) -> None:
    whole = take(store, 40, batch_size, seed=1)
    for start in (0, 1, 7, 39):
        resumed = take(store, 40 - start, batch_size, seed=1, start_batch=start)
        assert all(torch.equal(a, b) for a, b in zip(whole[start:], resumed, strict=True))


def test_starting_late_reads_no_more_than_what_is_ahead(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "GROUP_BYTES", 1600)  # 5 chunks
    read: list[int] = []
    array = store.arrays["activations"]
    original = array.read_chunk
    monkeypatch.setattr(array, "read_chunk", lambda c, p: (read.append(c), original(c, p))[1])
    stream = store.batches(16, seed=0, start_batch=10**9)
    next(stream)
    stream.close()
    assert 5 <= len(read) <= 5 * (1 + batches.READERS)


def test_seed_and_epoch_change_the_order(store: Store) -> None:
    first, other = take(store, 10, 100, seed=1), take(store, 10, 100, seed=2)
    assert torch.equal(torch.stack(first), torch.stack(take(store, 10, 100, seed=1)))
    assert not torch.equal(torch.stack(first), torch.stack(other))


@pytest.fixture(scope="module")
def mixed(
    tmp_path_factory: pytest.TempPathFactory,
    make_source: Callable[..., Any],
    make_store: Callable[..., Any],
    store_params: dict[str, Any],
) -> Store:
    """250 contexts of 64 rows that hold their context, in chunks of 64 rows."""

    class Numbered(make_source):  # type: ignore[misc]
        def activations(self, split: str, context: int, hook_point: str) -> np.ndarray:
            return np.full((64, 2), context, np.float32)

    folder = tmp_path_factory.mktemp("mixed") / "s"
    params = {**store_params, "chunk_rows": 64, "shard_rows": 1024, "block_contexts": 50}
    make_store(folder, Numbered({"train": 250}, 64, 2), params)
    return open_store(folder / "a.zarr")


def test_neighbours_share_a_context_no_more_often_than_in_a_uniform_shuffle(mixed: Store) -> None:
    rows, batch_size, epochs = 16_000, 500, 5
    given = take(mixed, epochs * rows // batch_size, batch_size, seed=0)
    contexts = torch.stack(given)[:, :, 0].numpy()
    same = int((contexts[:, 1:] == contexts[:, :-1]).sum())
    pairs = contexts[:, 1:].size
    chance = 63 / (rows - 1)  # of a row's neighbour, among all other rows
    assert stats.binomtest(same, pairs, chance, alternative="greater").pvalue > 0.001
    # and so do any two rows of a batch: every pair of every batch
    counts = np.stack([np.bincount(row.astype(int), minlength=250) for row in contexts])
    together = (counts * (counts - 1) / 2).sum()
    all_pairs = len(contexts) * batch_size * (batch_size - 1) / 2
    deviation = (together - all_pairs * chance) / np.sqrt(all_pairs * chance)
    assert deviation < stats.norm.isf(0.001)


def test_contexts_spread_over_batches_as_in_a_uniform_shuffle(mixed: Store) -> None:
    given = torch.stack(take(mixed, 32, 500, seed=3))[:, :, 0].numpy()
    counts = np.stack([np.bincount(row.astype(int), minlength=250) for row in given])
    assert stats.chi2_contingency(counts).pvalue > 0.001


def test_a_chunk_order_without_the_shuffle_would_fail_these_tests() -> None:
    contexts = np.repeat(np.arange(250), 64).reshape(-1, 500)
    same = int((contexts[:, 1:] == contexts[:, :-1]).sum())
    test = stats.binomtest(same, contexts[:, 1:].size, 63 / 15_999, alternative="greater")
    assert test.pvalue < 1e-6


def test_memory_is_used_again_but_never_while_a_tensor_refers_to_it(store: Store) -> None:
    stream = store.batches(50, seed=0)
    kept = [next(stream).x for _ in range(60)]
    copies = take(store, 60, 50, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    view = kept[17][3:5]
    del kept
    expected = view.clone()
    for _ in range(200):
        next(stream)
    assert torch.equal(view, expected)
    stream.close()


def test_memory_does_not_grow_with_the_stream(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "GROUP_BYTES", 1600)
    made: list[int] = []
    original = np.empty

    def counting(shape: int, *args: Any, **kwargs: Any) -> np.ndarray:
        if shape > 4096:
            made.append(shape)
        return original(shape, *args, **kwargs)

    monkeypatch.setattr(batches.np, "empty", counting)
    for _ in islice(store.batches(16, seed=0), 2000):
        pass
    assert 1 <= len(made) <= 8  # groups in memory at once, of about 700 that were read


def test_closing_or_dropping_a_stream_ends_its_thread(store: Store) -> None:
    before = len(running())
    stream = store.batches(10, seed=0)
    next(stream)
    assert len(running()) > before
    stream.close()
    assert len(running()) == before
    stream = store.batches(10, seed=0)
    next(stream)
    del stream
    gc.collect()
    assert len(running()) == before
    with pytest.raises(KeyError):
        for _ in store.batches(10, seed=0):
            raise KeyError
    gc.collect()
    assert len(running()) == before


def test_a_damaged_chunk_stops_the_consumer_and_the_thread(store: Store, tmp_path: Path) -> None:
    copy = tmp_path / "copy.zarr"
    shutil.copytree(store.path, copy)
    shard = copy / "activations" / "c" / "3" / "0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 16
    shard.write_bytes(data)
    before = len(running())
    with pytest.raises(UserError, match=r"activations/c/3/0: .*chunk 12 \(rows 192 to 207\)"):
        take(open_store(copy), 101, 10, seed=0)
    assert len(running()) == before


def test_results_come_in_order_and_an_error_after_those_before_it() -> None:
    def read(item: int) -> int:
        time.sleep(0.01 * (item % 2))
        if item == 5:
            raise OSError("the disk is gone")
        return item * item

    given = []
    with pytest.raises(OSError, match="the disk is gone"):
        for item in read_ahead(iter(range(100)), read):
            given.append(item)
    assert given == [0, 1, 4, 9, 16]
    assert list(read_ahead(iter(range(3)), read)) == [0, 1, 4]
    assert not running()


def test_reading_ahead_is_bounded() -> None:
    begun: list[int] = []
    stream = read_ahead(iter(range(100)), begun.append)
    next(stream)
    stream.close()
    assert len(begun) <= 1 + batches.READERS


LEFT_OPEN = """
import sys
from saeflow.stores import open_store
stream = open_store(sys.argv[1]).batches(10, 0)
next(stream)
print("leaving")
"""


def test_a_program_may_end_with_a_stream_open(store: Store) -> None:
    command = [sys.executable, "-c", LEFT_OPEN, store.path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("leaving\n", "")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_batches_have_the_stores_dtype(
    tmp_path: Path, source: Any, make_store: Callable[..., Any], store_params: dict[str, Any],
    dtype: str, codec: str,
) -> None:  # fmt: skip
    make_store(tmp_path / "s", source, {**store_params, "dtype": dtype, "codec": codec})
    store = open_store(tmp_path / "s" / "a.zarr")
    rows = torch.cat(take(store, 37, 7, seed=0))
    assert rows.dtype == (torch.float32 if dtype == "int8" else getattr(torch, dtype))
    assert torch.equal(rows.sort(0).values, store.read(0, 259).sort(0).values)


def test_impossible_batches_are_refused(store: Store) -> None:
    for batch_size, start in ((0, 0), (5, -1)):
        with pytest.raises(ValueError, match="expected batch_size >= 1"):
            store.batches(batch_size, seed=0, start_batch=start)


@pytest.mark.gpu
@needs_gpu
def test_pinned_batches_hold_the_same_rows(store: Store) -> None:
    plain = take(store, 150, 10, seed=0)
    pinned = store.batches(10, seed=0, pin=True)
    for expected in plain:
        x = next(pinned).x
        assert x.is_pinned()
        assert torch.equal(x.to("cuda", non_blocking=True).cpu(), expected)
    pinned.close()


@pytest.mark.parametrize(("cores", "readers"), [(1, 2), (8, 6), (16, 12), (64, 12)])
def test_a_gpu_has_readers_for_the_cores_of_its_process(
    cores: int, readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    assert batches.readers_for(pin=True) == readers
    assert batches.readers_for(pin=False) == batches.READERS


@pytest.mark.parametrize("readers", [1, 6])
def test_items_come_in_order_however_many_threads_read(readers: int) -> None:
    def read(item: int) -> int:
        time.sleep(0.002 * (item % 3))  # later ones are ready first
        return item

    assert list(read_ahead(iter(range(40)), read, readers)) == list(range(40))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_batches_arrive_on_a_device_whole_and_in_order(device: str) -> None:
    expected = [torch.full((64, 32), float(i)) for i in range(20)]
    given = (Batch.of(x.pin_memory() if device == "cuda" else x) for x in expected)
    for batch, one in zip(on_device(given, torch.device(device)), expected, strict=True):
        assert batch.x.device.type == device
        assert torch.equal(batch.x.cpu(), one)
        assert batch.target is batch.x


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_targets_arrive_with_their_inputs(device: str) -> None:
    given = [
        Batch(torch.full((64, 32), float(i)), torch.full((64, 5), -float(i))) for i in range(9)
    ]
    pinned = (batch.map(torch.Tensor.pin_memory) if device == "cuda" else batch for batch in given)
    for batch, one in zip(on_device(pinned, torch.device(device)), given, strict=True):
        assert torch.equal(batch.x.cpu(), one.x)
        assert torch.equal(batch.target.cpu(), one.target)
