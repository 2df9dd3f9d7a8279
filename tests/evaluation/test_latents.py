"""Cards of latents, against plain loops over all rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from saeflow.evaluation.latents import BINS, LATENTS, LOWEST, logit_lens, neighbours, write_latents
from saeflow.evaluation.rows import EvaluatedRows, RowSelection
from saeflow.sources.heads import final_norm, logits

from ..sources.conftest import CONFIGS, tiny_model

CONTEXTS, LENGTH, D_SAE = 20, 10, 12
SETTINGS = {"examples": 3, "before": 2, "after": 1, "neighbours": 4}
ALL = RowSelection(positions="all", norm_limit=None)


class Coder:
    """Latents are some of the activations, where they are above 0.8; the last never fires."""

    def __init__(self) -> None:
        self.W_dec = torch.randn(D_SAE, D_SAE, generator=torch.Generator().manual_seed(0))

    def encode(self, x: Tensor) -> Tensor:
        z = torch.where(x > 0.8, x, 0.0)
        z[:, -1] = 0
        return z

    def directions(self) -> Tensor:
        return self.W_dec


@pytest.fixture
def store(memory_store: Any) -> Any:
    """Shuffled tokens of contexts; the first position of each was left out."""
    random = np.random.default_rng(1)
    context, position = (part.ravel() for part in np.mgrid[:CONTEXTS, 1:LENGTH])
    order = random.permutation(len(context))
    x = random.normal(size=(len(order), D_SAE))
    return memory_store(x, context=context[order], position=position[order])


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 500, (CONTEXTS, LENGTH)).astype(np.uint16)


def activation(store: Any, context: int, position: int, latent: int) -> float:
    at = np.flatnonzero(
        (store.columns["context"] == context) & (store.columns["position"] == position)
    )
    return float(Coder().encode(store.x)[at[0], latent]) if len(at) else 0.0


@pytest.mark.parametrize("batch_size", [7, 64, 1000])
def test_cards_of_text_are_those_of_a_plain_loop(
    store: Any, tokens: np.ndarray, tmp_path: Path, batch_size: int
) -> None:
    found = write_latents(
        Coder(), EvaluatedRows(store, ALL, batch_size, "cpu"), tokens, SETTINGS, tmp_path
    )
    z = Coder().encode(store.x).numpy()
    np.testing.assert_array_equal(found["fired"], (z != 0).sum(0))
    np.testing.assert_array_equal(found["maximum"], z.max(0))
    assert found["rows"] == len(z)
    for latent in range(D_SAE):
        strengths = np.log2(z[:, latent][z[:, latent] > 0])
        edges = [-np.inf, *(LOWEST + np.arange(1, BINS) / 2), np.inf]
        np.testing.assert_array_equal(found["histogram"][latent], np.histogram(strengths, edges)[0])
        best: dict[int, tuple[float, int]] = {}
        for row in np.argsort(-z[:, latent]):
            if z[row, latent] > 0:
                best.setdefault(
                    store.columns["context"][row], (z[row, latent], store.columns["position"][row])
                )
        expected = list(best.items())[:3]
        for example in range(3):
            if example >= len(expected):
                assert found["value"][latent, example] == 0
                assert (found["token"][latent, example] == -1).all()
                assert (found["shades"][latent, example] == 0).all()
                continue
            context, (value, position) = expected[example]
            assert found["value"][latent, example] == pytest.approx(value)
            assert found["context"][latent, example] == context
            assert found["position"][latent, example] == position
            for offset in range(-2, 2):
                place = position + offset
                inside = 0 <= place < LENGTH
                token = tokens[context, place] if inside else -1
                assert found["token"][latent, example, offset + 2] == token
                own = activation(store, context, place, latent) if inside else 0.0
                shade = np.ceil(own / found["maximum"][latent] * 255) if own else 0
                assert found["shades"][latent, example, offset + 2] == shade
    saved = load_file(tmp_path / LATENTS)
    assert all(np.array_equal(saved[name], part) for name, part in found.items())


def test_cards_of_images_show_every_patch_of_the_first_contexts(store: Any, tmp_path: Path) -> None:
    settings = {"examples": 2, "neighbours": 2, "patches": LENGTH - 1, "first": 1, "contexts": 6}
    found = write_latents(Coder(), EvaluatedRows(store, ALL, 50, "cpu"), None, settings, tmp_path)
    assert "token" not in found
    assert found["context"].max() < 6
    assert found["fired"].sum() == int((Coder().encode(store.x) != 0).sum())  # of all contexts
    for latent in range(D_SAE - 1):
        for example in range(2):
            context = found["context"][latent, example]
            values = [activation(store, context, place, latent) for place in range(1, LENGTH)]
            expected = np.ceil(np.array(values, np.float32) / found["maximum"][latent] * 255)
            np.testing.assert_array_equal(found["shades"][latent, example], expected)


def test_neighbours_are_the_largest_cosines() -> None:
    rows = Coder().directions().double().numpy()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    order = np.argsort(-cosines, axis=1)[:, :4]
    found = neighbours(Coder().directions(), 4)
    np.testing.assert_array_equal(found["neighbours"], order)
    np.testing.assert_allclose(found["cosines"], np.take_along_axis(cosines, order, 1), rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "gemma3"])
def test_the_logit_lens_is_the_models_own_head_on_a_residual_of_one_row(name: str) -> None:
    """Against a model whose last block is made to write that row and nothing else."""
    model = tiny_model(name).eval()
    width = model.get_output_embeddings().weight.shape[1]
    rows = torch.randn(7, width, generator=torch.Generator().manual_seed(1))
    found = logit_lens(model, final_norm(model), rows, 3)

    def head_of(residual: Tensor) -> Tensor:
        with torch.no_grad():
            return model.get_output_embeddings()(final_norm(model)(residual))

    for latent, row in enumerate(rows):
        scores = head_of(row) - head_of(torch.zeros_like(row))
        assert found["raised"][latent].tolist() == scores.topk(3).indices.tolist()
        assert found["lowered"][latent].tolist() == scores.topk(3, largest=False).indices.tolist()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_logit_lens_reads_a_model_in_half_precision(name: str) -> None:
    model = tiny_model(name).eval().to(torch.bfloat16)
    head, norm = model.get_output_embeddings(), final_norm(model)
    rows = torch.randn(7, head.weight.shape[1], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        scores = head(norm(rows.bfloat16())) - head(norm(torch.zeros_like(rows[:1]).bfloat16()))
    found = torch.from_numpy(logit_lens(model, norm, rows, 3)["raised"]).long()
    assert torch.equal(scores.gather(1, found), scores.topk(3).values)


def test_the_final_norm_is_what_the_head_reads() -> None:
    for name in CONFIGS:
        model = tiny_model(name).eval()
        ids = torch.arange(6)[None] + 3
        seen: list[Tensor] = []
        handle = final_norm(model).register_forward_hook(
            lambda _, __, out, seen=seen: seen.append(out)
        )
        with torch.no_grad():
            expected = model(ids).logits
        handle.remove()
        torch.testing.assert_close(logits(model, seen[0]), expected, rtol=1e-5, atol=1e-5)
