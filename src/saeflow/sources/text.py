"""Text sources: a language model reads packed contexts of tokens."""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saeflow.errors import UserError
from saeflow.sources.base import Column
from saeflow.sources.documents import documents_digests, is_evaluation, read_documents
from saeflow.sources.layouts import check_hook_points
from saeflow.sources.model_source import ModelSource
from saeflow.sources.text_files import check_encoding

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_CHARACTERS_AT_ONCE = 1 << 20
_LOG_EVERY_S = 30


def check(name: str, params: Mapping[str, Any], folder: Path) -> None:
    """Check hook points as far as they can be told before the model is fetched, and the text's encoding."""
    check_hook_points(name, params, folder)
    if encoding := params.get("text", {}).get("encoding"):
        check_encoding(encoding)


def external_inputs(params: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the text."""
    return documents_digests(params["text"])


def open_source(params: Mapping[str, Any], folder: Path, device: str) -> "TextSource":
    """Open the model and the contexts in `folder`."""
    return TextSource(params, folder, device)


def rows_per_context(params: Mapping[str, Any]) -> int:
    """Rows that each context gives: its length, less the first position where that is skipped."""
    return int(params["context_length"]) - bool(params["skip_first"])


def prepare_inputs(
    params: Mapping[str, Any],
    rows: Mapping[str, int],
    model: Path,
    folder: Path,
    workers: int = 1,
) -> None:
    """Tokenise and pack documents into contexts, split by document; memory stays bounded.

    Documents follow one another with the tokenizer's EOS after each; a context may begin and end inside
    a document.

    Args:
        params: a text source.
        rows: rows asked for by split, rounded up to whole contexts.
        model: the folder that `fetch_model` wrote.
        folder: written: `{split}.npy` (contexts, context_length) int32 token ids, and
            `{split}_documents.npy` (contexts,) int32, which document each context begins in.

    Raises:
        UserError: too little text, or the tokenizer or model does not fit.
    """
    from saeflow.sources.models import load_config, load_tokenizer

    tokenizer: Any = load_tokenizer(model)
    length = int(params["context_length"])
    config = load_config(model)
    _check_model(config, length)
    bos = [_special(tokenizer, "bos")] if params["prepend_bos"] else []
    eos = _special(tokenizer, "eos")
    n_contexts = {split: math.ceil(n / rows_per_context(params)) for split, n in rows.items()}
    packers = {split: _Packer(folder, split, n, length, bos) for split, n in n_contexts.items()}
    logged = time.monotonic()
    for batch in _batches(params["text"], params["evaluation_share"], packers):
        encoded = tokenizer([text for _, _, text in batch], add_special_tokens=False, verbose=False)
        for (number, split, _), ids in zip(batch, encoded["input_ids"], strict=True):
            tokens = np.array([*ids, eos], dtype=np.int32)
            if tokens.max() >= config.vocab_size:
                raise UserError(
                    f"{model}: the tokenizer gives id {tokens.max()}, the model knows ids below "
                    f"{config.vocab_size}. Use the tokenizer that belongs to the model."
                )
            packers[split].add(number, tokens)
        if time.monotonic() - logged > _LOG_EVERY_S:
            logged = time.monotonic()
            logger.info("%s", ", ".join(map(str, packers.values())))
    for packer in packers.values():
        packer.close()
    logger.info("%s", ", ".join(map(str, packers.values())))


def _check_model(config: Any, length: int) -> None:
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise UserError(
            f"context_length: expected at most {limit} (the model's positions), found {length}. Lower it."
        )


def _special(tokenizer: Any, name: str) -> int:
    token = getattr(tokenizer, f"{name}_token_id")
    if token is None:
        hint = (
            "set prepend_bos: false" if name == "bos" else "choose a model whose tokenizer has one"
        )
        raise UserError(f"tokenizer: it has no {name.upper()} token; {hint}.")
    return int(token)


def _batches(
    text: Mapping[str, Any], share: float, packers: Mapping[str, "_Packer"]
) -> Iterator[list[tuple[int, str, str]]]:
    """Documents that are still wanted as (number, split, text), some characters at a time."""
    batch: list[tuple[int, str, str]] = []
    characters = 0
    for number, document in enumerate(read_documents(text)):
        split = "evaluation" if is_evaluation(document, share) else "train"
        if document and split in packers and not packers[split].is_full:
            batch.append((number, split, document))
            characters += len(document)
        if characters >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
            if all(packer.is_full for packer in packers.values()):
                return
    if batch:
        yield batch


class _Packer:
    """Contexts of one split, written to disk as they fill."""

    def __init__(self, folder: Path, split: str, n: int, length: int, bos: list[int]) -> None:
        self.split = split
        self.count = 0
        self.n = n
        self.length = length
        self.bos = bos
        self.body = length - len(bos)
        self.tokens = _new_array(folder / f"{split}.npy", (n, length))
        self.documents = _new_array(folder / f"{split}_documents.npy", (n,))
        self.pending: list[tuple[int, np.ndarray]] = []
        self.pending_size = 0

    @property
    def is_full(self) -> bool:
        return self.count >= self.n

    def __str__(self) -> str:
        return f"{self.split}: {self.count} of {self.n} contexts"

    def add(self, document: int, tokens: np.ndarray) -> None:
        """Append a document's tokens, and write the contexts that are complete."""
        self.pending.append((document, tokens))
        self.pending_size += len(tokens)
        full = min(self.pending_size // self.body, self.n - self.count)
        if full == 0:
            return
        joined = np.concatenate([tokens for _, tokens in self.pending])
        numbers = np.array([number for number, _ in self.pending])
        ends = np.cumsum([len(tokens) for _, tokens in self.pending])
        starts = np.arange(full) * self.body
        rows = slice(self.count, self.count + full)
        self.tokens[rows, : len(self.bos)] = self.bos
        self.tokens[rows, len(self.bos) :] = joined[: full * self.body].reshape(full, self.body)
        self.documents[rows] = numbers[np.searchsorted(ends, starts, side="right")]
        self.count += full
        rest = joined[full * self.body :]
        self.pending = [(document, rest)] if len(rest) else []
        self.pending_size = len(rest)

    def close(self) -> None:
        """Put the last contexts on disk.

        Raises:
            UserError: there were too few.
        """
        if not self.is_full:
            raise UserError(
                f"text: it gives {self.count} contexts of {self.length} tokens for the {self.split} "
                f"split, {self.n} are asked for. Lower {self.split}_rows in stores, change "
                "evaluation_share, or add text."
            )
        for array in (self.tokens, self.documents):
            array.flush()


def _new_array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.int32, shape=shape)


class TextSource(ModelSource):
    """Activations of a language model at its hook points, context by context.

    Args:
        params: a text source.
        folder: results/sources/NAME, with model/ and inputs/.
        device: where the model runs.
    """

    columns: dict[str, Column] = {  # noqa: RUF012
        "context": (np.dtype(np.int64), ()),
        "position": (np.dtype(np.int32), ()),
        "token": (np.dtype(np.int32), ()),
    }

    def __init__(self, params: Mapping[str, Any], folder: Path, device: str) -> None:
        first = int(params["skip_first"])
        super().__init__(params, folder, device, slice(first, None), rows_per_context(params))

    @cached_property
    def d_in(self) -> dict[str, int]:
        """Width of the activations by hook point."""
        from saeflow.sources.models import load_config

        width = int(load_config(self.folder / "model").hidden_size)
        return dict.fromkeys(self.hook_points, width)

    def model_input(self, inputs: "Tensor") -> "Tensor":
        """(n, context_length) token ids."""
        return inputs.long()

    def known(self, split: str, start: int, stop: int) -> dict[str, np.ndarray]:
        """The token of each row."""
        return {"token": self.inputs(split)[start:stop, self.positions]}
