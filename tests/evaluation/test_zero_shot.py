"""Classification through a few concepts, against a plain loop over images and settings."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPModel

from saeflow.batch import Batch
from saeflow.errors import UserError
from saeflow.evaluation.in_model.vision import ZeroShot, nearest_texts, write_clean
from saeflow.evaluation.zero_shot.accuracy import Accuracy
from saeflow.evaluation.zero_shot.class_texts import class_features, text_features
from saeflow.evaluation.zero_shot.top_n import COUNTS, top_concepts
from saeflow.saes.topk import TopK, TopKOptions
from saeflow.sources.labelled import prepare_labelled
from saeflow.sources.models import fetch_model, load_model, load_tokenizer
from saeflow.sources.pixels import image_facts
from saeflow.sources.preprocessing import load_preprocessing, normalised

WIDTH, D_SAE = 32, 48
TRAINED = {
    "scenes": {"seed": 0, "smallest": 0, "largest": 3}, "examples": 64, "pairs": 256, "batch_size": 16,
    "lr": 1e-3, "width": WIDTH, "layers": 3, "patch_size": 16, "seed": 0,
}  # fmt: skip
SOURCE = {"forward_batch": 8, "tokens": "all"}
TEMPLATES = ["a photo of a {}", "a picture of a {}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained CLIP and a labelled set of scenes."""
    root = tmp_path_factory.mktemp("scenes")
    (root / "model").mkdir()
    fetch_model({"trained": TRAINED}, [], root / "model")
    one = {"smallest": 1, "largest": 1}
    labelled = {
        "train": {"scenes": {"seed": 2, **one}}, "test": {"scenes": {"seed": 3, **one}},
        "per_class": {"train": 2, "test": 1}, "class_names": None, "templates": TEMPLATES,
        "unreadable_share": 0,
    }  # fmt: skip
    (root / "labelled").mkdir()
    prepare_labelled(labelled, root / "model", root / "labelled")
    return root


def loop(folder: Path, hook_point: str, tokens: str = "all", sets: bool = True) -> ZeroShot:
    out = folder / f"clean-{hook_point}-{tokens}-{sets}"
    if not out.exists():
        out.mkdir()
        given = {"ones": folder / "labelled"} if sets else {}
        source = SOURCE | {"tokens": tokens}
        prompts = {"concept_cards": {"prompts": ["a red object", "a ring"]}}
        write_clean(source, folder, hook_point, torch.zeros(WIDTH), prompts, given, "cpu", out)
    return ZeroShot(out, folder / "model", "cpu")


def test_a_set_whose_name_begins_with_anothers_is_its_own(folder: Path, tmp_path: Path) -> None:
    """The batches of `ones` and `ones-test` hold the labels of their own images only."""
    labels = {s: np.load(folder / f"labelled/{s}_labels.npy") for s in ("train", "test")}
    other = tmp_path / "other"
    shutil.copytree(folder / "labelled", other)
    for split, own in labels.items():
        np.save(other / f"{split}.npy", np.load(other / f"{split}.npy")[:5])
        np.save(other / f"{split}_labels.npy", own[-5:])
    hook_point, out = "vision.embedding", tmp_path / "clean"
    out.mkdir()
    sets = {"ones": folder / "labelled", "ones-test": other, "labelled.json": other}
    without = {"concept_cards": None}
    write_clean(SOURCE, folder, hook_point, torch.zeros(WIDTH), without, sets, "cpu", out)
    found = ZeroShot(out, folder / "model", "cpu").sets
    for split, own in labels.items():
        assert found.labels("ones", split).tolist() == own.tolist()
        assert found.labels("ones-test", split).tolist() == own[-5:].tolist()


@pytest.fixture(scope="module")
def sae() -> TopK:
    found = TopK(WIDTH, D_SAE, TopKOptions(k=5, auxk_weight=0))
    found.initialise(Batch.of(torch.randn(200, WIDTH)), torch.Generator().manual_seed(0))
    with torch.no_grad():
        found.b_dec.copy_(torch.randn(WIDTH, generator=torch.Generator().manual_seed(3)) / 4)
    return found.eval()


def official(model: Any, pixels: Tensor, block: int, change: Any) -> Tensor:
    """Unit image embeddings by the library's own forward pass, a block's output changed by a hook."""
    handle = model.vision_model.encoder.layers[block].register_forward_hook(
        lambda module, args, output: change(output)
    )
    with torch.no_grad():
        found = model.get_image_features(pixels).pooler_output
    handle.remove()
    return found / found.norm(dim=1, keepdim=True)


def plain_accuracies(
    folder: Path, sae: TopK, block: int
) -> dict[tuple[str, str, int], tuple[float, float]]:
    """Each protocol the slow way: image by image, one dense forward pass a setting."""
    model: Any = load_model(folder / "model", "cpu")
    preprocessing = load_preprocessing(folder / "model")
    tokenizer = load_tokenizer(folder / "model")
    classes = image_facts(folder / "labelled")["classes"]
    texts = []
    for name in classes:
        vectors = [
            model.get_text_features(
                **tokenizer([t.format(name)], return_tensors="pt")
            ).pooler_output[0]
            for t in TEMPLATES
        ]
        mean = torch.stack([v / v.norm() for v in vectors]).mean(0)
        texts.append(mean / mean.norm())
    text = torch.stack(texts).detach()
    labels = {s: np.load(folder / f"labelled/{s}_labels.npy") for s in ("train", "test")}
    latents: dict[str, list[Tensor]] = {"train": [], "test": []}
    given = {
        s: normalised(torch.from_numpy(np.load(folder / f"labelled/{s}.npy")), preprocessing)
        for s in latents
    }
    for split in latents:

        def keep(x: Tensor, split: str = split) -> Tensor:
            latents[split].append(sae.encode(x[0]).detach())
            return x

        for pixels in given[split]:
            official(model, pixels[None], block, keep)
    results = {}
    for protocol in ("paper", "leak_free"):
        split = "test" if protocol == "paper" else "train"
        counts = np.zeros((len(classes), D_SAE))
        for label, z in zip(labels[split], latents[split], strict=True):
            counts[label] += ((z > 0.2) if protocol == "paper" else (z != 0)).sum(0).numpy()
        for n in COUNTS:
            top = []
            for row in counts:
                best = sorted(range(D_SAE), key=lambda i: (-row[i], i))[:n]
                top.append({i for i in best if row[i] > 0})
            union = set().union(*top)
            for concepts in ("on", "off"):
                right: dict[int, list[bool]] = {}
                for pixels, label, z in zip(
                    given["test"], labels["test"], latents["test"], strict=True
                ):
                    chosen = top[label] if protocol == "paper" else union
                    mask = torch.tensor([(i in chosen) == (concepts == "on") for i in range(D_SAE)])
                    x_hat = (z * mask) @ sae.W_dec + sae.b_dec
                    image = official(model, pixels[None], block, lambda x, h=x_hat: h[None])[0]
                    right.setdefault(int(label), []).append(int((image @ text.T).argmax()) == label)
                accuracy = float(np.mean([np.mean(held) for held in right.values()]))
                sizes = [len(held) for held in top] if protocol == "paper" else [len(union)]
                kept = np.mean(sizes) if concepts == "on" else D_SAE - np.mean(sizes)
                results[protocol, concepts, n] = accuracy, float(kept)
    return results


def test_every_setting_is_what_a_plain_loop_finds(folder: Path, sae: TopK) -> None:
    found = loop(folder, "vision.blocks.1.resid_post").measure(sae, is_trained=True)
    lines = found.tables["classification"]
    expected = plain_accuracies(folder, sae, 1)
    got = {
        (line["protocol"], line["concepts"], line["n"]): (line["accuracy"], line["kept"])
        for line in lines
        if line["labels"] == "true" and line["n"] != "all"
    }
    assert got.keys() == expected.keys()
    for key, (accuracy, kept) in expected.items():
        assert got[key][0] == pytest.approx(accuracy, abs=1.01 / 42), (
            key
        )  # ties of float sums may turn one
        assert got[key][1] == pytest.approx(kept)
    assert np.mean([abs(got[key][0] - expected[key][0]) for key in got]) < 0.005
    (whole,) = (line for line in lines if line["n"] == "all")
    assert whole["kept"] == D_SAE


@pytest.mark.parametrize(
    "hook_point", ["vision.blocks.1.resid_post", "vision.blocks.1.mlp_out", "vision.embedding"]
)
def test_an_identity_leaves_the_accuracy_alone(folder: Path, hook_point: str) -> None:
    tokens = "cls" if hook_point == "vision.embedding" else "all"
    sets = loop(folder, hook_point, tokens)
    found = sets.measure(torch.nn.Identity(), is_trained=False)
    metrics, lines = found.metrics, found.tables["classification"]
    model: Any = CLIPModel.from_pretrained(folder / "model")
    pixels = normalised(
        torch.from_numpy(np.load(folder / "labelled/test.npy")),
        load_preprocessing(folder / "model"),
    )
    text = class_features(
        model,
        load_tokenizer(folder / "model"),
        image_facts(folder / "labelled")["classes"],
        TEMPLATES,
    )
    with torch.no_grad():
        scores = model.get_image_features(pixels).pooler_output @ text.t()
    labels = torch.from_numpy(np.load(folder / "labelled/test_labels.npy"))
    expected = float((scores.argmax(1) == labels).float().mean())  # one image a class
    assert metrics["zero_shot"] == metrics["zero_shot_clean"] == pytest.approx(expected)
    assert metrics["zero_shot_chance"] == pytest.approx(1 / 42)
    assert [line["n"] for line in lines] == ["all"]


def test_a_tokenizer_without_padding_gives_the_same_texts(folder: Path) -> None:
    model: Any = CLIPModel.from_pretrained(folder / "model")
    padded, bare = load_tokenizer(folder / "model"), load_tokenizer(folder / "model")
    bare.pad_token = None
    texts = ["a red circle", "six objects on a grey background", "a cross"]
    one, other = (class_features(model, each, texts, TEMPLATES) for each in (padded, bare))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    model.config.model_type = "siglip"
    with pytest.raises(UserError, match="expected a tokenizer with a padding token"):
        class_features(model, bare, texts, TEMPLATES)


def test_patches_alone_leave_the_cls_token_as_it_is(folder: Path) -> None:
    sets = loop(folder, "vision.blocks.1.resid_post", "patches").sets
    parts = next(sets.batches("ones", "test"))
    rows = sets.rows_of(parts)
    assert rows.shape[1] == 16
    spliced: list[Tensor] = []
    original = sets.model.vision_model.encoder.layers[2].register_forward_pre_hook(
        lambda module, args, kwargs: spliced.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        sets.embed_rows(parts, torch.zeros_like(rows))
    original.remove()
    assert torch.equal(spliced[0][:, 0], parts["activation"][:, 0])
    assert not spliced[0][:, 1:].any()


def test_permuted_labels_leave_the_leak_free_accuracy_at_chance(folder: Path, sae: TopK) -> None:
    found = loop(folder, "vision.blocks.1.resid_post").measure(sae, is_trained=True)
    lines = found.tables["classification"]
    permuted = [
        x["accuracy"] for x in lines if x["labels"] == "permuted" and x["protocol"] == "leak_free"
    ]
    assert len(permuted) == len(COUNTS)
    assert np.mean(permuted) < 4 / 42


def test_a_class_that_only_one_concept_tells_apart() -> None:
    counts = torch.tensor([[5, 5, 0, 9], [0, 0, 0, 0], [1, 2, 2, 0]])
    assert top_concepts(counts, 1).int().tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert top_concepts(counts, 2).int().tolist() == [[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]]
    assert top_concepts(counts, 9).int().tolist() == (counts > 0).int().tolist()


def test_an_accuracy_is_the_mean_over_classes() -> None:
    score = Accuracy(3)
    score.add(torch.eye(3)[[0, 0, 0, 1]], torch.tensor([0, 0, 0, 0]))
    score.add(torch.eye(3)[[1]], torch.tensor([1]))
    assert score.mean() == pytest.approx((3 / 4 + 1) / 2)  # the third class has no image


def test_a_model_without_a_text_tower_is_refused(folder: Path) -> None:
    model: Any = CLIPModel.from_pretrained(folder / "model")
    with pytest.raises(UserError, match="expected a model with a text tower"):
        text_features(model.vision_model, load_tokenizer(folder / "model"), ["a cat"])


def test_concepts_are_named_by_what_their_direction_does(folder: Path) -> None:
    opened = loop(folder, "vision.embedding", "cls")
    names, text = opened.sets.prompts()
    assert names == ["a red object", "a ring"]
    planted = TopK(WIDTH, 2, TopKOptions(k=1, auxk_weight=0))
    with torch.no_grad():
        planted.W_dec.copy_(text - text.mean(0))
    found = opened.name_latents(planted, np.array([1, 0]))
    assert [near.text for near in found] == ["a ring", "a red object"]
    assert all(near.cosine > 0.3 for near in found)


def test_what_chance_reaches_is_what_random_directions_reach() -> None:
    """5 % of random changes are above the level, and a change towards one of the texts is far above it."""
    generator = torch.Generator().manual_seed(1)
    texts = torch.randn(40, 64, generator=generator) * torch.linspace(0.1, 3, 64)
    texts -= texts.mean(0)
    random = torch.randn(400, 64, generator=generator)
    changes = torch.nn.functional.normalize(torch.cat([random, texts + 0.2 * random[:40]]), dim=1)
    found = nearest_texts(changes, [str(i) for i in range(40)], texts)
    above = np.mean([near.cosine > near.shuffled for near in found[:400]])
    assert 0.01 <= above <= 0.1
    planted = found[400:]
    assert [near.text for near in planted] == [str(i) for i in range(40)]
    assert all(near.cosine > near.shuffled for near in planted)


def test_without_labelled_sets_there_is_nothing_to_classify(folder: Path, sae: TopK) -> None:
    sets = loop(folder, "vision.blocks.1.resid_post", sets=False)
    found = sets.measure(sae, is_trained=True)
    assert (found.metrics, found.tables) == ({}, {"classification": []})
    assert not found.sums
    assert not len(found.units)
    assert sets.name_latents(sae, np.array([0])) == []


def test_a_module_inside_a_block_is_replaced_from_its_block_on(folder: Path) -> None:
    """The module's own output in its place leaves the embedding as it is."""
    found = loop(folder, "vision.module.vision_model.encoder.layers.1.mlp.fc1.output").sets
    plain = loop(folder, "vision.embedding").sets
    for parts, clean in zip(
        found.batches("ones", "test"), plain.batches("ones", "test"), strict=True
    ):
        kept = found.embed_rows(parts, found.rows_of(parts))
        other = found.embed_rows(parts, torch.zeros_like(found.rows_of(parts)))
        torch.testing.assert_close(kept, clean["activation"], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(other, kept, rtol=1e-3, atol=1e-3)
