"""Latents in the formats of SAEDashboard and Neuronpedia, against the activations that they are of."""

import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from saeflow import provenance
from saeflow.batch import Batch
from saeflow.errors import UserError
from saeflow.evaluation.latents import BINS, LATENTS, LOWEST
from saeflow.exchange import export_sae
from saeflow.saes import build
from saeflow.saes.files import save

from ..workflow.test_text import make_model

D_IN, D_SAE, CONTEXTS, LENGTH, EXAMPLES, BEFORE, AFTER = 12, 140, 6, 9, 3, 2, 1
CONFIG = {
    "variant": "topk", "options": {"k": 3}, "d_in": D_IN, "d_sae": D_SAE, "seed": 0, "source": "own", "entry": "topk",
    "hook_point": "blocks.1.resid_post", "name": "own/blocks.1.resid_post/topk/d140-seed0", "scale": None,
    "training": {"tokens": 1000},
}  # fmt: skip


class Made:
    """A page's folder with what it was made from, and the activations (contexts, length, d_sae) that it is of."""

    def __init__(self, folder: Path, hook_point: str = "blocks.1.resid_post") -> None:
        draw = np.random.default_rng(0)
        self.folder, self.page = folder, folder / "page"
        self.tokens = draw.integers(1, 300, (CONTEXTS, LENGTH)).astype(np.int32)
        self.tokens[:, 0] = 0  # the special token
        fires = draw.random((CONTEXTS, LENGTH, D_SAE)) < 0.3
        self.z = (draw.random(fires.shape) * fires * 3).astype(np.float32)
        self.z[..., 5] = 0
        self.words = {
            "raised": draw.integers(0, 300, (D_SAE, 2)).astype(np.int32),
            "raised_by": draw.random((D_SAE, 2)).astype(np.float32),
            "lowered": draw.integers(0, 300, (D_SAE, 2)).astype(np.int32),
            "lowered_by": -draw.random((D_SAE, 2)).astype(np.float32),
        }
        self.sae = build("topk", D_IN, D_SAE, {"k": 3})
        self.sae.initialise(Batch.of(torch.randn(256, D_IN)), torch.Generator().manual_seed(0))
        with provenance.job(folder / "sae", name="train") as job:
            save(self.sae.state_dict(), job.path, CONFIG | {"hook_point": hook_point})
        with provenance.job(folder / "model", name="fetch") as job:
            make_model(job.path, list(pydoc_data.topics.topics.values()))
        with provenance.job(folder / "inputs", name="prepare", external={"own.txt": "0"}) as job:
            np.save(job.path / "evaluation.npy", self.tokens)
        read = [folder / name for name in ("sae", "model", "inputs")]
        with provenance.job(self.page, name="latents", inputs=read) as job:
            save_file(self.arrays(), job.path / LATENTS)

    def arrays(self) -> dict[str, np.ndarray]:
        """latents.safetensors as `write_latents` describes it, one latent after the other."""
        window, shape = BEFORE + 1 + AFTER, (D_SAE, EXAMPLES)
        value, place = np.zeros(shape, np.float32), np.full(shape, -1, np.int32)
        position, shades = place.copy(), np.zeros((*shape, window), np.uint8)
        token, histogram = (
            np.full((*shape, window), -1, np.int32),
            np.zeros((D_SAE, BINS), np.int32),
        )
        for i in range(D_SAE):
            z = self.z[..., i]
            for one in z[z > 0]:
                histogram[i, int(np.clip((np.log2(one) - LOWEST) * 2, 0, BINS - 1))] += 1
            best = np.argsort(-z.max(1))[:EXAMPLES]
            for n, context in enumerate(best):
                at = int(z[context].argmax())
                if not z[context, at]:
                    continue
                value[i, n], place[i, n], position[i, n] = z[context, at], context, at
                for w, p in enumerate(range(at - BEFORE, at + AFTER + 1)):
                    if 0 <= p < LENGTH:
                        token[i, n, w] = self.tokens[context, p]
                        shades[i, n, w] = np.ceil(z[context, p] / z.max() * 255)
        flat = self.z.reshape(-1, D_SAE)
        return {
            "fired": (flat > 0).sum(0), "maximum": flat.max(0), "histogram": histogram, "value": value, "context": place,
            "position": position, "shades": shades, "token": token, "rows": np.array([len(flat)]), **self.words,
        }  # fmt: skip

    def told(self, library: str) -> list[Any]:
        """Return the contents of the files that an export wrote, in their order."""
        with provenance.job(self.folder / library, name="export", inputs=[self.page]) as job:
            export_sae(self.page, library, job.path)
        name = {"sae_dashboard": "batch", "neuronpedia": "features"}[library]
        files = [self.folder / library / f"{name}-{n}.json" for n in (0, 1)]
        assert sorted(self.folder.glob(f"{library}/*-*.json")) == files  # 128 and 12 latents
        return [json.loads(path.read_text()) for path in files]

    def check(self, index: int, examples: list[dict[str, Any]]) -> None:
        """Examples hold the activations of their contexts, the strongest exactly."""
        z = self.z[..., index]
        best = np.sort(z.max(1))[::-1][:EXAMPLES]
        assert len(examples) == (best > 0).sum()
        for example, value in zip(examples, best, strict=False):
            context, at = map(int, np.argwhere(z == value)[0])
            seen = slice(max(0, at - BEFORE), at + AFTER + 1)
            assert max(example["values"]) == pytest.approx(float(value), rel=1e-6)
            assert example["values"] == pytest.approx(
                z[context, seen].tolist(), abs=float(z.max()) / 255
            )
            assert len(example["tokens"]) == len(example["values"])
            if at <= BEFORE:
                assert example["tokens"][0] == "<|endoftext|>"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def batches(made: Made) -> list[dict[str, Any]]:
    return made.told("sae_dashboard")


@pytest.fixture(scope="module")
def features(made: Made) -> list[list[dict[str, Any]]]:
    return made.told("neuronpedia")


def test_a_batch_holds_each_latents_numbers(made: Made, batches: list[dict[str, Any]]) -> None:
    first = batches[0]
    assert (first["model_id"], first["layer"], first["sae_set"]) == ("own", 1, "topk")
    latents = [one for batch in batches for one in batch["features"]]
    assert [one["feature_index"] for one in latents] == list(range(D_SAE))
    for i, one in enumerate(latents):
        made.check(i, one["activations"])
        for example in one["activations"]:
            assert example["values"][example["qualifying_token_index"]] == max(example["values"])
        assert one["frac_nonzero"] == pytest.approx((made.z[..., i] > 0).mean())
        assert sum(one["freq_hist_data_bar_heights"]) == (made.z[..., i] > 0).sum()
        assert one["pos_values"] == pytest.approx(made.words["raised_by"][i].tolist())
        row = made.sae.directions()[i].detach()
        assert one["neuron_alignment_values"] == pytest.approx(row.topk(3).values.tolist())
        assert one["neuron_alignment_l1"] == pytest.approx(
            (row.topk(3).values.abs() / row.abs().sum()).tolist(), rel=1e-5
        )
        assert (one["n_prompts_total"], one["n_tokens_in_prompt"]) == (CONTEXTS, LENGTH)
        assert one["dataset"] == "own.txt"
    values = np.array(latents[0]["freq_hist_data_bar_values"])
    assert ((values > 2.0**LOWEST) & (values < made.z[..., 0].max() * 2)).all()


def test_features_of_the_client_hold_the_same(
    made: Made, features: list[list[dict[str, Any]]]
) -> None:
    for one in [one for part in features for one in part]:
        assert (one["modelId"], one["source"]) == ("own", "1-topk")
        made.check(one["index"], one["activations"])
        lowered = [logit["value"] for logit in one["bottom_logits"]]
        assert lowered == pytest.approx(made.words["lowered_by"][one["index"]].tolist())


def test_their_own_classes_read_what_is_written(
    made: Made, batches: Any, features: Any, foreign: Any, tmp_path: Path
) -> None:
    jobs = [{"do": "read dashboards", "folder": made.folder / n} for n in ("sae_dashboard", "neuronpedia")]  # fmt: skip
    foreign(tmp_path, jobs)
    for folder, told in (("sae_dashboard", batches), ("neuronpedia", features)):
        found = sorted((made.folder / folder).glob("*.again"))
        assert len(found) == len(told)
        for path, written in zip(found, told, strict=True):
            again = json.loads(path.read_text())
            if folder == "neuronpedia":  # which the client fills in
                for one in again:
                    for example in one["activations"]:
                        assert [example.pop(f"quantile{x}") for x in ("Max", "Min", "Fraction")] == [None] * 3  # fmt: skip
            assert again == written


def test_what_is_no_page_of_a_blocks_text_is_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a page of latent cards"):
        export_sae(made.folder / "sae", "neuronpedia", tmp_path)
    other = Made(tmp_path / "module", "module.transformer.wte.output")
    with pytest.raises(UserError, match="expected a hook point of a block"):
        export_sae(other.page, "neuronpedia", tmp_path)
    assert not list(tmp_path.glob("*.json"))
