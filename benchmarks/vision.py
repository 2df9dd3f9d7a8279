"""Extraction from images against the bare vision forward, and classification in one pass against one a setting.

    python benchmarks/vision.py

CLIP ViT-B/16 in shape (random weights) on JPEG photographs' size, made here: decoding, preprocessing and
extraction against the model alone on the same batches. Then the demo's kind of model and a labelled set:
all top-n settings in one pass over the images against a pass for each. Written to
benchmarks/results/vision.md and .csv.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tables import in_turns, ratio, write
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from saeflow.batch import Batch
from saeflow.evaluation.in_model import vision
from saeflow.evaluation.in_model.vision import ZeroShot, write_clean
from saeflow.evaluation.zero_shot.top_n import Ranks
from saeflow.saes.topk import TopK, TopKOptions
from saeflow.sources.decoding import ready_images
from saeflow.sources.images import read_images
from saeflow.sources.labelled import prepare_labelled
from saeflow.sources.models import fetch_model, load_model
from saeflow.sources.vision import VisionSource, prepare_inputs
from saeflow.stores import write_part

PHOTOGRAPHS, BATCH, TURNS = 64, 16, 4
DECODED_TIMES = 12
SHAPE = (500, 375)  # pixels, ImageNet's usual
HOOK_POINT = "vision.blocks.10.resid_post"
STORE = {"dtype": "bfloat16", "seed": 0, "block_contexts": BATCH}
TRAINED = {
    "scenes": {"seed": 0, "smallest": 0, "largest": 6}, "examples": 128, "pairs": 96, "batch_size": 48,
    "lr": 1e-3, "width": 64, "layers": 4, "patch_size": 8, "seed": 0,
}  # fmt: skip


def photographs(folder: Path) -> None:
    """JPEG files that cost about as much to decode as photographs: smooth noise, quality 90."""
    rng = np.random.default_rng(0)
    (folder / "any").mkdir(parents=True)
    for number in range(PHOTOGRAPHS):
        small = Image.fromarray(rng.integers(0, 255, (60, 80, 3), np.uint8))
        small.resize(SHAPE).save(folder / "any" / f"{number}.jpg", quality=90)


def vit_b_16(folder: Path) -> None:
    """A folder with a CLIP ViT-B/16 of random weights."""
    torch.manual_seed(0)
    vision = {"image_size": 224, "patch_size": 16}
    CLIPModel(CLIPConfig(vision_config=vision)).save_pretrained(folder)
    CLIPTokenizer().save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)


def extraction(root: Path) -> pd.DataFrame:
    """Rate of decoding and extraction together over that of the model alone."""
    photographs(root / "photographs")
    folder = root / "vit"
    (folder / "inputs").mkdir(parents=True)
    vit_b_16(folder / "model")
    params: dict[str, Any] = {
        "kind": "vision", "hook_points": [HOOK_POINT], "images": {"folder": str(root / "photographs")},
        "unreadable_share": 0, "evaluation_share": 1e-9, "tokens": "all", "max_norm_multiple": None,
        "forward_batch": BATCH,
    }  # fmt: skip
    wanted = {"train": 197 * PHOTOGRAPHS}
    prepare_inputs(params, wanted, folder / "model", folder / "inputs", workers=2)
    source = VisionSource(params, folder, "cpu")
    items = list(read_images(params["images"])[1]) * DECODED_TIMES
    prepare_s = []  # for PHOTOGRAPHS images, once the processes are there
    for _ in range(TURNS):
        decoded = ready_images(iter(items), source.preprocessing, 2)
        for _ in range(PHOTOGRAPHS):
            next(decoded)
        began = time.perf_counter()
        rest = sum(1 for _ in decoded)
        prepare_s.append((time.perf_counter() - began) / rest * PHOTOGRAPHS)
    body: Any = source.model.get_submodule("vision_model")
    body.encoder.layers = body.encoder.layers[:11]
    given = source.model_input(torch.from_numpy(np.array(source.inputs("train"))))
    parts = PHOTOGRAPHS // BATCH

    @torch.inference_mode()
    def forward() -> None:
        for pixels in given.split(BATCH):
            body(pixels)

    def extract() -> None:
        with tempfile.TemporaryDirectory(dir=root) as out:
            for part in range(parts):
                write_part(source, "train", part, parts, STORE, Path(out) / str(part))

    times = in_turns({"forward": forward, "extract": extract}, TURNS)
    whole = [a + statistics.median(prepare_s) for a in times["extract"]]
    per_image = {
        "bare forward": times["forward"], "extraction of decoded images": times["extract"],
        "decoding to the model's size, 2 processes": prepare_s,
    }  # fmt: skip
    rows = [
        ("extraction / bare forward (rate)", round(ratio(times["forward"], times["extract"]), 3)),
        ("the same, decoding included", round(ratio(times["forward"], whole), 3)),
        *(
            (f"ms per image, {name}", round(1e3 * statistics.median(held) / PHOTOGRAPHS, 2))
            for name, held in per_image.items()
        ),
    ]
    return pd.DataFrame(rows, columns=["measure", "median"])


def classification(root: Path) -> pd.DataFrame:
    """All settings in one pass over the images against one pass for each."""
    folder = root / "scenes"
    for name in ("model", "labelled", "clean"):
        (folder / name).mkdir(parents=True)
    fetch_model({"trained": TRAINED}, [], folder / "model")
    one = {"smallest": 1, "largest": 1}
    labelled = {
        "train": {"scenes": {"seed": 2, **one}}, "test": {"scenes": {"seed": 3, **one}},
        "per_class": {"train": 3, "test": 3}, "class_names": None, "templates": ["a photo of a {}"],
        "unreadable_share": 0,
    }  # fmt: skip
    prepare_labelled(labelled, folder / "model", folder / "labelled", 2)
    source = {"forward_batch": 32, "tokens": "all"}
    hook_point = "vision.blocks.2.resid_post"
    write_clean(
        source, folder, hook_point, torch.zeros(64), {"concept_cards": None},
        {"ones": folder / "labelled"}, "cpu", folder / "clean",
    )  # fmt: skip
    load_model(folder / "model", "cpu")
    sets = ZeroShot(folder / "clean", folder / "model", "cpu")
    sae = TopK(64, 4096, TopKOptions(k=16, auxk_weight=0))
    sae.initialise(Batch.of(torch.randn(500, 64)), torch.Generator().manual_seed(0))
    original = vision.masks

    def together() -> None:
        sets.measure(sae, is_trained=True)

    def apart() -> None:
        settings = list(original(_ranks()))
        for setting in settings:
            vision.masks = lambda ranks, one=setting: {one: original(ranks)[one]}
            sets.measure(sae, is_trained=True)
        vision.masks = original

    def _ranks() -> Any:
        counts = torch.ones(42, 4096, dtype=torch.int64)
        keys = ("train-true", "train-permuted", "test-true")
        return Ranks(dict.fromkeys(keys, counts), torch.zeros(1), 4096)

    times = in_turns({"together": together, "apart": apart}, 2)
    settings = len(original(_ranks()))
    rows = [
        (f"{settings} settings: one pass each / one pass for all (time)", round(ratio(times["apart"], times["together"]), 2)),
        ("s for all settings of an SAE, 126 + 126 images", round(statistics.median(times["together"]), 2)),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["measure", "median"])


def main() -> None:
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as temporary:
        tables = {
            "Extraction": extraction(Path(temporary)),
            "Classification": classification(Path(temporary)),
        }
    write(
        "vision",
        tables,
        f"Extraction: CLIP ViT-B/16 up to block 10, {PHOTOGRAPHS} JPEG images of {SHAPE[0]} x {SHAPE[1]} pixels, "
        f"batches of {BATCH}, medians of {TURNS} turns. Decoding is a step of its own, before the model runs: its time "
        "is added. Classification: 4096 latents on a CLIP of 4 blocks, 65 tokens an image.",
    )


if __name__ == "__main__":
    main()
