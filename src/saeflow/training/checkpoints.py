"""Checkpoints without pickle: one safetensors file whose name carries the digest of its bytes."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from saeflow.errors import UserError
from saeflow.files import atomic_file, file_digest

_NAME = "checkpoint-{step:09d}-{digest}.safetensors"
_DIGEST_CHARACTERS = 16


def write_checkpoint(
    folder: Path, step: int, tensors: dict[str, torch.Tensor], counters: dict[str, Any]
) -> Path:
    """Write a checkpoint, then delete those before it."""
    staged = folder / ".checkpoint.partial"
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        staged,
        metadata={"counters": json.dumps({"step": step, **counters}, sort_keys=True)},
    )
    digest = file_digest(staged)[:_DIGEST_CHARACTERS]
    path = folder / _NAME.format(step=step, digest=digest)
    with atomic_file(path) as target:
        staged.replace(target)
    for other in checkpoints(folder):
        if other != path:
            other.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, the latest last."""
    return sorted(folder.glob("checkpoint-*.safetensors"))


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and counters of a checkpoint.

    Raises:
        UserError: its bytes are not those that were written.
    """
    if file_digest(path)[:_DIGEST_CHARACTERS] != path.stem.split("-")[-1]:
        raise UserError(
            f"{path}: the checkpoint is damaged (its SHA-256 is not the one in its name). Delete it; "
            "training then starts afresh."
        )
    with safe_open(path, "pt") as file:
        counters = json.loads(file.metadata()["counters"])
    return load_file(path), counters
