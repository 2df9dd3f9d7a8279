"""One thread for every test, a store held in memory, and a results folder with real stores, a model and SAEs."""

import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from saeflow.config import SPLITS, SAEConfig, TrainingConfig
from saeflow.evaluation import Folders, Setup
from saeflow.evaluation.in_model.text import write_clean
from saeflow.sources import open_source, prepare_inputs
from saeflow.stores import finalise, open_store, write_part
from saeflow.training import train

HOOK_POINT = "blocks.1.resid_post"
STORE = {
    "dtype": "float32", "chunk_rows": 64, "shard_rows": 256, "codec": "none", "block_contexts": 4,
    "seed": 0,
}  # fmt: skip
TEXT = {
    "kind": "text", "hook_points": [HOOK_POINT], "context_length": 16, "skip_first": True,
    "max_norm_multiple": 10, "forward_batch": 4, "text": {"files": [], "column": "text"},
}  # fmt: skip
SYNTHETIC = {
    "kind": "synthetic", "hook_points": ["features"], "d_in": 12, "n_features": 12,
    "coherence": 0.1, "l0_law": {"kind": "uniform", "smallest": 1, "largest": 5},
    "frequency_exponent": 0, "correlation": None, "hierarchy": None,
    "coefficient": {"kind": "normal", "mean": 1.0, "std": 0.2}, "noise_std": 0.0,
    "skip_first": False, "max_norm_multiple": None, "seed": 0,
}  # fmt: skip
EVALUATION = {
    "batch_size": 100, "skip_first": True, "max_norm_multiple": 10, "ce_contexts": 6, "dimension": None,
    "bootstrap": {"resamples": 100, "seed": 0}, "contexts_listed": 5,
}  # fmt: skip


class MemoryStore:
    """The reading side of a store, over an array."""

    has_rows = True

    def __init__(self, x: np.ndarray, **columns: np.ndarray) -> None:
        self.x, self.columns, self.path = torch.tensor(x, dtype=torch.float32), columns, Path("m")
        self.rows, self.d_in = self.x.shape
        self.mean = self.x.double().mean(0)

    def in_order(self, batch_size: int) -> Iterator[tuple[int, torch.Tensor]]:
        for start in range(0, self.rows, batch_size):
            yield start, self.x[start : start + batch_size]

    def column(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.columns[name][start:stop]


@pytest.fixture
def memory_store() -> type[MemoryStore]:
    return MemoryStore


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tiny matrices: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_stores(
    results: Path, name: str, params: Mapping[str, Any], splits: Sequence[str] = SPLITS
) -> None:
    source = open_source(params, results / "sources" / name, "cpu")
    for split in splits:
        part, folder = results / "parts" / name / split, results / "stores" / name / split
        part.mkdir(parents=True)
        folder.mkdir(parents=True)
        write_part(source, split, 0, 1, STORE, part)
        finalise([part], name, params, split, STORE, {}, folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 50 tokens: 20 begin a word, 18 go on with one, 6 are numbers, 4 are signs."""
    letters = string.ascii_lowercase
    words = [
        "<s>",
        "\n",
        *(f" {c.upper()}a" for c in letters[:8]),
        *(f" {c}e" for c in letters[:12]),
    ]
    words += [*(f"{c}i" for c in letters[:18]), *map(str, range(6)), ".", ",", "!", " ("]
    vocabulary = {word: i for i, word in enumerate(words)}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    whole.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>")


@pytest.fixture(scope="session")
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
    make_tokenizer().save_pretrained(text / "model")
    (text / "inputs").mkdir()
    rng = np.random.default_rng(0)
    for split, contexts in (("train", 40), ("evaluation", 12)):
        ids = rng.integers(0, 50, (contexts, 16)).astype(np.int32)
        np.save(text / "inputs" / f"{split}.npy", ids)
        np.save(text / "inputs" / f"{split}_documents.npy", np.arange(contexts) // 2)
    make_stores(root, "tiny", TEXT)
    clean = root / "evaluations" / "tiny" / HOOK_POINT / "clean"
    clean.mkdir(parents=True)
    mean = open_store(root / "stores" / "tiny" / "train" / f"{HOOK_POINT}.zarr").mean
    write_clean(TEXT, text, HOOK_POINT, mean, EVALUATION, {}, "cpu", clean)
    return root


def reads_in(results: Path, source: str, hook_point: str, *others: str) -> dict[str, Path]:
    """Folders of a results folder by the roles under which evaluations read them; those that are there."""
    evaluations = results / "evaluations" / source / hook_point
    roles = {
        "train": results / "stores" / source / "train",
        "evaluation": results / "stores" / source / "evaluation",
        "model": results / "sources" / source / "model",
        "inputs": results / "sources" / source / "inputs",
        "clean": evaluations / "clean",
    }
    for other in others:
        roles[f"on/{other}/evaluation"] = results / "stores" / other / "evaluation"
        roles[f"on/{other}/inputs"] = results / "sources" / other / "inputs"
        roles[f"on/{other}/clean"] = evaluations / "on" / other
    return {role: path for role, path in roles.items() if path.exists()}


def setup_in(
    results: Path, source: str, hook_point: str, settings: Mapping[str, Any], device: str
) -> Setup:
    """The setup of a source in a results folder."""
    folders = Folders.of(reads_in(results, source, hook_point))
    return Setup(folders, source, hook_point, settings, device)


def train_sae(results: Path, source: str, hook_point: str, variant: str, seed: int = 0) -> Path:
    """Folder of a briefly trained SAE."""
    options: dict[str, Any] = {"k": 4, "k_schedule": {"kind": "constant"}, "auxk_weight": 0.03125}
    if variant == "batch_topk":
        options["threshold_start_step"] = 0
    if variant == "relu":
        options = {"l1": 0.5, "l1_schedule": {"kind": "constant"}}
    name = f"{source}/{hook_point}/{variant}/d24-seed{seed}"
    config = SAEConfig(
        name=name, entry=variant, variant=variant, source=source, hook_point=hook_point, d_sae=24,
        seed=seed, options=options,
        training=TrainingConfig(
            tokens=12800, batch_size=64, input_scale="unit", lr=3e-3, betas=(0.9, 0.999),
            lr_warmup_steps=10, lr_decay_fraction=0.2, grad_clip=1.0, dead_after_tokens=4000, train_decoder=True,
            log_every_steps=100,
        ),
    )  # fmt: skip
    folder = results / "saes" / name
    if not folder.exists():
        folder.mkdir(parents=True)
        store = open_store(results / "stores" / source / "train" / f"{hook_point}.zarr")
        runtime = {"device": "cpu", "precision": "fp32", "checkpoint_every_s": 1000}
        train(store, config, runtime, folder)
    return folder
