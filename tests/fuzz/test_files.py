"""A file that rotted is refused by name, or does no harm; nothing else is raised, nothing is run."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saeflow.batch import Batch
from saeflow.errors import UserError
from saeflow.provenance import RECORD, check, job, read_record
from saeflow.saes import build, load, save
from saeflow.stores import open_store
from saeflow.training.checkpoints import checkpoints, read_checkpoint, write_checkpoint

from ..stores.conftest import STORE, TinySource, write_store

DAMAGE = st.tuples(
    st.sampled_from(["flip", "cut", "empty", "longer", "swap"]),
    st.integers(0, 2**31),
    st.integers(0, 7),
)


def damage(path: Path, how: tuple[str, int, int]) -> bool:
    """Change a file's bytes; whether they are others now."""
    kind, place, bit = how
    whole = path.read_bytes()
    rotten = bytearray(whole)
    if kind == "flip" and rotten:
        rotten[place % len(rotten)] ^= 1 << bit
    elif kind == "cut" and rotten:
        del rotten[place % len(rotten) :]
    elif kind == "empty":
        rotten.clear()
    elif kind == "longer":
        rotten += whole[: 1 + place % 64] or b"x"
    elif len(rotten) > 1:
        first = place % (len(rotten) - 1)
        rotten[first], rotten[first + 1] = rotten[first + 1], rotten[first]
    path.write_bytes(bytes(rotten))
    return bytes(rotten) != whole


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def copy_of(folder: Path, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place)
    return place


def unless_refused(work: Callable[[], Any], folder: Path) -> Any:
    """Return the result of the work, None where it is refused in a line that names a file of the folder."""
    try:
        return work()
    except UserError as error:
        said = str(error)
    assert str(folder) in said
    return None


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sae")
    options: dict[str, Any] = {"k": 3, "k_schedule": {"kind": "constant"}, "auxk_weight": 0.03}
    made = build("topk", 6, 12, options)
    made.initialise(Batch.of(torch.randn(20, 6)), torch.Generator().manual_seed(0))
    save(made.state_dict(), folder, {"variant": "topk", "options": options, "d_in": 6, "d_sae": 12})
    return folder


@given(how=DAMAGE, number=st.integers(0, 1))
def test_a_rotten_sae(how: tuple[str, int, int], number: int, sae: Path, tmp_path: Path) -> None:
    folder = copy_of(sae, tmp_path / "sae")
    damage(files(folder)[number], how)
    found = unless_refused(lambda: load(folder), folder)
    if found is not None:  # a weight that is another number; the record of the result tells
        assert all(bool(tensor.isfinite().all()) for tensor in found.state_dict().values())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "store"
    write_store(folder, TinySource(), STORE)
    return next(folder.glob("*.zarr"))


def read_all(path: Path) -> list[Any]:
    """Everything a store gives."""
    found = open_store(path)
    rows = [found.read(0, found.rows).float()]
    columns = [found.column(name) for name in sorted(found.columns)]
    batches = found.batches(4, 0)
    return [*rows, *columns, next(batches).x.float(), found.scale, found.mean]


@given(how=DAMAGE, number=st.integers(0, 1000))
def test_a_rotten_store(
    how: tuple[str, int, int], number: int, store: Path, tmp_path: Path
) -> None:
    folder = copy_of(store, tmp_path / "x.zarr")
    every = files(folder)
    damage(every[number % len(every)], how)
    found = unless_refused(lambda: read_all(folder), folder)
    if found is not None:
        for ours, whole in zip(found, read_all(store), strict=True):
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(whole))


@given(how=DAMAGE)
def test_a_rotten_checkpoint(how: tuple[str, int, int], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_checkpoint(folder, 7, {"a": torch.arange(5.0)}, {"run": "x"})
    (path,) = checkpoints(folder)
    if damage(path, how):
        with pytest.raises(UserError, match="the checkpoint is damaged"):
            read_checkpoint(path)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "result"
    with job(folder, name="fuzz", params={"a": 1}) as running:
        (running.path / "table.csv").write_text("a,b\n1,2\n")
        (running.path / "deep").mkdir()
        (running.path / "deep" / "weights.bin").write_bytes(bytes(range(200)))
    return folder


@given(how=DAMAGE, number=st.integers(0, 2))
def test_a_rotten_result(
    how: tuple[str, int, int], number: int, result: Path, tmp_path: Path
) -> None:
    folder = copy_of(result, tmp_path / "result")
    path = files(folder)[number]
    if not damage(path, how):
        return
    digest = unless_refused(lambda: check(folder), folder)
    if digest is not None:  # other white space in the record, which says the same
        assert path.name == RECORD
        assert read_record(folder) == read_record(result)
