"""A small CLIP trained on generated scenes and their captions: a real model where none can be fetched.

The contrastive loss of CLIP (Radford et al. 2021, arXiv:2103.00020): each image's caption against all
others of the batch, and the reverse. The result is an ordinary Hugging Face folder.
"""

import logging
import math
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from saeflow.files import write_json
from saeflow.progress import progress
from saeflow.sources import scenes

logger = logging.getLogger(__name__)

MEAN = STD = (0.5, 0.5, 0.5)
_TEXT_LAYERS = 2
_HEAD_WIDTH = 32
_LONGEST_CAPTION = 48
_BETAS, _WEIGHT_DECAY, _WARMUP = (0.9, 0.98), 0.05, 0.1
_MOST_LOGIT_SCALE = math.log(100)  # as in the paper
_RENDERED_AT_ONCE = 256
_END = "</w>"
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
_SINGLES = {"smallest": 1, "largest": 1}


def train_clip(options: Mapping[str, Any], folder: Path, workers: int) -> None:
    """Train a CLIP model and save it with tokenizer and preprocessing.

    Every second batch holds scenes with one object only, so that its colour, size and ground must tell
    them apart, and not their number of objects.

    Args:
        options: scenes (seed, smallest, largest), examples (pairs that are rendered), pairs (shown in
            all), batch_size, lr, width, layers, patch_size, seed.
        folder: existing folder; written: model, tokenizer, preprocessor_config.json and steps.json.
        workers: processes that render; torch's own threads train.
    """
    import torch
    from torch.nn.functional import cross_entropy, normalize
    from transformers import CLIPModel

    images, captions, is_single = _pairs(options, workers)
    tokenizer = make_tokenizer(captions)
    encoded = tokenizer(captions, padding=True, return_tensors="pt")["input_ids"]
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    config = clip_config(options, **ids, vocab_size=len(tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options["seed"])
        model: Any = CLIPModel._from_config(
            config, attn_implementation="eager"
        )  # fastest at this size
    model.train()
    steps = options["pairs"] // options["batch_size"]
    optimiser = torch.optim.AdamW(
        model.parameters(), options["lr"], _BETAS, weight_decay=_WEIGHT_DECAY, fused=True
    )
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, options["lr"], total_steps=steps, pct_start=_WARMUP
    )
    rng = np.random.default_rng(options["seed"])
    target = torch.arange(options["batch_size"])
    pools = (np.flatnonzero(is_single), np.arange(len(captions)))
    losses = []
    for step in progress(range(steps), "CLIP on scenes", "step"):
        chosen = rng.choice(pools[step % 2], options["batch_size"], replace=False)
        pixels = torch.from_numpy(images[chosen]).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        tokens = encoded[torch.from_numpy(chosen)]
        image = normalize(model.get_image_features(pixels).pooler_output, dim=1)
        text = normalize(model.get_text_features(tokens).pooler_output, dim=1)
        logits = model.logit_scale.exp() * image @ text.t()
        loss = (cross_entropy(logits, target) + cross_entropy(logits.t(), target)) / 2
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rate.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=_MOST_LOGIT_SCALE)
        losses.append(loss.item())
    last = losses[-max(1, steps // 20) :]
    logger.info("contrastive loss %.3f at the start, %.3f at the end", losses[0], np.mean(last))
    save_clip(model, tokenizer, folder)
    write_json(folder / "steps.json", {"loss": losses})


def save_clip(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a CLIP for images of scenes' size, with tokenizer and preprocessing."""
    from transformers import CLIPImageProcessorPil

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": scenes.SIDE},
        crop_size={"height": scenes.SIDE, "width": scenes.SIDE},
        image_mean=list(MEAN),
        image_std=list(STD),
    ).save_pretrained(folder)


def clip_config(options: Mapping[str, Any], **text: Any) -> Any:
    """The shape of a CLIP that is trained; `text`: what its tokenizer decides of its text tower."""
    from transformers import CLIPConfig

    width = options["width"]
    shape = {
        "hidden_size": width,
        "num_attention_heads": max(1, width // _HEAD_WIDTH),
        "projection_dim": width,
    }
    return CLIPConfig(
        text_config={
            **shape, **text, "intermediate_size": 2 * width,
            "num_hidden_layers": _TEXT_LAYERS, "max_position_embeddings": _LONGEST_CAPTION,
        },
        vision_config={
            **shape, "intermediate_size": 4 * width, "num_hidden_layers": options["layers"],
            "image_size": scenes.SIDE, "patch_size": options["patch_size"],
        },
        projection_dim=width,
    )  # fmt: skip


def make_tokenizer(captions: list[str]) -> Any:
    """CLIP's byte-pair encoding with merges that make one token of every word of the captions.

    A word is what CLIP's own splitting makes of a caption: letters, one digit, punctuation, or an ending such as
    `'s`. The words' order decides which pieces are merged, so that the result is always the same (training breaks
    ties by chance).
    """
    tokenizer = _tokenizer([])
    words = sorted({word for text in captions for word in _words(tokenizer, text)})
    merges: dict[tuple[str, str], None] = {}
    while True:
        pieces = [found for word in words if len(found := tokenizer.tokenize(word)) > 1]
        if not pieces:
            return tokenizer
        for first, *rest in pieces:
            front = first
            for piece in rest:
                merges[front, piece] = None
                front += piece
        tokenizer = _tokenizer(list(merges))


def _tokenizer(merges: list[tuple[str, str]]) -> Any:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    merged = dict.fromkeys("".join(pair) for pair in merges)
    known = [*letters, *(letter + _END for letter in letters), *merged, *_SPECIAL]
    vocabulary = {piece: number for number, piece in enumerate(known)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges)


def _words(tokenizer: Any, text: str) -> list[str]:
    """The words of a text that are encoded each by itself."""
    backend = tokenizer.backend_tokenizer
    clean = backend.normalizer.normalize_str(text)
    found = backend.pre_tokenizer.pre_tokenize_str(clean)
    return [clean[start:stop] for _, (start, stop) in found]


def _pairs(options: Mapping[str, Any], workers: int) -> tuple[np.ndarray, list[str], np.ndarray]:
    """(pairs, SIDE, SIDE, 3) uint8 scenes, their captions, and which have one object on purpose."""
    count = options["examples"]
    ranges = [
        range(start, min(start + _RENDERED_AT_ONCE, count))
        for start in range(0, count, _RENDERED_AT_ONCE)
    ]
    work = partial(_render, dict(options["scenes"]))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        parts = list(pool.map(work, ranges))
    images = np.concatenate([part[0] for part in parts])
    return images, [text for part in parts for text in part[1]], np.arange(count) % 2 == 0


def _render(params: Mapping[str, Any], numbers: range) -> tuple[np.ndarray, list[str]]:
    """Scenes of some numbers; those with an even number have one object."""
    drawn = []
    for number in numbers:
        own = {**params, **(_SINGLES if number % 2 == 0 else {})}
        scene = scenes.draw_scene(own, number)
        drawn.append((scenes.render(scene)[0], scenes.caption(scene, own, number)))
    return np.stack([picture for picture, _ in drawn]), [text for _, text in drawn]
