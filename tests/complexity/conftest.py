"""A text source with a real small tokenizer and model, and its stores."""

from pathlib import Path
from typing import Any

import pytest

from saeflow.sources import open_source, prepare_inputs
from saeflow.stores import finalise, open_store, write_part

from ..sources.conftest import model_folder, one_thread, tokenizer

__all__ = ["model_folder", "one_thread", "tokenizer"]

HOOK_POINT = "blocks.2.resid_post"
STORE = {
    "dtype": "float32", "chunk_rows": 64, "shard_rows": 256, "codec": "none", "block_contexts": 4,
    "seed": 0,
}  # fmt: skip


@pytest.fixture(scope="session")
def text(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Parameters and folder of a prepared text source."""
    root = tmp_path_factory.mktemp("complexity")
    params: dict[str, Any] = {
        "kind": "text", "model": {"folder": str(model_folder)}, "hook_points": [HOOK_POINT],
        "text": {"bundled": "english"}, "evaluation_share": 0.3, "context_length": 32, "prepend_bos": True, "skip_first": True, "max_norm_multiple": 10,
        "forward_batch": 4, "contexts_per_document": 4, "shared_run": 13, "seed": 0,
    }  # fmt: skip
    folder = root / "sources" / "tiny"
    (folder / "inputs").mkdir(parents=True)
    (folder / "model").symlink_to(model_folder)
    rows = {"train": 40 * 31, "evaluation": 12 * 31}
    prepare_inputs(params, rows, folder / "model", folder / "inputs")
    return params, folder


@pytest.fixture(scope="session")
def stores(text: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Opened stores by split."""
    params, folder = text
    root = tmp_path_factory.mktemp("stores")
    source, opened = open_source(params, folder, "cpu"), {}
    for split in ("train", "evaluation"):
        part, out = root / f"{split}.part", root / split
        part.mkdir()
        out.mkdir()
        write_part(source, split, 0, 1, STORE, part)
        finalise([part], "tiny", params, split, STORE, {}, out)
        opened[split] = open_store(out / f"{HOOK_POINT}.zarr")
    return opened
