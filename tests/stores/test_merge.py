"""Merging blocks: the content of a store against direct computation, whatever the parts and chunks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saeflow.errors import UserError
from saeflow.sources.base import Block
from saeflow.stores import content, finalise, merge, open_store, verify, write_part
from saeflow.stores.blocks import BlockFile
from saeflow.stores.permutation import Permutation

MakeStore = Callable[..., dict[str, str]]


@pytest.mark.parametrize("parts", [2, 5, 23])
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_any_number_of_parts_gives_the_same_store(
    tmp_path: Path, source: Any, make_store: MakeStore, store_params: dict[str, Any], parts: int, codec: str
) -> None:  # fmt: skip
    params = {**store_params, "codec": codec}
    one = make_store(tmp_path / "one", source, params)
    many = make_store(tmp_path / "many", source, params, parts=parts)
    assert one == many
    for path in (tmp_path / "one").rglob("*"):
        if path.is_file():
            other = tmp_path / "many" / path.relative_to(tmp_path / "one")
            assert path.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "changed",
    [
        {"chunk_rows": 8}, {"shard_rows": 16}, {"chunk_rows": 32, "shard_rows": 512}, {"codec": "zstd"},
        {"block_contexts": 1}, {"block_contexts": 100},
    ],
    ids=str,
)  # fmt: skip
def test_the_content_digest_sees_content_only(
    tmp_path: Path,
    source: Any,
    make_store: MakeStore,
    store_params: dict[str, Any],
    changed: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = make_store(tmp_path / "one", source)
    monkeypatch.setattr(merge, "GATHERED_BYTES", (3000, 3000))
    assert make_store(tmp_path / "other", source, {**store_params, **changed}) == expected
    assert verify(tmp_path / "other" / "b.zarr") == expected["b"]


@pytest.mark.parametrize("changed", [{"seed": 6}, {"dtype": "bfloat16"}], ids=str)
def test_other_content_has_another_digest(
    tmp_path: Path, source: Any, make_store: MakeStore, store_params: dict[str, Any],
    changed: dict[str, Any],
) -> None:  # fmt: skip
    one = make_store(tmp_path / "one", source)
    other = make_store(tmp_path / "other", source, {**store_params, **changed})
    assert one["a"] != other["a"]
    assert one["a"] != one["b"]


def test_source_parameters_enter_the_digest(
    tmp_path: Path, source: Any, make_store: MakeStore, source_params: dict[str, Any]
) -> None:
    one = make_store(tmp_path / "one", source)
    other = make_store(tmp_path / "other", source, params={**source_params, "context_length": 9})
    assert one != other


def test_rows_lie_at_their_places_with_their_columns(
    tmp_path: Path, source: Any, make_store: MakeStore
) -> None:
    make_store(tmp_path / "s", source, parts=3)
    store = open_store(tmp_path / "s" / "a.zarr")
    ids = Permutation(259, 5).inverse(np.arange(259))
    np.testing.assert_array_equal(store.read(0, 259).numpy(), source.all_rows("train", "a")[ids])
    np.testing.assert_array_equal(store.column("context"), ids // 7)
    np.testing.assert_array_equal(store.column("position"), ids % 7)
    np.testing.assert_array_equal(store.column("token", 5, 9), (ids // 7 * 100 + ids % 7)[5:9])


def test_attributes_hold_the_moments_and_the_facts(
    tmp_path: Path, source: Any, make_store: MakeStore
) -> None:
    digests = make_store(tmp_path / "s", source)
    store = open_store(tmp_path / "s" / "b.zarr")
    rows = source.all_rows("train", "b").astype(np.float64)
    np.testing.assert_allclose(store.mean.numpy(), rows.mean(0), rtol=0, atol=1e-15)
    assert store.scale == pytest.approx(np.sqrt((rows**2).sum(1).mean() / 6), rel=1e-14)
    assert store.median_norm == pytest.approx(np.median(np.linalg.norm(rows, axis=1)), rel=1e-6)
    attrs = store.attrs
    assert attrs["content_digest"] == digests["b"]
    assert (attrs["source"], attrs["split"], attrs["hook_point"]) == ("tiny", "train", "b")
    assert attrs["made_from"] == {"model": "0" * 64}
    assert (attrs["rows"], attrs["raw_rows"], attrs["dropped_rows"]) == (259, 259, 0)
    assert attrs["source_params"]["kind"] == "tiny"
    assert attrs["software"]["zarr"]


class Sinks:
    """The tiny source with position 0 of every fifth context 40 times as long."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def block(self, split: str, start: int, stop: int) -> Any:
        block = self._source.block(split, start, stop)
        long = (block.columns["position"] == 0) & (block.columns["context"] % 5 == 0)
        for x in block.activations.values():
            x[torch.from_numpy(long)] *= 40
        return block


@pytest.mark.parametrize("gathered", [500, 1 << 24])
def test_outlying_rows_are_dropped_from_the_training_split_only(
    tmp_path: Path, source: Any, make_store: MakeStore, source_params: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch, gathered: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(merge, "GATHERED_BYTES", (gathered, gathered))
    params = {**source_params, "max_norm_multiple": 10}
    make_store(tmp_path / "train", Sinks(source), params=params, parts=2)
    store = open_store(tmp_path / "train" / "a.zarr")
    blocks = Sinks(source).block("train", 0, 37)
    raw = blocks.activations["a"].numpy()
    norms = np.linalg.norm(raw.astype(float), axis=1)
    ids = Permutation(259, 5).inverse(np.arange(259))
    kept = ids[norms[ids] <= 10 * np.median(norms)]
    assert 0 < 259 - len(kept) <= 8
    assert (store.rows, store.attrs["dropped_rows"]) == (len(kept), 259 - len(kept))
    np.testing.assert_array_equal(store.read(0, store.rows).numpy(), raw[kept])
    np.testing.assert_array_equal(store.column("context"), kept // 7)
    np.testing.assert_allclose(store.mean.numpy(), raw[kept].astype(float).mean(0), atol=1e-15)
    assert store.median_norm == pytest.approx(np.median(norms), rel=1e-6)
    verify(store.path)
    make_store(tmp_path / "evaluation", Sinks(source), params=params, split="evaluation")
    assert open_store(tmp_path / "evaluation" / "a.zarr").rows == 70


@pytest.mark.parametrize("contexts", [1, 2, 8, 33])
def test_the_median_is_exact(
    tmp_path: Path, make_source: Callable[..., Any], store_params: dict[str, Any], contexts: int
) -> None:
    source = make_source({"train": contexts}, rows_per_context=5)
    write_part(source, "train", 0, 1, store_params, tmp_path)
    blocks = [BlockFile.open(path) for path in sorted((tmp_path / "a").iterdir())]
    norms = np.concatenate([block.read("norm") for block in blocks])
    expected = np.median(norms.astype(np.float64))
    assert merge.median_norm(blocks) == expected


def test_sums_do_not_depend_on_how_rows_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "PIECE_ROWS", 16)
    rows = np.random.default_rng(0).standard_normal((500, 3), np.float32)
    cuts = [[500], [1] * 500, [7, 100, 16, 16, 361], [499, 1]]
    for sizes in cuts:
        windows = np.split(rows, np.cumsum(sizes)[:-1])
        pieces = list(content.in_pieces({"activations": w, "n": w[:, 0]} for w in windows))
        assert [len(p["activations"]) for p in pieces] == [16] * 31 + [4]
        np.testing.assert_array_equal(np.concatenate([p["activations"] for p in pieces]), rows)
        np.testing.assert_array_equal(np.concatenate([p["n"] for p in pieces]), rows[:, 0])


@pytest.fixture
def part(tmp_path: Path, source: Any, store_params: dict[str, Any]) -> Path:
    folder = tmp_path / "part"
    folder.mkdir()
    write_part(source, "train", 0, 1, store_params, folder)
    return folder


def merge_part(parts: list[Path], store: dict[str, Any], source: dict[str, Any]) -> None:
    out = parts[0].parent / "out"
    out.mkdir()
    finalise(parts, "tiny", source, "train", store, {}, out)


def test_a_missing_block_is_named(
    part: Path, store_params: dict[str, Any], source_params: dict[str, Any]
) -> None:
    (part / "b" / "00000004.safetensors").unlink()
    with pytest.raises(UserError, match=r"every block of b once, found them without block 4"):
        merge_part([part], store_params, source_params)


def test_a_part_given_twice_is_refused(
    part: Path, store_params: dict[str, Any], source_params: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="given twice"):
        merge_part([part, part], store_params, source_params)


def test_no_parts_are_refused(
    tmp_path: Path, store_params: dict[str, Any], source_params: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="no blocks of a"):
        merge_part([tmp_path / "nowhere"], store_params, source_params)


def test_blocks_of_another_extraction_are_refused(
    part: Path, store_params: dict[str, Any], source_params: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="expected a block with seed 6, found 5"):
        merge_part([part], {**store_params, "seed": 6}, source_params)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_block_is_named(
    part: Path, store_params: dict[str, Any], source_params: dict[str, Any], length: int
) -> None:
    path = part / "a" / "00000003.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"a/00000003\.safetensors"):
        merge_part([part], store_params, source_params)


class Flat:
    """A source whose rows are made by hand: (contexts, rows, d_in)."""

    hook_points = ("a",)

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows, self.rows_per_context = rows, rows.shape[1]
        self.d_in, self.columns = {"a": rows.shape[2]}, {}

    def n_contexts(self, split: str) -> int:
        return len(self.rows)

    def block(self, split: str, start: int, stop: int) -> Any:
        return Block({"a": self.rows[start:stop].flatten(0, 1)}, {})


@pytest.mark.parametrize(
    ("rows", "limit", "message"),
    [
        (torch.zeros(6, 4, 3), None, "train a: all 24 activations are zero"),
        (torch.zeros(6, 4, 3), 10, "train a: half of the activations or more are zero"),
        (torch.full((6, 4, 3), 1e-41), None, "train a: all 24 activations are zero"),  # subnormal
        (torch.full((6, 4, 3), 2.5), None, "train a: all 24 activations are equal"),
        (
            torch.cat([torch.zeros(4, 4, 3), torch.randn(2, 4, 3)]), 10, "half of the activations or more are zero"
        ),
    ],
)  # fmt: skip
def test_activations_that_an_sae_cannot_learn_from_are_named(
    rows: torch.Tensor, limit: float | None, message: str, tmp_path: Path, store_params: dict[str, Any]
) -> None:  # fmt: skip
    source = Flat(rows)
    (tmp_path / "part").mkdir()
    (tmp_path / "out").mkdir()
    write_part(source, "train", 0, 1, store_params, tmp_path / "part")
    params = {"hook_points": ["a"], "max_norm_multiple": limit}
    with pytest.raises(UserError, match=message) as caught:
        finalise([tmp_path / "part"], "lm", params, "train", store_params, {}, tmp_path / "out")
    assert str(caught.value).startswith("stores.lm: ")


def test_zeros_among_other_activations_are_kept(
    tmp_path: Path, store_params: dict[str, Any]
) -> None:
    rows = torch.cat([torch.zeros(4, 4, 3), torch.ones(2, 4, 3)])
    (tmp_path / "part").mkdir()
    (tmp_path / "out").mkdir()
    write_part(Flat(rows), "train", 0, 1, store_params, tmp_path / "part")
    params = {"hook_points": ["a"], "max_norm_multiple": None}
    finalise([tmp_path / "part"], "lm", params, "train", store_params, {}, tmp_path / "out")
    store = open_store(tmp_path / "out" / "a.zarr")
    assert store.rows == 24
    assert store.scale == pytest.approx((8 / 24) ** 0.5)
