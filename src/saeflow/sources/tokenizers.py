"""The text of a tokenizer's tokens."""

import functools
from collections.abc import Callable
from typing import Any


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
