"""Labelled sets on disk: the activations of their images at the hook point, computed once for all SAEs."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeflow.evaluation.zero_shot.accuracy import Accuracy
from saeflow.evaluation.zero_shot.class_texts import class_features, text_features
from saeflow.files import read_json, write_json
from saeflow.progress import progress
from saeflow.sources.copies import Copies
from saeflow.sources.hook_points import block_input_of, capture, resume_at, run_from
from saeflow.sources.layouts import EMBEDDING
from saeflow.sources.models import load_model, load_tokenizer
from saeflow.sources.pixels import image_facts
from saeflow.sources.preprocessing import load_preprocessing, normalised
from saeflow.sources.vision import image_positions

logger = logging.getLogger(__name__)
SETS = "labelled.json"
SETS_FOLDER, TEXT, PROMPTS = "sets", "text.safetensors", "prompts.safetensors"


def embed(model: Any, hook_point: str, parts: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Image embeddings (n, d_embedding) float32 with `x` at the hook point.

    Args:
        parts: of some images; `block_input`, where the hook's block must run.
        x: (n, position, d_in), or (n, d_embedding) at the embedding.
    """
    if hook_point == EMBEDDING:
        return x.float()
    resumed = resume_at(model, hook_point)
    if resumed is None:
        return run_from(model, hook_point, parts.get("block_input"), None, lambda _: x).float()
    return run_from(model, resumed, x, None, lambda block_input: block_input).float()


def write_labelled(
    source: Mapping[str, Any],
    folder: Path,
    labelled: Mapping[str, Path],
    prompts: Sequence[str],
    hook_point: str,
    device: str,
    out: Path,
) -> None:
    """Run the model on every labelled set and keep what every SAE is measured on.

    Args:
        source: the source's parameters.
        folder: the source's folder, with model/.
        labelled: by name, the folders that `prepare_labelled` wrote.
        prompts: texts that concepts are compared with.
        hook_point: where the SAEs read.
        device: where the model runs.
        out: written: a folder sets/NAME for each set, with text.safetensors (features of the classes) and
            {train|test}-NNNNN.safetensors with activation (n, position, d_in), labels (n,) and, where the
            hook's block must run, block_input; prompts.safetensors; labelled.json.
    """
    model: Any = load_model(folder / "model", device)
    tokenizer = load_tokenizer(folder / "model") if labelled or prompts else None
    preprocessing = load_preprocessing(folder / "model")
    names = [hook_point]
    before = block_input_of(model, hook_point)
    if before is not None and resume_at(model, hook_point) is None:
        names.append(before)
    facts: dict[str, Any] = {}
    copies = Copies(device)
    for name, images in labelled.items():
        known = image_facts(images)
        text = class_features(model, tokenizer, known["classes"], known["templates"])
        own = out / SETS_FOLDER / name
        own.mkdir(parents=True)
        save_file({"text": text}, own / TEXT)
        score = Accuracy(len(known["classes"]))
        for split in ("train", "test"):
            pixels = np.load(images / f"{split}.npy", mmap_mode="r")
            labels = torch.from_numpy(np.load(images / f"{split}_labels.npy")).long()
            size = source["forward_batch"]
            starts = range(0, len(pixels), size)
            for number, start in enumerate(progress(starts, f"{name}: {split}", "batch")):
                stored = copies.to_device(torch.from_numpy(np.array(pixels[start : start + size])))
                given = normalised(stored, preprocessing)
                found = capture(model, names, given)
                parts = {"activation": found[hook_point], "labels": labels[start : start + size]}
                if len(names) > 1:
                    parts["block_input"] = found[names[1]]
                if split == "test":
                    clean = embed(model, hook_point, parts, parts["activation"])
                    score.add(clean.cpu() @ text.t(), parts["labels"])
                save_file(
                    {key: part.cpu().contiguous() for key, part in parts.items()},
                    own / f"{split}-{number:05d}.safetensors",
                )
        facts[name] = {
            "classes": known["classes"],
            "train_images": known["train_images"],
            "test_images": known["test_images"],
            "accuracy": score.mean(),
        }
        logger.info("%s: zero-shot accuracy %.3f of %d classes", name, score.mean(), len(text))
    if prompts:
        save_file({"text": text_features(model, tokenizer, prompts)}, out / PROMPTS)
    write_json(
        out / SETS,
        {
            "hook_point": hook_point, "sets": facts, "prompts": list(prompts), "tokens": source["tokens"],
            "prefix": preprocessing.prefix,
        },
    )  # fmt: skip


class LabelledSets:
    """Labelled sets of one source and hook point, as `write_labelled` left them.

    Args:
        clean: its folder.
        model_folder: the source's model.
        device: where the model and the SAEs run.
    """

    def __init__(self, clean: Path, model_folder: Path, device: str) -> None:
        self.folder, self.device = clean, device
        self.summary = read_json(clean / SETS)
        self.model: Any = load_model(model_folder, device)
        self.hook_point: str = self.summary["hook_point"]
        self.positions = image_positions(
            self.summary["tokens"], self.summary["prefix"], [self.hook_point]
        )

    def _files(self, name: str, split: str) -> list[Path]:
        """A set's batches in order; each set has a folder of its own, so that no name is part of another."""
        found = (self.folder / SETS_FOLDER / name).glob(f"{split}-*.safetensors")
        return sorted(found, key=lambda path: int(path.stem.removeprefix(f"{split}-")))

    def batches(self, name: str, split: str) -> Iterator[dict[str, Tensor]]:
        """The images of a set, some at a time."""
        for path in self._files(name, split):
            yield load_file(path, device=self.device)

    def labels(self, name: str, split: str) -> Tensor:
        """(images,) class of every image of a set, without reading its activations."""
        found = []
        for path in self._files(name, split):
            with safe_open(path, framework="pt") as file:
                found.append(file.get_tensor("labels"))
        return torch.cat(found)

    def class_texts(self, name: str) -> Tensor:
        """(classes, d_embedding) unit text embeddings of a set's classes."""
        result: Tensor = load_file(self.folder / SETS_FOLDER / name / TEXT)["text"]
        return result

    def prompts(self) -> tuple[list[str], Tensor]:
        """Texts that concepts are compared with, and their unit embeddings.

        Without prompts of their own, the names of all classes.
        """
        if self.summary["prompts"]:
            return self.summary["prompts"], load_file(self.folder / PROMPTS)["text"]
        sets = self.summary["sets"]
        names = [name for known in sets.values() for name in known["classes"]]
        texts = [self.class_texts(name) for name in sets]
        return names, torch.cat(texts) if texts else torch.zeros(0, 0)

    def rows_of(self, parts: Mapping[str, Tensor]) -> Tensor:
        """(n, tokens, d_in) float32, the activations that the source's stores hold."""
        x = parts["activation"].float()
        return x[:, None] if x.ndim == 2 else x[:, self.positions]

    def embed_rows(self, parts: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """Image embeddings with `rows` (n, tokens, d_in) in place of `rows_of`."""
        x = parts["activation"]
        if x.ndim == 2:
            return embed(self.model, self.hook_point, parts, rows[:, 0])
        spliced = x.clone()
        spliced[:, self.positions] = rows.to(x.dtype)
        return embed(self.model, self.hook_point, parts, spliced)
