"""Opening, reading and verifying stores; damage of any kind is found and named."""

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from saeflow.errors import UserError
from saeflow.files import write_json
from saeflow.sources import open_source, prepare_inputs
from saeflow.stores import Store, check_compatible, finalise, open_store, verify, write_part
from saeflow.stores.content import metadata_digest


@pytest.fixture
def store(tmp_path: Path, source: Any, make_store: Callable[..., Any]) -> Store:
    make_store(tmp_path / "s", source)
    return open_store(tmp_path / "s" / "a.zarr")


def test_zarr_reads_the_same_rows(store: Store) -> None:
    group: Any = zarr.open_group(store.path, mode="r")
    np.testing.assert_array_equal(group["activations"][:], store.read(0, store.rows).numpy())
    for name in store.columns:
        np.testing.assert_array_equal(group[name][:], store.column(name))
    assert dict(group.attrs) == store.attrs


def test_slices_follow_python(store: Store) -> None:
    rows = store.read(0, store.rows)
    for start, stop in [(0, 1), (10, 50), (250, 300), (300, 400), (20, 10)]:
        assert torch.equal(store.read(start, stop), rows[start:stop])
        np.testing.assert_array_equal(
            store.column("token", start, stop), store.column("token")[start:stop]
        )


@pytest.mark.parametrize("batch_size", [1, 16, 100, 259, 1000])
def test_in_order_gives_every_row_once_with_its_number(store: Store, batch_size: int) -> None:
    given = list(store.in_order(batch_size))
    assert [start for start, _ in given] == list(range(0, 259, batch_size))
    assert torch.equal(torch.cat([rows for _, rows in given]), store.read(0, 259))


def test_verify_returns_the_content_digest(store: Store) -> None:
    assert verify(store.path) == store.attrs["content_digest"]


def flips(path: Path, most: int) -> Iterator[int]:
    """Flip one byte of a file after the other, at most some, both ends included."""
    whole = path.read_bytes()
    for position in np.unique(np.linspace(0, len(whole) - 1, most).astype(int)).tolist():
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        yield position
    path.write_bytes(whole)


def test_a_flipped_byte_of_any_file_is_found_and_named(store: Store) -> None:
    found = 0
    for path in sorted(path for path in store.path.rglob("*") if path.is_file()):
        for _ in flips(path, most=25):
            with pytest.raises(UserError) as error:
                verify(store.path)
            named = str(error.value).split(": ")[0]
            assert path == Path(named) or path.name == "zarr.json"
            assert str(store.path) in named
            assert "\n" not in str(error.value)
            found += 1
    assert found > 400
    verify(store.path)


def test_damage_is_found_when_rows_are_read(store: Store) -> None:
    shard = store.path / "activations" / "c" / "1" / "0"
    for _ in flips(shard, most=40):
        with pytest.raises(UserError, match="activations/c/1/0"):
            open_store(store.path).read(0, store.rows)
        with pytest.raises(UserError, match="activations/c/1/0"):
            list(islice(open_store(store.path).batches(32, seed=0), 9))


def test_rows_swapped_with_valid_checksums_are_found(store: Store) -> None:
    shards = [store.path / "activations" / "c" / str(i) / "0" for i in (0, 1)]
    first, second = (shard.read_bytes() for shard in shards)
    shards[0].write_bytes(second)
    shards[1].write_bytes(first)
    open_store(store.path).read(0, store.rows)  # each chunk is whole
    with pytest.raises(UserError, match="digest"):
        verify(store.path)


def test_a_missing_shard_column_or_group_is_named(store: Store, tmp_path: Path) -> None:
    copy = tmp_path / "copy.zarr"
    for gone in ("activations/c/4/0", "context/c/0", "token/zarr.json", "zarr.json"):
        shutil.copytree(store.path, copy)
        (copy / gone).unlink()
        with pytest.raises(UserError, match=str(copy)):
            open_store(copy)
        shutil.rmtree(copy)
    with pytest.raises(UserError, match="no such store"):
        open_store(copy)


def test_foreign_zarr_data_are_refused(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "foreign.zarr")
    group.create_array("activations", shape=(10, 4), dtype="f4")
    with pytest.raises(UserError, match="expected a store that saeflow wrote"):
        open_store(tmp_path / "foreign.zarr")


def test_another_version_is_refused(store: Store) -> None:
    meta = json.loads((store.path / "zarr.json").read_text())
    meta["attributes"]["format_version"] = 99
    write_json(store.path / "zarr.json", meta)
    with pytest.raises(UserError, match="expected format version 1 or 2, found 99"):
        open_store(store.path)


def test_edited_attributes_are_refused(store: Store) -> None:
    zarr.open_group(store.path, mode="r+").attrs["scale"] = 1.0
    with pytest.raises(UserError, match="metadata"):
        open_store(store.path)


def test_rows_that_are_not_finite_are_named(store: Store) -> None:
    """As another program would write them: checksums and metadata fit."""
    group: Any = zarr.open_group(store.path, mode="r+")
    group["activations"][50, 2] = np.nan
    attrs = {**store.attrs, "metadata_digest": metadata_digest(store.path, store.attrs)}
    group.attrs.put(attrs)
    spoiled = open_store(store.path)
    with pytest.raises(UserError, match="not finite in rows 40 to 59"):
        spoiled.read(40, 60)
    with pytest.raises(UserError, match="not finite"):
        verify(store.path)
    assert torch.isfinite(spoiled.read(51, 259)).all()


def test_an_unknown_column_is_refused_with_those_there_are(store: Store) -> None:
    with pytest.raises(
        UserError, match="expected a column 'label', found context, position, token"
    ):
        store.column("label")


def test_a_width_that_does_not_fit_is_refused(store: Store) -> None:
    check_compatible(store, d_in=6, what="SAE topk")
    with pytest.raises(UserError, match="width 6, but SAE topk expects 768"):
        check_compatible(store, d_in=768, what="SAE topk")


SYNTHETIC = {
    "kind": "synthetic", "hook_points": ["features"], "d_in": 16, "n_features": 32, "coherence": None,
    "l0_law": {"kind": "constant", "mean": 4}, "frequency_exponent": 0.5, "correlation": None,
    "hierarchy": None, "coefficient": {"kind": "normal", "mean": 1.0, "std": 0.1}, "noise_std": 0.01,
    "skip_first": False, "max_norm_multiple": None, "seed": 0,
}  # fmt: skip


def test_a_store_of_the_synthetic_source_holds_its_truth(
    tmp_path: Path, store_params: dict[str, Any]
) -> None:
    inputs = tmp_path / "source" / "inputs"
    inputs.mkdir(parents=True)
    prepare_inputs(SYNTHETIC, {"train": 1000, "evaluation": 200}, tmp_path / "none", inputs)
    source = open_source(SYNTHETIC, tmp_path / "source", "cpu")
    digests = set()
    for parts in (1, 3):
        folders = [tmp_path / f"{part}-of-{parts}" for part in range(parts)]
        for part, folder in enumerate(folders):
            folder.mkdir()
            write_part(source, "train", part, parts, store_params, folder)
        out = tmp_path / f"store-{parts}"
        out.mkdir()
        digests |= set(finalise(folders, "s", SYNTHETIC, "train", store_params, {}, out).values())
    assert len(digests) == 1
    store = open_store(tmp_path / "store-1" / "features.zarr")
    verify(store.path)
    block = source.block("train", 0, source.n_contexts("train"))
    where = store.column("context") * source.rows_per_context + store.column("position")
    assert store.rows == len(where) >= 1000
    assert torch.equal(store.read(0, store.rows), block.activations["features"][where])
    for name in ("true_indices", "true_values"):
        np.testing.assert_array_equal(store.column(name), block.columns[name][where])
