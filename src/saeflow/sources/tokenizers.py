"""The text of a tokenizer's tokens, and the tokens that begin and end a text."""

import functools
from collections.abc import Callable
from typing import Any

from saeflow.errors import UserError

_OF_ENCODERS = {"bos": "cls", "eos": "sep"}


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


def special_token(tokenizer: Any, name: str) -> int:
    """The token that begins ("bos") or ends ("eos") a text; of encoders such as BERT the one that they have in its place.

    Raises:
        UserError: the tokenizer has neither.
    """
    token = found_token(tokenizer, name)
    if token is None:
        hint = (
            "set prepend_bos: false" if name == "bos" else "choose a model whose tokenizer has one"
        )
        raise UserError(f"tokenizer: it has no {name.upper()} token; {hint}.")
    return token


def found_token(tokenizer: Any, name: str) -> int | None:
    """`special_token`, None where the tokenizer has none."""
    token = getattr(tokenizer, f"{name}_token_id")
    token = getattr(tokenizer, f"{_OF_ENCODERS[name]}_token_id") if token is None else token
    return None if token is None else int(token)
