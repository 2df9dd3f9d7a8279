"""Tokenizers of fetched models: loading them, and the text of a token."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeflow.sources.loading import one_line
from saeflow.sources.models import model_place, pinned_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path | str) -> "PreTrainedTokenizerBase":
    """Load a fetched model's tokenizer.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    folder = model_place(folder)
    with (
        pinned_files(folder, weights=False) as (local, files),
        one_line(
            f"{local}: the tokenizer cannot be loaded",
            "Add the tokenizer's files (tokenizer.json) to the model's folder, as the installed libraries write them.",
        ),
    ):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            files, trust_remote_code=False, local_files_only=True
        )
        tokenizer.encode("a")  # some settings fail only when they are used
    return tokenizer


def token_texts(tokenizer: Any) -> Callable[[int], str]:
    """From a token's id to its text as it stands inside a text, its space before it included.

    Some tokenizers drop the first space of what they decode (Llama 2, Mistral), so a token is decoded after another.
    Special tokens have no text.
    """
    before = tokenizer.encode("a", add_special_tokens=False)[-1:]
    special = set(tokenizer.all_special_ids)

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    start = decode(before)

    @functools.cache
    def text(token: int) -> str:
        if token in special:
            return ""
        both = decode([*before, token])
        return both.removeprefix(start) if both.startswith(start) else decode([token])

    return text
