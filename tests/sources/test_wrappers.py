"""Models of images and text: their language part as a causal language model, their image tower where it is plain."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from saeflow.errors import UserError
from saeflow.sources.heads import no_predictions
from saeflow.sources.hook_points import capture, check_model
from saeflow.sources.layouts import PLACES
from saeflow.sources.preprocessing import fit, load_preprocessing, normalised
from saeflow.sources.proof import prove

from .conftest import check_two_sequential_blocks, random_model

TEXT: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
SIGHT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": TEXT, "vision_config": SIGHT, "mm_tokens_per_image": 4},
    "llama4": {
        "text_config": {**TEXT, "intermediate_size_mlp": 24, "num_local_experts": 2, "moe_layers": [1]},
        "vision_config": {**SIGHT, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    },
    "llava": {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": {**SIGHT, "model_type": "clip_vision_model"}},
    "qwen2_vl": {
        "text_config": {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 16},
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 16},
    },
}  # fmt: skip
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


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_its_image_tower_is_proved(name: str) -> None:
    model = wrapper(name)
    proof = prove(model, tower="vision.")
    assert (proof.linked, proof.sums, proof.hidden_states) == (2, 3, 3)
    assert proof.identities == 3 * len(PLACES)
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


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_a_tower_of_patches_of_any_image_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"found none that takes images of one size"):
        check_model(wrapper(name), ["vision.blocks.1.resid_post"])


def test_a_tower_that_does_not_take_pixels_by_that_name_is_refused() -> None:
    """Llama 4 puts its CLS token last, too."""
    config = transformers.AutoConfig.for_model("llama4", **WRAPPERS["llama4"])
    torch.manual_seed(0)
    model: Any = transformers.Llama4ForConditionalGeneration(config).eval()
    with pytest.raises(
        UserError, match=r"takes pixel_values of a fixed image_size, found Llama4VisionModel"
    ):
        prove(model, [], "vision.")
