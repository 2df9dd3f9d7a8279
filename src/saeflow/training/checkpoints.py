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
_STAGED = "checkpoint.safetensors"
_DIGEST_CHARACTERS = 16


def write_checkpoint(
    folder: Path, step: int, tensors: dict[str, torch.Tensor], facts: dict[str, Any]
) -> Path:
    """Write a checkpoint; once it is whole, delete those before it.

    Args:
        folder: of the run.
        step: steps done.
        tensors: by name.
        facts: what else to remember; small, as JSON in the file's header.
    """
    header = {"facts": json.dumps({"step": step, **facts}, sort_keys=True)}
    with atomic_file(folder / _STAGED) as staged:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            staged,
            metadata=header,
        )
    digest = file_digest(folder / _STAGED)[:_DIGEST_CHARACTERS]
    path = (folder / _STAGED).replace(folder / _NAME.format(step=step, digest=digest))
    delete_checkpoints(folder, but=path)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in a folder, the latest last."""
    return sorted(folder.glob("checkpoint-*.safetensors"))


def delete_checkpoints(folder: Path, but: Path | None = None) -> None:
    """Delete checkpoints and what killed runs left of them."""
    for pattern in ("checkpoint*.safetensors", ".*.partial"):
        for path in folder.glob(pattern):
            if path != but:
                path.unlink()


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint.

    Raises:
        UserError: its bytes are not those that were written.
    """
    if file_digest(path)[:_DIGEST_CHARACTERS] != path.stem.split("-")[-1]:
        raise UserError(
            f"{path}: the checkpoint is damaged (its SHA-256 is not the one in its name). Delete it; "
            "training then goes on from the one before it, or starts afresh."
        )
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    return load_file(path), facts
