"""Image towers other than CLIP's, tiny and with random weights, against the library's own forward pass and processors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from saeflow.errors import UserError
from saeflow.evaluation.zero_shot.class_texts import text_features
from saeflow.sources import open_source, prepare_inputs
from saeflow.sources.hook_points import capture, check_model, hook, run_from, splice
from saeflow.sources.layouts import PLACES
from saeflow.sources.models import fetch_model, load_model
from saeflow.sources.preprocessing import fit, load_preprocessing, normalised
from saeflow.sources.proof import prove
from saeflow.sources.structure import structure_of

SIDE, PATCH, BLOCKS, PATCHES = 32, 8, 3, 16
SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": BLOCKS, "num_attention_heads": 2, "image_size": SIDE,
    "patch_size": PATCH,
}  # fmt: skip
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
}
BIT = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 36},
    "crop_size": {"height": SIDE, "width": SIDE},
}
SQUARE = {"size": {"height": SIDE, "width": SIDE}}
TOWERS: dict[str, tuple[int, dict[str, Any]]] = {
    "siglip": (0, {"image_processor_type": "SiglipImageProcessor", "resample": 3, **SQUARE}),
    "siglip_vision_model": (0, {"image_processor_type": "SiglipImageProcessorFast", **SQUARE}),
    "vit": (1, {"image_processor_type": "ViTImageProcessor", **SQUARE}),
    "dinov2": (1, BIT),
    "dinov2_with_registers": (5, BIT),
    "clip_vision_model": (
        1,
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": SIDE},
            "crop_size": SIDE,
        },
    ),
}
"""Positions before the first patch, and a preprocessor_config.json as such models have it."""  # fmt: skip
POINT = "vision.blocks.1.resid_post"


def tower(name: str, **changes: Any) -> Any:
    sizes = SIZES | changes
    if name == "siglip":
        sizes = {"vision_config": sizes, "text_config": TEXT}
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **sizes))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    return model.eval().requires_grad_(False)


class Nothing(torch.nn.Module):
    """An SAE that reconstructs zeros."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


def pixels(side: int = SIDE) -> torch.Tensor:
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))


def vision_of(model: Any) -> Any:
    return getattr(model, "vision_model", model)


@pytest.mark.parametrize("name", TOWERS)
def test_every_hook_point_is_proved(name: str) -> None:
    model = tower(name)
    proof = prove(model, tower="vision.")
    assert proof.places == list(PLACES)
    assert (proof.linked, proof.sums, proof.hidden_states) == (BLOCKS - 1, BLOCKS, BLOCKS)
    assert proof.identities == BLOCKS * len(PLACES)
    image = structure_of(model, "vision.").image
    assert image is not None
    assert (image.prefix, image.size) == (TOWERS[name][0], (SIDE, SIDE))


@pytest.mark.parametrize("name", TOWERS)
def test_a_stream_is_the_librarys_hidden_state_and_is_run_on_from(name: str) -> None:
    model, given = tower(name), pixels()
    hidden = vision_of(model)(given, output_hidden_states=True).hidden_states[2]
    found = capture(model, [POINT], given)[POINT]
    assert torch.equal(found, hidden)
    other = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    whole = getattr(model, "get_image_features", model)
    end = "pooler_output" if name == "siglip" else "last_hidden_state"
    with splice(model, POINT, lambda _: other):
        expected = whole(given)[end]
    got = run_from(model, "vision.blocks.2.resid_pre", other, None, lambda x: x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_tower_that_takes_other_sizes_runs_on_from_them() -> None:
    model, given = tower("dinov2"), pixels(2 * SIDE)
    found = capture(model, [POINT], given)[POINT]
    assert found.shape[1] == 1 + 4 * PATCHES
    got = run_from(model, "vision.blocks.2.resid_pre", found, None, lambda x: x)
    torch.testing.assert_close(got, model(given).last_hidden_state, rtol=1e-5, atol=1e-6)


def test_the_embedding_is_what_texts_are_compared_with() -> None:
    model, given = tower("siglip"), pixels()
    found = capture(model, ["vision.embedding"], given)["vision.embedding"]
    assert torch.equal(found, model.get_image_features(given).pooler_output)
    with pytest.raises(UserError, match=r"an embedding that texts share, found no text tower"):
        check_model(tower("dinov2"), ["vision.embedding"])
    with pytest.raises(
        UserError, match=r"expected a model with a text tower .* found none; zero-shot"
    ):
        text_features(tower("vit"), None, ["a cat"])


@pytest.mark.parametrize(
    ("name", "point", "message"),
    [
        ("siglip", "blocks.1.resid_post", r"expected hook points of its image tower"),
        ("dinov2", "blocks.1.resid_post", r"expected hook points of its image tower"),
        ("vit", "vision.blocks.3.mlp_in", r"has 3 blocks \(0\.\.2\)"),
        ("vit", "vision.module.encoder.layer.0.output", r"no module encoder\.layer\.0: ViTModel has embeddings, layers"),
    ],
)  # fmt: skip
def test_what_a_tower_does_not_have_is_named(name: str, point: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_model(tower(name), [point])


@pytest.mark.parametrize("name", ["siglip", "dinov2_with_registers"])
def test_an_sae_of_patches_leaves_what_stands_before_them(name: str) -> None:
    model, given, prefix = tower(name), pixels(), TOWERS[name][0]
    sae: Any = Nothing()
    sae.positions = slice(1, None)  # 0 is a CLS token in SAEs' own counting
    with hook(model, POINT, sae):
        found = capture(model, ["vision.blocks.2.resid_pre"], given)["vision.blocks.2.resid_pre"]
    clean = capture(model, [POINT], given)[POINT]
    assert torch.equal(found[:, :prefix], clean[:, :prefix])
    assert not found[:, prefix:].any()


def saved(name: str, folder: Path, **changes: Any) -> Path:
    tower(name, **changes).save_pretrained(folder)
    held = TOWERS[name][1]
    (folder / "preprocessor_config.json").write_text(json.dumps(held))
    return folder


@pytest.mark.parametrize("name", TOWERS)
def test_pixels_are_those_of_the_models_own_processor(name: str, tmp_path: Path) -> None:
    folder = saved(name, tmp_path)
    kind = TOWERS[name][1]["image_processor_type"].removesuffix("Fast")
    processor = getattr(transformers, f"{kind}Pil").from_pretrained(folder)
    found = load_preprocessing(folder)
    assert found.prefix == TOWERS[name][0]
    for width, height in ((64, 64), (90, 41), (33, 120), (1, 1)):
        noise = np.random.default_rng(width).integers(0, 255, (height, width, 3), np.uint8)
        image = Image.fromarray(noise)
        expected = processor(images=image, return_tensors="np")["pixel_values"]
        got = normalised(torch.from_numpy(fit(image, found)[None]), found).numpy()
        assert np.array_equal(got, expected.astype(np.float32))


def test_images_of_another_size_than_the_towers(tmp_path: Path) -> None:
    """DINOv2 takes them, as its released weights do (518 pixels, run at 224); ViT does not."""
    found = load_preprocessing(saved("dinov2", tmp_path / "dinov2", image_size=2 * SIDE))
    assert (found.height, found.grid, found.prefix) == (SIDE, (4, 4), 1)
    folder = saved("vit", tmp_path / "vit", image_size=2 * SIDE)
    with pytest.raises(UserError, match=r"expected images of 64 pixels .* found a crop of 32 x 32"):
        load_preprocessing(folder)


def params(model: Path, tokens: str) -> dict[str, Any]:
    return {
        "kind": "vision", "model": {"folder": str(model)}, "hook_points": [POINT], "unreadable_share": 0,
        "images": {"scenes": {"seed": 1, "smallest": 0, "largest": 3}}, "evaluation_share": 0.4, "tokens": tokens,
        "max_norm_multiple": 10, "forward_batch": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("siglip", "patches"),
        ("vit", "all"),
        ("dinov2", "cls"),
        ("dinov2_with_registers", "patches"),
    ],
)
def test_rows_are_the_tokens_that_are_asked_for(name: str, tokens: str, tmp_path: Path) -> None:
    local = saved(name, tmp_path / "local")
    asked = params(local, tokens)
    for part in ("model", "inputs"):
        (tmp_path / part).mkdir()
    fetch_model(asked["model"], [POINT], tmp_path / "model")
    prepare_inputs(asked, {"train": 3 * PATCHES}, tmp_path / "model", tmp_path / "inputs", 1)
    source: Any = open_source(asked, tmp_path, "cpu")
    block = source.block("train", 0, 3)
    given = normalised(torch.from_numpy(np.array(source.inputs("train")[:3])), source.preprocessing)
    model = load_model(tmp_path / "model", "cpu")
    hidden = vision_of(model)(given, output_hidden_states=True).hidden_states[2]
    prefix = TOWERS[name][0]
    part = {"all": hidden, "cls": hidden[:, :1], "patches": hidden[:, prefix:]}[tokens]
    torch.testing.assert_close(block.activations[POINT], part.reshape(-1, 16), rtol=1e-5, atol=1e-5)
    first = {"all": 0, "cls": 0, "patches": 1}[tokens]
    assert block.columns["position"][: part.shape[1]].tolist() == list(
        range(first, first + part.shape[1])
    )
    cover = np.load(tmp_path / "inputs" / "train_cover.npy")[0].reshape(-1)
    assert block.columns["cover"][: part.shape[1]].tolist() == (
        [*([] if first else [-1]), *([] if tokens == "cls" else cover.tolist())]
    )


@pytest.mark.parametrize(
    ("name", "tokens", "message"),
    [
        ("siglip", "cls", r"expected patches, as the model has no CLS token, found cls"),
        ("siglip", "all", r"expected patches, as the model has no CLS token, found all"),
        (
            "dinov2_with_registers",
            "all",
            r"expected cls or patches, as 4 register tokens stand between",
        ),
    ],
)
def test_tokens_that_a_tower_does_not_have_are_refused(
    name: str, tokens: str, message: str, tmp_path: Path
) -> None:
    local = saved(name, tmp_path)
    with pytest.raises(UserError, match=message):
        prepare_inputs(params(local, tokens), {"train": 3}, local, tmp_path / "inputs", 1)
