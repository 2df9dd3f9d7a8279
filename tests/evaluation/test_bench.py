"""Real stores, a real model in the loop and real SAEs, from folders to tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from saeflow.errors import UserError
from saeflow.evaluation import Bench, evaluate_baselines
from saeflow.evaluation.splice import write_clean
from saeflow.sources import open_source, prepare_inputs
from saeflow.stores import finalise, open_store, write_part

HOOK_POINT = "blocks.1.resid_post"
STORE = {
    "dtype": "float32", "chunk_rows": 64, "shard_rows": 256, "codec": "none", "block_contexts": 4,
    "seed": 0,
}  # fmt: skip
TEXT = {
    "kind": "text", "hook_points": [HOOK_POINT], "context_length": 16, "skip_first": True,
    "max_norm_multiple": 10, "forward_batch": 4,
}  # fmt: skip
SYNTHETIC = {
    "kind": "synthetic", "hook_points": ["features"], "d_in": 12, "n_features": 16,
    "coherence": None, "l0_law": {"kind": "uniform", "smallest": 1, "largest": 5},
    "frequency_exponent": 0, "correlation": None, "hierarchy": None,
    "coefficient": {"kind": "normal", "mean": 1.0, "std": 0.2}, "noise_std": 0.0,
    "skip_first": False, "max_norm_multiple": None, "seed": 0,
}  # fmt: skip
EVALUATION = {"batch_size": 100, "skip_first": True, "max_norm_multiple": 10, "ce_contexts": 6}


def make_stores(results: Path, name: str, params: Mapping[str, Any]) -> None:
    source = open_source(params, results / "sources" / name, "cpu")
    for split in ("train", "evaluation"):
        part, folder = results / "parts" / name / split, results / "stores" / name / split
        part.mkdir(parents=True)
        folder.mkdir(parents=True)
        write_part(source, split, 0, 1, STORE, part)
        finalise([part], name, params, split, STORE, {}, folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with a synthetic source, and a text source with its clean side."""
    root = tmp_path_factory.mktemp("results")
    synthetic = root / "sources" / "synthetic"
    (synthetic / "inputs").mkdir(parents=True)
    rows = {"train": 1024, "evaluation": 512}
    prepare_inputs(SYNTHETIC, rows, synthetic / "model", synthetic / "inputs")
    make_stores(root, "synthetic", SYNTHETIC)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=12, intermediate_size=20, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=32, initializer_range=0.3,
        )
    )  # fmt: skip
    text = root / "sources" / "tiny"
    model.save_pretrained(text / "model")
    (text / "inputs").mkdir()
    rng = np.random.default_rng(0)
    for split, contexts in (("train", 40), ("evaluation", 12)):
        ids = rng.integers(0, 50, (contexts, 16)).astype(np.int32)
        np.save(text / "inputs" / f"{split}.npy", ids)
    make_stores(root, "tiny", TEXT)
    clean = root / "evaluations" / "tiny" / HOOK_POINT / "clean"
    clean.mkdir(parents=True)
    mean = open_store(root / "stores" / "tiny" / "train" / f"{HOOK_POINT}.zarr").mean
    write_clean(TEXT, text, HOOK_POINT, mean.numpy(), EVALUATION["ce_contexts"], "cpu", clean)
    return root


def wide(folder: Path) -> pd.DataFrame:
    """One row per run, one column per metric."""
    table = pd.read_csv(folder / "metrics.csv")
    return table.pivot(index="run", columns="metric", values="value")


def test_baselines_of_text_go_through_the_model(results: Path, tmp_path: Path) -> None:
    bench = Bench(results, "tiny", HOOK_POINT, EVALUATION, "cpu")
    evaluate_baselines([3, 6], bench, tmp_path)
    table = wide(tmp_path)
    identity, mean, pca3, pca6 = (
        table.loc[f"tiny/{HOOK_POINT}/{name}"]
        for name in ("identity/k12", "mean/k0", "pca/k3", "pca/k6")
    )
    assert identity.fvu == 0
    assert identity.ce_degradation == pytest.approx(0, abs=1e-6)
    assert mean.ce_spliced == pytest.approx(mean.ce_mean, abs=1e-6)
    assert 0 < pca6.fvu < pca3.fvu < mean.fvu
    assert 0 < pca6.kl < pca3.kl < mean.kl
    assert (table.rows == 12 * 15).all()
    assert (table.first_position_excluded == 1).all()
    assert (table.ce_first_position_kept == 1).all()
    assert (table.max_norm_multiple == 10).all()
    assert set(bench.inputs) == {
        results / "stores/tiny/train", results / "stores/tiny/evaluation",
        results / "sources/tiny/model", results / f"evaluations/tiny/{HOOK_POINT}/clean",
    }  # fmt: skip


def test_baselines_of_synthetic_data_have_no_recovery(results: Path, tmp_path: Path) -> None:
    bench = Bench(results, "synthetic", "features", EVALUATION, "cpu")
    evaluate_baselines([2, 400], bench, tmp_path)
    table = wide(tmp_path)
    assert list(table.index) == [
        "synthetic/features/identity/k12", "synthetic/features/mean/k0", "synthetic/features/pca/k2",
    ]  # fmt: skip
    assert not {"mmcs", "support_f1", "ce_clean"} & set(table.columns)
    assert (table.first_position_excluded == 0).all()  # contexts mean nothing there


class Oracle(torch.nn.Module):
    """The true dictionary as an SAE, with the true coefficients found by lookup."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.W_dec = torch.nn.Parameter(features.flip(0))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents @ self.W_dec

    def allowed_k(self, x: torch.Tensor) -> None:
        return None


def test_the_true_code_is_recovered_whole(results: Path) -> None:
    """Latents put at the true features give support F1, MMCS and explained variance 1."""
    bench = Bench(results, "synthetic", "features", EVALUATION, "cpu")
    features = load_file(results / "sources/synthetic/inputs/dictionary.safetensors")["features"]
    store, place = bench.held_out, {}
    indices, values = store.column("true_indices"), store.column("true_values")
    for row, x in enumerate(store.read(0, store.rows)):
        place[x.numpy().tobytes()] = row
    oracle = Oracle(features)

    def encode(x: torch.Tensor) -> torch.Tensor:
        latents = torch.zeros(len(x), 16)
        for i, row in enumerate(place[one.numpy().tobytes()] for one in x):
            on = indices[row] >= 0
            latents[i, 15 - indices[row][on]] = torch.tensor(values[row][on])
        return latents

    oracle.encode = encode
    got = bench.measure(oracle, recovery=True).metrics
    for name in ("mmcs", "mcc", "support_precision", "support_recall", "support_f1"):
        assert got[name] == pytest.approx(1, abs=1e-6), name
    assert got["spearman_l0_true"] == pytest.approx(1, abs=1e-12)
    assert got["explained_variance"] == pytest.approx(1, abs=1e-9)
    assert got["l0_mean"] == got["true_l0_mean"] == (indices >= 0).sum(1).mean()


def test_an_sae_of_another_store_is_refused(results: Path) -> None:
    bench = Bench(results, "synthetic", "features", EVALUATION, "cpu")
    config = {"name": "run", "source": "tiny", "hook_point": HOOK_POINT, "d_in": 12}
    with pytest.raises(UserError, match=rf"activations of tiny/{HOOK_POINT}.*found synthetic/feat"):
        bench.check_fits(config)
    config |= {"source": "synthetic", "hook_point": "features", "d_in": 13}
    with pytest.raises(UserError, match=r"width 13, .* found 12"):
        bench.check_fits(config)
