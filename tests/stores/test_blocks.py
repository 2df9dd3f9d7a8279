"""Extraction in parts: what a block holds, resuming, refusing rows that cannot be stored."""

import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saeflow.errors import UserError
from saeflow.sources.base import Block
from saeflow.stores import finalise, open_store, verify, write_part
from saeflow.stores.blocks import BlockFile
from saeflow.stores.permutation import Permutation

CONFTEST = Path(__file__).with_name("conftest.py")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_block_holds_its_contexts_rows_in_the_order_of_their_places(
    tmp_path: Path, source: Any, store_params: dict[str, Any]
) -> None:
    write_part(source, "train", 0, 1, store_params, tmp_path)
    blocks = [BlockFile.open(path) for path in sorted((tmp_path / "b").iterdir())]
    assert [block.rows for block in blocks] == [28] * 9 + [7]  # 4 contexts of 7 rows; 37 contexts
    places = Permutation(37 * 7, store_params["seed"]).forward(np.arange(37 * 7))
    rows = source.all_rows("train", "b")
    for number, block in enumerate(blocks):
        ids = np.arange(number * 28, min((number + 1) * 28, 259))
        order = ids[np.argsort(places[ids])]
        np.testing.assert_array_equal(block.read("place"), places[order])
        np.testing.assert_array_equal(block.read("activations"), rows[order])
        np.testing.assert_array_equal(block.read("context"), order // 7)
        np.testing.assert_array_equal(block.read("position"), order % 7)
        expected = np.linalg.norm(rows[order].astype(float), axis=1)
        np.testing.assert_allclose(block.read("norm"), expected, rtol=1e-6)
        np.testing.assert_array_equal(block.read("activations", 3, 5), rows[order[3:5]])
        for expected_rows in (0, 2, 1000):
            taken = block.take(2, int(places[order[4]]), expected_rows)
            np.testing.assert_array_equal(taken["place"], places[order[2:4]])
            np.testing.assert_array_equal(taken["activations"], rows[order[2:4]])
            assert len(block.take(1, 10**9, expected_rows)["token"]) == block.rows - 1
        assert len(block.take(block.rows, 10**9, 5)["place"]) == 0


@pytest.mark.parametrize("parts", [2, 3, 10, 23])
def test_parts_write_disjoint_blocks_and_together_all(
    tmp_path: Path, source: Any, store_params: dict[str, Any], parts: int
) -> None:
    (tmp_path / "one").mkdir()
    write_part(source, "train", 0, 1, store_params, tmp_path / "one")
    together: dict[str, bytes] = {}
    for part in range(parts):
        (tmp_path / str(part)).mkdir()
        write_part(source, "train", part, parts, store_params, tmp_path / str(part))
        found = files(tmp_path / str(part))
        assert not together.keys() & found.keys()
        together |= found
    assert together == files(tmp_path / "one")


def test_several_writers_leave_the_bytes_of_one(
    tmp_path: Path, source: Any, store_params: dict[str, Any]
) -> None:
    for writers in (1, 3):
        (tmp_path / str(writers)).mkdir()
        write_part(source, "train", 0, 1, store_params, tmp_path / str(writers), writers)
    assert files(tmp_path / "1") == files(tmp_path / "3")


def test_a_block_is_written_once_its_rows_have_arrived(
    tmp_path: Path, source: Any, store_params: dict[str, Any]
) -> None:
    class Late:
        """A source whose rows arrive after it has given the block, as from a GPU."""

        def __getattr__(self, name: str) -> Any:
            return getattr(source, name)

        def block(self, *where: Any) -> Block:
            whole = source.block(*where)
            empty = {name: torch.full_like(x, torch.nan) for name, x in whole.activations.items()}

            def wait() -> None:
                for name, x in whole.activations.items():
                    empty[name].copy_(x)

            return Block(empty, whole.columns, wait)

    for name, given in (("plain", source), ("late", Late())):
        (tmp_path / name).mkdir()
        write_part(given, "train", 0, 1, store_params, tmp_path / name, 2)
    assert files(tmp_path / "plain") == files(tmp_path / "late")


def test_whole_blocks_are_kept_and_damaged_ones_written_again(
    tmp_path: Path, source: Any, store_params: dict[str, Any]
) -> None:
    write_part(source, "train", 0, 1, store_params, tmp_path)
    whole = files(tmp_path)
    source.asked.clear()
    write_part(source, "train", 0, 1, store_params, tmp_path)
    assert source.asked == []
    flipped = tmp_path / "a" / "00000002.safetensors"
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    cut = tmp_path / "b" / "00000005.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    (tmp_path / "b" / "00000009.safetensors").unlink()
    write_part(source, "train", 0, 1, store_params, tmp_path)
    assert source.asked == [(8, 12), (20, 24), (36, 37)]
    assert files(tmp_path) == whole


def test_blocks_of_other_parameters_are_not_kept(
    tmp_path: Path, source: Any, store_params: dict[str, Any]
) -> None:
    write_part(source, "train", 0, 1, {**store_params, "seed": 1}, tmp_path)
    write_part(source, "train", 0, 1, store_params, tmp_path)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    write_part(source, "train", 0, 1, store_params, fresh)
    assert files(fresh) == {k: v for k, v in files(tmp_path).items() if not k.startswith("fresh")}


KILLED = """
import runpy, sys, time
from pathlib import Path
from saeflow.stores import write_part
tiny = runpy.run_path(sys.argv[1])
class Slow(tiny["TinySource"]):
    def block(self, split, start, stop):
        time.sleep(0.05)
        return super().block(split, start, stop)
write_part(Slow(), "train", 0, 1, tiny["STORE"], Path(sys.argv[2]))
"""


def test_a_killed_job_started_again_ends_with_the_same_store(
    tmp_path: Path,
    make_source: Callable[..., Any],
    make_store: Callable[..., dict[str, str]],
    store_params: dict[str, Any],
    source_params: dict[str, Any],
) -> None:
    expected = make_store(tmp_path / "undisturbed", make_source())
    part = tmp_path / "part"
    part.mkdir()
    job = subprocess.Popen([sys.executable, "-c", KILLED, CONFTEST, part])
    while len(list(part.glob("*/*.safetensors"))) < 5:
        assert job.poll() is None
        time.sleep(0.005)
    job.send_signal(signal.SIGKILL)
    job.wait()
    finished = len(list(part.glob("b/*.safetensors")))
    assert finished < 10
    source = make_source()
    write_part(source, "train", 0, 1, store_params, part)
    assert len(source.asked) <= 10 - finished
    merged = tmp_path / "merged"
    merged.mkdir()
    found = finalise([part], "tiny", source_params, "train", store_params, {}, merged)
    assert found == expected
    assert files(merged / "a.zarr" / "activations") == files(
        tmp_path / "undisturbed" / "a.zarr" / "activations"
    )


def test_a_full_disk_leaves_whole_blocks_only_and_the_next_run_goes_on(
    tmp_path: Path, make_source: Callable[..., Any], store_params: dict[str, Any]
) -> None:
    (tmp_path / "undisturbed").mkdir()
    part = tmp_path / "part"
    part.mkdir()
    write_part(make_source(), "train", 0, 1, store_params, tmp_path / "undisturbed")
    expected = files(tmp_path / "undisturbed")
    largest = max(len(data) for data in expected.values())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, hard))
    try:
        with pytest.raises(Exception, match=r"(?i)file too large"):
            write_part(make_source(), "train", 0, 1, store_params, part)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = files(part)
    assert all(expected[name] == data for name, data in left.items())
    write_part(make_source(), "train", 0, 1, store_params, part)
    assert files(part) == expected


class Spoiled:
    """The tiny source with one value changed: context 9, position 2, unit 3 of hook point b."""

    def __init__(self, source: Any, value: float) -> None:
        self._source, self._value = source, value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def block(self, split: str, start: int, stop: int) -> Any:
        block = self._source.block(split, start, stop)
        if start <= 9 < stop:
            block.activations["b"][(9 - start) * 7 + 2, 3] = self._value
        return block


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_refused_and_named(
    tmp_path: Path, source: Any, store_params: dict[str, Any], value: float, dtype: str
) -> None:
    with pytest.raises(UserError, match=r"b: .*finite.* context 9, position 2, unit 3") as error:
        write_part(
            Spoiled(source, value), "train", 0, 1, {**store_params, "dtype": dtype}, tmp_path
        )
    assert str(value) in str(error.value)
    assert not list(tmp_path.rglob("*.partial"))


def test_values_too_large_for_float16_are_refused_with_the_way_out(
    tmp_path: Path, source: Any, store_params: dict[str, Any]
) -> None:
    spoiled = Spoiled(source, 70_000.0)
    with pytest.raises(UserError, match=r"65504 \(float16\), found 70000.* context 9.*bfloat16"):
        write_part(spoiled, "train", 0, 1, {**store_params, "dtype": "float16"}, tmp_path)
    write_part(spoiled, "train", 0, 1, {**store_params, "dtype": "bfloat16"}, tmp_path)


def test_a_store_keeps_the_dtype_it_was_asked_for(
    tmp_path: Path, make_source: Callable[..., Any], make_store: Callable[..., Any],
    store_params: dict[str, Any],
) -> None:  # fmt: skip
    rows = torch.from_numpy(make_source().all_rows("train", "a"))
    places = torch.from_numpy(Permutation(259, 5).forward(np.arange(259)))
    for name in ("float32", "float16", "bfloat16"):
        make_store(tmp_path / name, make_source(), {**store_params, "dtype": name})
        store = open_store(tmp_path / name / "a.zarr")
        assert store.dtype == getattr(torch, name)
        assert torch.equal(store.read(0, 259)[places], rows.to(store.dtype))
    make_store(tmp_path / "int8", make_source(), {**store_params, "dtype": "int8"})
    store = open_store(tmp_path / "int8" / "a.zarr")
    scale = np.abs(rows.numpy()).max(1, keepdims=True) / np.float32(127)
    assert (store.d_in, store.dtype) == (6, torch.float32)
    assert torch.equal(
        store.read(0, 259)[places], torch.from_numpy(np.rint(rows.numpy() / scale) * scale)
    )
    assert verify(store.path) == store.attrs["content_digest"]
