"""Models: changed tokenizers, preprocessors and configs, damaged headers of weights."""

import functools
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .reading import (
    REFUSED,
    WrongError,
    demand,
    read,
    rotten,
    write_json_or_rot,
)

_templates = tempfile.TemporaryDirectory(prefix="saeflow-templates-")


@functools.cache
def clip() -> Path:
    """A tiny random CLIP with its preprocessor."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    folder = Path(_templates.name, "clip")
    torch.manual_seed(0)
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = small | {
        "vocab_size": 60,
        "max_position_embeddings": 8,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    vision = small | {"image_size": 32, "patch_size": 8}
    made = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    made.save_pretrained(folder)
    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**sides).save_pretrained(folder)
    return folder


@functools.cache
def language_model() -> Path:
    """A tiny random GPT-2 with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = Path(_templates.name, "lm")
    torch.manual_seed(0)
    config = GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=32, vocab_size=300, bos_token_id=0, eos_token_id=1)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


def copied(template: Path, folder: Path, *, weights: bool = False) -> Path:
    """A copy of a model's folder."""
    place = folder / "model"
    place.mkdir()
    for path in template.iterdir():
        if weights or path.suffix != ".safetensors":
            shutil.copy(path, place / path.name)
    return place


def tokenizer(rng: random.Random, folder: Path) -> None:
    """A changed tokenizer.json gives what the tokenizers library reads of it, or is refused."""
    from tokenizers import Tokenizer

    from saeflow.sources.models import load_tokenizer

    place = copied(language_model(), folder)
    name = rng.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"])
    write_json_or_rot(rng, place / name, json.loads((place / name).read_text()))
    text = "the quick brown fox, ö🙂"
    found = read(lambda: load_tokenizer(place).encode(text, add_special_tokens=False), place)
    if found is REFUSED or name != "tokenizer.json":
        return
    expected = Tokenizer.from_file(str(place / name)).encode(text, add_special_tokens=False).ids
    demand(found == expected, f"{found} are not the ids of the tokenizer, {expected}")


def processor(rng: random.Random, folder: Path) -> None:
    """A changed preprocessor_config.json gives the pixels of CLIP's own processor, or is refused."""
    from PIL import Image
    from transformers import CLIPImageProcessorPil

    from saeflow.sources.preprocessing import fit, load_preprocessing, normalised

    place = copied(clip(), folder)
    path = place / "preprocessor_config.json"
    write_json_or_rot(rng, path, json.loads(path.read_text()))
    noise = np.random.default_rng(0).integers(0, 255, (45, 61, 3), np.uint8)

    def ours() -> np.ndarray:
        preprocessing = load_preprocessing(place)
        return normalised(
            torch.from_numpy(fit(Image.fromarray(noise), preprocessing)[None].copy()), preprocessing
        ).numpy()

    found = read(ours, place)
    if found is REFUSED:
        return
    try:
        own = CLIPImageProcessorPil.from_pretrained(place)
        theirs = own(Image.fromarray(noise), return_tensors="np")
    except Exception as error:
        raise WrongError(
            f"CLIP's own processor refuses it ({error}): {path.read_text()[:600]}"
        ) from error
    expected = np.asarray(theirs["pixel_values"])
    demand(found.shape == expected.shape, f"pixels of {found.shape}, CLIP's own are {expected.shape}")  # fmt: skip
    demand(np.allclose(found, expected, atol=1e-4), f"off by {np.abs(found - expected).max()}: {path.read_text()[:600]}")  # fmt: skip


def model_files(rng: random.Random, folder: Path) -> None:
    """A model with a changed config.json or a damaged header of weights is loaded whole or refused."""
    from saeflow.sources.models import fetch_model, load_model

    place = copied(language_model(), folder, weights=True)
    if rng.random() < 0.5:
        path = place / "config.json"
        write_json_or_rot(rng, path, json.loads(path.read_text()))
    else:
        path = place / "model.safetensors"
        path.write_bytes(rotten(rng, path.read_bytes(), first=2000))
    fetched = folder / "fetched"
    fetched.mkdir()

    def work() -> Any:
        fetch_model({"folder": str(place)}, ["blocks.1.resid_post"], fetched)
        return load_model(fetched, "cpu")

    found = read(work, folder)
    if found is not REFUSED:
        demand(len(found.transformer.h) >= 2, "a model without the block that is asked for")
