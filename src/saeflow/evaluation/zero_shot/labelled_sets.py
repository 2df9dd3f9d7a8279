"""Labelled sets on disk: the activations of their images at the hook point, computed once for all SAEs."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from saeflow.files import read_json
from saeflow.sources.base import positions
from saeflow.sources.hook_points import resume_at, run_from
from saeflow.sources.layouts import EMBEDDING
from saeflow.sources.models import load_model

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
        return run_from(model, hook_point, parts["block_input"], None, lambda _: x).float()
    return run_from(model, resumed, x, None, lambda block_input: block_input).float()


class LabelledSets:
    """Labelled sets of one source and hook point, as `in_model.vision.write_clean` left them.

    Args:
        clean: its folder.
        model_folder: the source's model.
        device: where the model and the SAEs run.
    """

    def __init__(self, clean: Path, model_folder: Path, device: str) -> None:
        self.folder, self.device = clean, device
        self.summary = read_json(clean / SETS)
        self.model: Any = load_model(model_folder, device)
        self.positions = positions(self.summary)
        self.hook_point: str = self.summary["hook_point"]

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
        return load_file(self.folder / SETS_FOLDER / name / TEXT)["text"]

    def prompts(self) -> tuple[list[str], Tensor]:
        """Texts that concepts are compared with, and their unit embeddings.

        Without prompts of their own, the names of all classes.
        """
        if self.summary["prompts"]:
            return self.summary["prompts"], load_file(self.folder / PROMPTS)["text"]
        sets = self.summary["sets"]
        names = [name for known in sets.values() for name in known["classes"]]
        texts = [self.class_texts(name) for name in sets]
        return names, torch.cat(texts) if texts else torch.zeros(0, self.summary["d_embedding"])

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
