"""Text embeddings of classes and prompts, by the model's text tower."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saeflow.errors import UserError

_TEXTS_AT_ONCE = 256


def unit(rows: Tensor) -> Tensor:
    """Rows (n, d) divided by their norms; a zero row stays zero."""
    result: Tensor = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=1e-12)
    return result


def text_features(model: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Unit text embeddings (prompts, d_embedding) float32 on the CPU.

    Raises:
        UserError: the model has no text tower, or its texts are padded and the tokenizer has nothing for it.
    """
    if not hasattr(model, "get_text_features"):
        raise UserError(
            f"{type(model).__name__}: expected a model with a text tower (CLIP, SigLIP), found none; zero-shot "
            "classification needs one. Choose another model, or set evaluation.labelled_sets: {}."
        )
    found = []
    length = model.config.text_config.max_position_embeddings
    # As transformers' zero-shot pipeline does: SigLIP reads its last position, and was trained with all of them.
    padding = "max_length" if model.config.model_type == "siglip" else True
    at_once = _TEXTS_AT_ONCE
    if tokenizer.pad_token is None:
        if padding == "max_length":
            raise UserError(
                f"{tokenizer.name_or_path}: expected a tokenizer with a padding token, which SigLIP reads, found none. Set "
                "pad_token in its tokenizer_config.json."
            )
        padding, at_once = False, 1  # one text alone needs none
    device = next(model.parameters()).device
    with torch.inference_mode():
        for start in range(0, len(prompts), at_once):
            given = tokenizer(
                list(prompts[start : start + at_once]),
                padding=padding, truncation=True, max_length=length, return_tensors="pt",
            ).to(device)  # fmt: skip
            features = model.get_text_features(**given).pooler_output.float().cpu()
            found.append(unit(features))
    return torch.cat(found)


def class_features(
    model: Any, tokenizer: Any, classes: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """(classes, d_embedding) unit mean of each class's text embeddings over the templates."""
    prompts = [template.format(name) for name in classes for template in templates]
    features = text_features(model, tokenizer, prompts)
    return unit(features.view(len(classes), len(templates), -1).mean(1))
