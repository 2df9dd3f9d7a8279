"""Families beside GPT-2 and Llama, and one that no release has: extraction, hooks, cross-entropy and latents' tokens.

Each number is compared with whole forward passes of the model and a hook that is written here for its own list of blocks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from docs.families import tiny_family
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from saeflow.evaluation.in_model.text import NextTokens, write_clean
from saeflow.evaluation.latents import logit_lens
from saeflow.exchange.hook_names import ours, theirs
from saeflow.sources import open_source
from saeflow.sources.heads import final_norm
from saeflow.sources.hook_points import hook
from saeflow.sources.proof import prove

from ..sources.conftest import random_model
from ..sources.toy import toy

CONTEXTS, LENGTH, VOCABULARY, POINT = 5, 12, 320, "blocks.1.resid_post"
BLOCKS = {
    "gptj": "transformer.h", "gpt_neox": "gpt_neox.layers", "mamba": "backbone.layers", "mixtral": "model.layers",
    "olmo2": "model.layers", "toy": "trunk.stages",
}  # fmt: skip
"""Attention beside the MLP, a state space, a mixture of experts, norms behind the parts, and a family of the tests' own."""
IDS = torch.randint(VOCABULARY, (CONTEXTS, LENGTH), generator=torch.Generator().manual_seed(5))


def family(name: str) -> Any:
    if name == "t5":
        sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2}  # fmt: skip
        return random_model("t5", **sizes)
    return toy() if name == "toy" else tiny_family(name)


@contextmanager
def replaced(model: Any, path: str, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace what a module gives; a toy's blocks give a word and then the activation."""

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return replace(output)
        place = next(i for i, x in enumerate(output) if isinstance(x, Tensor))
        return (*output[:place], replace(output[place]), *output[place + 1 :])

    handle = model.get_submodule(path).register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


class Damage(nn.Module):
    """An SAE whose reconstruction is far from perfect and not linear."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.8 * x + 0.1 * torch.relu(x) + 0.05


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        scores: Tensor = model(input_ids=IDS).logits
    return scores


def cross_entropy_of(model: Any) -> float:
    scores = logits_of(model)[:, :-1].double()
    return float(cross_entropy(scores.flatten(0, 1), IDS[:, 1:].flatten()))


def source_of(folder: Path, model: Any) -> dict[str, Any]:
    """Write a source's folder, and give its parameters."""
    model.save_pretrained(folder / "model")
    (folder / "inputs").mkdir()
    np.save(folder / "inputs" / "evaluation.npy", IDS.numpy().astype(np.int32))
    np.save(folder / "inputs" / "evaluation_documents.npy", np.arange(CONTEXTS) // 2)
    return {
        "kind": "text", "model": {"folder": str(folder / "model")}, "hook_points": [POINT], "context_length": LENGTH,
        "skip_first": False, "forward_batch": 2,
    }  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_extraction_and_cross_entropy_are_those_of_whole_passes(name: str, tmp_path: Path) -> None:
    model, path = family(name), f"{BLOCKS[name]}.1"
    params = source_of(tmp_path, model)
    seen: list[Tensor] = []
    with replaced(model, path, lambda x: seen.append(x.clone()) or x):
        clean = cross_entropy_of(model)
    source: Any = open_source(params, tmp_path, "cpu")
    block = source.block("evaluation", 0, CONTEXTS)
    found = block.activations[POINT].reshape(seen[0].shape)
    torch.testing.assert_close(found, seen[0], rtol=1e-5, atol=1e-5)
    with replaced(model, path, Damage()):
        spliced = cross_entropy_of(model)
    (tmp_path / "clean").mkdir()
    mean = torch.zeros(found.shape[-1], dtype=torch.float64)
    settings = {"ce_contexts": CONTEXTS}
    assert write_clean(params, tmp_path, POINT, mean, settings, {}, "cpu", tmp_path / "clean") == {}
    loop = NextTokens(tmp_path / "clean", tmp_path / "model", "cpu")
    metrics = loop.metrics(loop.sums(Damage().forward))
    assert metrics["ce_clean"] == pytest.approx(clean, abs=5e-6)
    assert metrics["ce_spliced"] == pytest.approx(spliced, abs=5e-6)
    assert abs(spliced - clean) > 1e-4  # the damage can be seen


@pytest.mark.parametrize("name", BLOCKS)
def test_hook_splices_and_the_identity_changes_nothing(name: str) -> None:
    model, path = family(name), f"{BLOCKS[name]}.1"
    assert prove(model, [POINT]).identities == 1
    clean = logits_of(model)
    with hook(model, POINT, nn.Identity()):
        assert torch.equal(logits_of(model), clean)
    with replaced(model, path, Damage()):
        expected = logits_of(model)
    with hook(model, POINT, Damage()):
        found = logits_of(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, clean, atol=1e-3)


def test_hook_splices_into_the_encoder_of_an_encoder_decoder() -> None:
    model = family("t5")
    assert prove(model, [POINT]).identities == 1
    with torch.no_grad():
        clean = model(input_ids=IDS).last_hidden_state
        with hook(model, POINT, nn.Identity()):
            assert torch.equal(model(input_ids=IDS).last_hidden_state, clean)
        with replaced(model, "encoder.block.1", Damage()):
            expected = model(input_ids=IDS).last_hidden_state
        with hook(model, POINT, Damage()):
            found = model(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_latents_tokens_are_those_that_its_row_raises_in_the_model(name: str) -> None:
    """Against the whole model, whose last block is made to write that row and nothing else."""
    model = family(name)
    blocks = model.get_submodule(BLOCKS[name])
    width = model.get_output_embeddings().weight.shape[1]
    rows = torch.randn(4, width, generator=torch.Generator().manual_seed(1))
    found = logit_lens(model, final_norm(model), rows, 3)

    def written(row: Tensor) -> Tensor:
        with replaced(model, f"{BLOCKS[name]}.{len(blocks) - 1}", lambda x: row.expand_as(x)):
            return logits_of(model)[0, 0]

    for latent, row in enumerate(rows):
        change = written(row) - written(torch.zeros_like(row))
        assert found["raised"][latent].tolist() == change.topk(3).indices.tolist()
        assert found["lowered"][latent].tolist() == change.topk(3, largest=False).indices.tolist()


@pytest.mark.parametrize("name", BLOCKS)
def test_every_name_that_saelens_has_of_a_familys_hook_point_names_it(name: str) -> None:
    """TransformerLens's name of what a block has, and SAELens's name of a module that transformers runs."""
    model = family(name)
    for place in prove(model, []).places:
        assert ours(theirs(f"blocks.1.{place}")) == f"blocks.1.{place}"
    module = f"module.{BLOCKS[name]}.1.output"
    assert theirs(module)["hook_name"] == f"{BLOCKS[name]}.1"
    assert ours(theirs(module)) == module
