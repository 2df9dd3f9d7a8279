"""Prompts that ask for a word's first letter, and the model's activation at the word (Chanin et al. 2024, arXiv 2409.14507)."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from saeflow.errors import UserError
from saeflow.sources.heads import no_predictions
from saeflow.sources.hook_points import capture
from saeflow.sources.tokenizers import token_texts

LETTERS = string.ascii_lowercase
_WORD = "{word}"
_WHERE = "evaluation.interpretability.absorption"
_BETWEEN = "\n"
"""Before each example: some tokenizers read the first word of a text otherwise (SAEBench 0.6.0)."""


@dataclass(frozen=True)
class Prompt:
    """A text that asks for the first letter of its last word.

    Attributes:
        text: the whole of it.
        end: place in `text` just after the word.
    """

    text: str
    end: int


def words_of(tokenizer: Any) -> list[str]:
    """Texts of the tokens that are English letters with at most one space before, in order of the alphabet."""
    texts = token_texts(tokenizer)
    found = {texts(token) for token in range(len(tokenizer))}
    return sorted(text for text in found if _is_word(text))


def _is_word(text: str) -> bool:
    letters = text.removeprefix(" ")
    return letters.isascii() and letters.isalpha()


def first_letter(word: str) -> str:
    """Return a word's first letter in lower case; a space before the word does not count."""
    return word.strip()[0].lower()


def prompts(words: Sequence[str], template: str, examples: int, seed: int) -> list[Prompt]:
    """One prompt a word: examples of other words with their letter, then the word without.

    Args:
        words: each appears in other words' examples.
        template: of one line, with {word} in it; the answer stands after a space.
        examples: how many a prompt shows.
        seed: which ones.

    Raises:
        UserError: fewer words than a prompt shows, or a template without {word}.
    """
    if template.count(_WORD) != 1:
        raise UserError(f"{_WHERE}.template: expected {_WORD} once, found {template!r}. Fix it.")
    if len(words) <= examples:
        raise UserError(
            f"{_WHERE}: expected more than {examples} words in each split for as many examples, found {len(words)}. "
            "Raise words, or lower examples."
        )
    rng = np.random.default_rng(seed)
    after = template.partition(_WORD)[2]
    found = []
    for number, word in enumerate(words):
        others = rng.choice(len(words) - 1, examples, replace=False)
        shown = [words[other + (other >= number)] for other in others]
        lines = [f"{template.replace(_WORD, one)} {first_letter(one).upper()}" for one in shown]
        text = _BETWEEN + _BETWEEN.join([*lines, template.replace(_WORD, word)])
        found.append(Prompt(text, len(text) - len(after)))
    return found


def activations(
    model: Any,
    tokenizer: Any,
    hook_point: str,
    asked: Sequence[Prompt],
    policy: Mapping[str, Any],
    device: str,
) -> np.ndarray:
    """(prompts, d_in) float32 activations at the last token of each prompt's word.

    Args:
        model: a causal language model.
        tokenizer: its own, a fast one.
        hook_point: where it is read.
        asked: prompts.
        policy: parameters of the source: prepend_bos, forward_batch (prompts at once).
        device: of the model.

    Raises:
        UserError: the tokenizer does not say where its tokens stand in a text, or a prompt is longer than the model reads.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"{_WHERE}: expected a fast tokenizer (tokenizer.json), which says where a "
            f"token stands in a text, found {type(tokenizer).__name__}. Set it to null for this source."
        )
    if (why_not := no_predictions(model)) is not None:
        raise UserError(
            f"{_WHERE}: expected a model that sees each token's past alone, found that {why_not}. Set it to null for this "
            "source."
        )
    bos = [tokenizer.bos_token_id] if policy["prepend_bos"] else []
    found = []
    for start in range(0, len(asked), policy["forward_batch"]):
        batch = asked[start : start + policy["forward_batch"]]
        encoded = tokenizer(
            [prompt.text for prompt in batch], add_special_tokens=False, return_offsets_mapping=True
        )
        ids = [bos + one for one in encoded["input_ids"]]
        places = [
            len(bos) + max(i for i, (left, _) in enumerate(offsets) if left < prompt.end)
            for prompt, offsets in zip(batch, encoded["offset_mapping"], strict=True)
        ]
        length = max(map(len, ids))
        most = getattr(model.config.get_text_config(), "max_position_embeddings", length)
        if length > most:
            raise UserError(
                f"{_WHERE}.examples: expected prompts of at most {most} tokens, which is what the model reads, found one "
                f"of {length}. Lower it."
            )
        # What fills up stands after the word, where it is not seen.
        filled = torch.tensor([one + one[-1:] * (length - len(one)) for one in ids], device=device)
        x = capture(model, [hook_point], filled)[hook_point]
        found.append(x[torch.arange(len(batch)), torch.tensor(places)].float().cpu().numpy())
    return np.concatenate(found)
