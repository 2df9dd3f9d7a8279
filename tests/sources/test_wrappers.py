"""Models of images and text: their language part as a causal language model, and their image tower."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.vision_utils import get_vision_window_index

from saeflow.errors import UserError
from saeflow.sources import open_source, prepare_inputs
from saeflow.sources.heads import no_predictions
from saeflow.sources.hook_points import capture, check_model, run_from, splice
from saeflow.sources.layouts import PLACES
from saeflow.sources.models import fetch_model
from saeflow.sources.preprocessing import fit, load_preprocessing, normalised
from saeflow.sources.proof import prove
from saeflow.sources.towers import image_output, patches

from .conftest import check_two_sequential_blocks, random_model

TEXT: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
ROTARY = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}  # fmt: skip
SIGHT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
OF_ANY_SIZE = {"depth": 3, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 16, "patch_size": 4}  # fmt: skip
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": TEXT, "vision_config": SIGHT, "mm_tokens_per_image": 4},
    "llama4": {
        "text_config": {**TEXT, "intermediate_size_mlp": 24, "num_local_experts": 2, "moe_layers": [1]},
        "vision_config": {
            **SIGHT, "intermediate_size": 64, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16,
        },
    },
    "llava": {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": {**SIGHT, "model_type": "clip_vision_model"}},
    "qwen2_vl": {
        "text_config": ROTARY,
        "vision_config": {"depth": 3, "embed_dim": 24, "num_heads": 2, "hidden_size": 16, "patch_size": 4},
    },
    "qwen2_5_vl": {"text_config": ROTARY, "vision_config": {**OF_ANY_SIZE, "window_size": 16, "fullatt_block_indexes": [1]}},
    "qwen3_vl": {
        "text_config": ROTARY,
        "vision_config": {**OF_ANY_SIZE, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    },
}  # fmt: skip
QWEN = [name for name in WRAPPERS if name.startswith("qwen")]
GEMMA_3: dict[str, Any] = {
    "do_convert_rgb": None, "do_normalize": True, "do_pan_and_scan": None, "do_rescale": True, "do_resize": True,
    "image_mean": [0.5] * 3, "image_processor_type": "Gemma3ImageProcessor", "image_seq_length": 256, "image_std": [0.5] * 3,
    "pan_and_scan_max_num_crops": None, "processor_class": "Gemma3Processor", "resample": 2, "rescale_factor": 1 / 255,
    "size": {"height": 28, "width": 28},
}  # fmt: skip
IDS = torch.randint(320, (2, 9), generator=torch.Generator().manual_seed(1))


def wrapper(name: str) -> Any:
    return random_model(name, **WRAPPERS[name])


@pytest.mark.parametrize("name", WRAPPERS)
def test_its_language_part_is_proved(name: str) -> None:
    model = wrapper(name)
    check_two_sequential_blocks(model)
    assert no_predictions(model) is None


@pytest.mark.parametrize("name", WRAPPERS)
def test_its_image_tower_is_proved(name: str) -> None:
    proof = prove(wrapper(name), tower="vision.")
    assert (proof.linked, proof.sums, proof.hidden_states) == (2, 3, 3)
    assert proof.identities == 3 * len(PLACES)


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_a_towers_stream_is_the_librarys_hidden_state(name: str) -> None:
    model = wrapper(name)
    tower = model.model.vision_tower
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    hidden = tower(pixels, output_hidden_states=True).hidden_states
    found = capture(model, ["vision.blocks.1.resid_post"], pixels)
    assert torch.equal(found["vision.blocks.1.resid_post"], hidden[2])


def test_pixels_are_those_of_gemma_3s_own_processor(tmp_path: Path) -> None:
    """As its released preprocessor_config.json says; crops of long images are refused."""
    wrapper("gemma3").save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(GEMMA_3))
    found = load_preprocessing(tmp_path)
    assert (found.prefix, found.grid) == (0, (2, 2))
    processor = transformers.Gemma3ImageProcessorPil.from_pretrained(tmp_path)
    for width, height in ((28, 28), (90, 41), (33, 120)):
        noise = np.random.default_rng(width).integers(0, 255, (height, width, 3), np.uint8)
        image = Image.fromarray(noise)
        expected = processor(images=image, return_tensors="np")["pixel_values"]
        got = normalised(torch.from_numpy(fit(image, found)[None]), found).numpy()
        assert np.array_equal(got, expected.astype(np.float32).reshape(got.shape))
    path.write_text(json.dumps(GEMMA_3 | {"do_pan_and_scan": True}))
    with pytest.raises(UserError, match=r"asks for {'do_pan_and_scan': True}"):
        load_preprocessing(tmp_path)


def hidden_states(model: Any, name: str, pixels: torch.Tensor) -> torch.Tensor:
    """(image, position, d_model) what block 1 gives by the library, brought into order by the rule of its own code.

    Args:
        pixels: (image, 3, height, width) normalised.
    """
    if name == "llama4":
        hidden = model.vision_model(pixels, output_hidden_states=True).hidden_states[2]
        return torch.cat([hidden[:, -1:], hidden[:, :-1]], 1)
    tower, (n, _, height, width) = model.model.visual, pixels.shape
    down, across = height // 4, width // 4
    places = [
        (2 * i + k, 2 * j + m)
        for i in range(down // 2) for j in range(across // 2) for k in range(2) for m in range(2)
    ]  # fmt: skip
    rows = [
        pixels[image, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].repeat_interleave(2, 0).reshape(-1)
        for image in range(n) for i, j in places
    ]  # fmt: skip
    grids = torch.tensor([[1, down, across]] * n)
    found = tower(torch.stack(rows), grid_thw=grids, output_hidden_states=True).hidden_states[2]
    hidden = found.reshape(n, down * across, -1)
    if name == "qwen2_5_vl":  # by windows of 4 patches a side
        order, _ = get_vision_window_index(grids[:1], 2, 16, 4)
        places = [places[4 * i + j] for i in order.tolist() for j in range(4)]
    return hidden[:, [places.index((i, j)) for i in range(down) for j in range(across)]]


@pytest.mark.parametrize("name", ["llama4", *QWEN])
def test_positions_are_a_cls_token_and_the_patches_row_by_row(name: str) -> None:
    model, point = wrapper(name), "vision.blocks.1.resid_post"
    size = (28, 28) if name == "llama4" else (24, 40)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = hidden_states(model, name, pixels)
    found = capture(model, [point], pixels)[point]
    assert torch.equal(found, expected)
    other = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    with splice(model, point, lambda _: other):
        spliced = image_output(model, pixels)
        seen = capture(model, ["vision.blocks.2.resid_pre"], pixels)["vision.blocks.2.resid_pre"]
    assert torch.equal(seen, other)
    got = run_from(model, "vision.blocks.2.resid_pre", other, pixels, lambda x: x)
    torch.testing.assert_close(got, spliced, rtol=1e-5, atol=1e-6)


def test_images_of_several_sizes_in_one_call_are_all_spliced() -> None:
    """As a model of images and text is run on a text with two images: every patch is replaced, in its own place."""
    model, point = wrapper("qwen2_5_vl"), "vision.blocks.1.resid_post"
    grids = torch.tensor([[1, 4, 4], [1, 6, 8]])
    rows = torch.randn(64, 3 * 2 * 16, generator=torch.Generator().manual_seed(0))
    clean = model.model.visual(rows, grid_thw=grids).last_hidden_state
    seen: list[torch.Size] = []

    def same(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape)
        return x.clone()

    with splice(model, point, same):
        assert torch.equal(model.model.visual(rows, grid_thw=grids).last_hidden_state, clean)
    assert seen == [(1, 64, 16)]
    with splice(model, point, torch.zeros_like):
        changed = model.model.visual(rows, grid_thw=grids).last_hidden_state
    assert (changed != clean).any(1).all()


def processor_file(kind: str, **settings: Any) -> str:
    return json.dumps({"image_processor_type": f"{kind}ImageProcessorFast", **settings})


@pytest.mark.parametrize("name", QWEN)
def test_pixels_are_those_of_qwens_own_processor(name: str, tmp_path: Path) -> None:
    """An image is brought to a square, which the processor leaves as it is but for its order of patches."""
    model = wrapper(name)
    model.save_pretrained(tmp_path)
    size = {"shortest_edge": 256, "longest_edge": 4096}
    settings = {"size": size, "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    (tmp_path / "preprocessor_config.json").write_text(processor_file("Qwen2VL", **settings))
    (tmp_path / "loading.json").write_text(json.dumps({"image_size": 24}))
    found = load_preprocessing(tmp_path)
    assert (found.prefix, found.grid, found.d_model) == (
        0,
        (6, 6),
        model.model.visual.patch_embed.embed_dim,
    )
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    for width, height in ((24, 24), (90, 41), (33, 120)):
        noise = np.random.default_rng(width).integers(0, 255, (height, width, 3), np.uint8)
        square = fit(Image.fromarray(noise), found)
        expected = processor(images=Image.fromarray(square), return_tensors="pt")
        assert expected["image_grid_thw"].tolist() == [[1, 6, 6]]
        got = patches(normalised(torch.from_numpy(square[None]), found), model.model.visual.config)
        assert torch.equal(got, expected["pixel_values"])


def test_pixels_of_llama_4_are_its_whole_image_in_bfloat16(tmp_path: Path) -> None:
    """Its processor's tile that shows an image whole: resized to one tile, each step of the arithmetic in bfloat16."""
    wrapper("llama4").save_pretrained(tmp_path)
    text = processor_file("Llama4", size={"height": 28, "width": 28}, max_patches=16, resample=2)
    (tmp_path / "preprocessor_config.json").write_text(text)
    found = load_preprocessing(tmp_path)
    assert (found.prefix, found.grid, found.d_model) == (1, (2, 2), 16)
    noise = np.random.default_rng(0).integers(0, 255, (41, 90, 3), np.uint8)
    pixels = fit(Image.fromarray(noise), found)
    assert np.array_equal(pixels, np.asarray(Image.fromarray(noise).resize((28, 28), 2)))
    half = torch.from_numpy(pixels).to(torch.bfloat16) * (1 / 255)
    expected = half.sub(torch.tensor(0.5).bfloat16()).div(torch.tensor(0.5).bfloat16())
    got = normalised(torch.from_numpy(pixels[None]), found)[0]
    assert torch.equal(got, expected.permute(2, 0, 1).float())


def source_params(folder: Path, tokens: str, **model: Any) -> dict[str, Any]:
    return {
        "kind": "vision", "model": {"folder": str(folder), **model}, "hook_points": ["vision.blocks.1.resid_post"],
        "images": {"scenes": {"seed": 1, "smallest": 0, "largest": 3}}, "unreadable_share": 0, "evaluation_share": 0.4,
        "tokens": tokens, "max_norm_multiple": 10, "forward_batch": 2,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "tokens"), [("qwen2_vl", "patches"), ("qwen2_5_vl", "patches"), ("qwen3_vl", "patches"), ("llama4", "all")])  # fmt: skip
def test_a_source_reads_its_tower(name: str, tokens: str, tmp_path: Path) -> None:
    """Fetched, prepared and run: each row is a position's, by the library's own hidden states."""
    local, is_qwen = tmp_path / "local", name in QWEN
    wrapper(name).save_pretrained(local)
    text = (
        processor_file("Qwen2VL", size={"shortest_edge": 256, "longest_edge": 4096}, patch_size=4)
        if is_qwen
        else processor_file("Llama4", size={"height": 28, "width": 28})
    )
    (local / "preprocessor_config.json").write_text(text)
    asked = source_params(local, tokens, **({"image_size": 24} if is_qwen else {}))
    for part in ("model", "inputs"):
        (tmp_path / part).mkdir()
    fetch_model(asked["model"], asked["hook_points"], tmp_path / "model")
    prepare_inputs(asked, {"train": 3}, tmp_path / "model", tmp_path / "inputs", 1)
    source: Any = open_source(asked, tmp_path, "cpu")
    width = 24 if name == "qwen2_vl" else 16
    assert source.d_in == {"vision.blocks.1.resid_post": width}
    block = source.block("train", 0, 1)
    given = normalised(torch.from_numpy(np.array(source.inputs("train")[:2])), source.preprocessing)
    expected = hidden_states(source.model, name, given[:1])[0]
    found = block.activations["vision.blocks.1.resid_post"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert block.columns["position"].tolist() == list(range(is_qwen, len(expected) + is_qwen))


@pytest.mark.parametrize(
    ("image_size", "settings", "message"),
    [
        (None, {}, r"image_size: expected a multiple of 8 from 16 to 64, .* found None\. Set it, such as 64"),
        (20, {}, r"expected a multiple of 8 from 16 to 64, .* found 20"),
        (72, {}, r"expected a multiple of 8 from 16 to 64, .* found 72"),
        (24, {"patch_size": 14}, r"patch_size: expected 4 \(config\.json\), found 14"),
    ],
)  # fmt: skip
def test_a_size_that_the_models_own_processor_would_change_is_refused(
    image_size: int | None, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    wrapper("qwen2_vl").save_pretrained(tmp_path)
    size = {"shortest_edge": 256, "longest_edge": 4096}
    text = processor_file("Qwen2VL", **{"size": size, "patch_size": 4, **settings})
    (tmp_path / "preprocessor_config.json").write_text(text)
    if image_size:
        (tmp_path / "loading.json").write_text(json.dumps({"image_size": image_size}))
    with pytest.raises(UserError, match=message):
        load_preprocessing(tmp_path)


def test_a_size_of_images_is_refused_where_the_model_has_its_own(tmp_path: Path) -> None:
    wrapper("gemma3").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(GEMMA_3))
    (tmp_path / "loading.json").write_text(json.dumps({"image_size": 24}))
    with pytest.raises(UserError, match=r"model\.image_size: expected none, .* found 24"):
        load_preprocessing(tmp_path)


def test_a_model_without_an_image_tower_is_refused() -> None:
    with pytest.raises(UserError, match=r"expected a model with an image tower, found none that takes images"):  # fmt: skip
        check_model(random_model("llama", **TEXT), ["vision.blocks.1.resid_post"])


def test_a_vision_module_that_gives_other_positions_is_refused(tmp_path: Path) -> None:
    """The merger of Qwen-VL gives one vector for four patches."""
    local = tmp_path / "local"
    wrapper("qwen2_vl").save_pretrained(local)
    text = processor_file("Qwen2VL", size={"shortest_edge": 256, "longest_edge": 4096}, patch_size=4)  # fmt: skip
    (local / "preprocessor_config.json").write_text(text)
    (tmp_path / "model").mkdir()
    asked = source_params(local, "patches", image_size=24)
    asked["hook_points"] = ["vision.module.model.visual.merger.output"]
    fetch_model(asked["model"], asked["hook_points"], tmp_path / "model")
    source: Any = open_source(asked, tmp_path, "cpu")
    with pytest.raises(UserError, match=r"merger\.output: expected 36 rows of an image .*, found \(1, 9, 16\)"):  # fmt: skip
        _ = source.model
