"""Facts of the model that a first parameter file is for, read without its weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saeflow.errors import UserError
from saeflow.shapes import config_shape
from saeflow.sources import hub
from saeflow.sources.layouts import EMBEDDING
from saeflow.sources.loading import check_weight_files
from saeflow.sources.models import FILES, config_in
from saeflow.starter.asked import Asked

_CONTEXT_LENGTH = 128
TOKENIZER = tuple(pattern for pattern in FILES if pattern != "*.safetensors")


@dataclass(frozen=True)
class Model:
    """Facts of a model, known without its weights."""

    entry: Mapping[str, Any]
    folder: Path
    """Its config.json and tokenizer."""
    name: str
    is_image: bool
    n_blocks: int
    width: int
    length: int
    """Tokens of a context, or rows of an image."""
    tokens: str
    """`tokens` of a source of images."""
    predicts: bool
    """It is made to predict next tokens."""


def read_model(asked: Asked) -> Model:
    """Facts of the model, from its folder or the hub."""
    local, named = Path(asked.model), asked.model
    if local.is_dir():
        check_weight_files(local)
        entry: dict[str, Any] = {"folder": str(local.resolve())}
        folder = local
    elif local.exists() or named.startswith((".", "/", "~")) or named.count("/") != 1:
        raise UserError(
            f"--model: expected a folder that save_pretrained wrote, or OWNER/NAME of the hub, found {named}. Fix it."
        )
    else:
        name, _, revision = named.partition("@")
        revision = revision or hub.newest_commit(name, "model")
        entry = {"hub": name, "revision": revision}
        folder = hub.config_file(name, revision).parent
    from saeflow.sources.architectures import depth_of, image_part, predicts_tokens

    shape = config_shape(folder / "config.json")
    config = config_in(folder)
    part = image_part(config)
    is_image = shape.is_of_images or (asked.images is not None and part is not config)
    _check_kind(asked, is_image)
    tokens = ""
    if is_image:
        if "hub" in entry:
            hub.snapshot(entry["hub"], entry["revision"], list(TOKENIZER))
        width, tokens, length, more = _of_tower(folder, asked.hook_point)
        entry |= more
    else:
        part = config.get_text_config()
        width = int(part.hidden_size)
        length = min(_CONTEXT_LENGTH, getattr(part, "max_position_embeddings", _CONTEXT_LENGTH))
    name = re.sub("[^a-z0-9]+", "-", named.partition("@")[0].rstrip("/").rpartition("/")[2].lower())
    n_blocks = shape.n_blocks if is_image == shape.is_of_images else None
    return Model(
        entry, folder, name.strip("-")[:60] or "model", is_image, n_blocks or depth_of(part) or 1,
        width, length, tokens, not is_image and predicts_tokens(config),
    )  # fmt: skip


def _of_tower(folder: Path, hook_point: str) -> tuple[int, str, int, dict[str, int]]:
    """Width of an image tower, `tokens` that fit it (patches where no CLS token, or registers, stand before them), rows of an
    image, and the size of images where it takes any."""
    from saeflow.sources.preprocessing import load_preprocessing
    from saeflow.sources.vision import rows_per_context

    found = load_preprocessing(folder, choose=True)
    tokens = "cls" if hook_point == EMBEDDING else "all" if found.prefix == 1 else "patches"
    rows = rows_per_context({"tokens": tokens}, found)
    return found.d_model, tokens, rows, {"image_size": found.height} if found.any_size else {}


def _check_kind(asked: Asked, is_image: bool) -> None:
    given = sum([bool(asked.text), asked.images is not None, bool(asked.dataset)])
    if given != 1:
        raise UserError(
            f"init: expected one of --text, --images and --dataset, found {given or 'none'}. Give one."
        )
    if asked.encoding and not asked.text:
        raise UserError(
            "--encoding: expected --text, whose files it is of, found none. Leave it out."
        )
    kinds = ("a language model", "a model of images")
    if (asked.text and is_image) or (asked.images and not is_image):
        expected, found = kinds if asked.text else kinds[::-1]
        option = "--text" if asked.text else "--images"
        raise UserError(f"--model: expected {expected} for {option}, found {found}: {asked.model}.")
