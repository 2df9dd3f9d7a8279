"""Text sources: a language model reads packed contexts of tokens."""

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saeflow.errors import UserError
from saeflow.sources.base import Column, Inputs, positions
from saeflow.sources.documents import (
    Document,
    document_kinds,
    documents_digests,
    is_evaluation,
    read_documents,
    shuffled,
)
from saeflow.sources.kinds import InModel, SourceKind
from saeflow.sources.layouts import HookPoint, check_hook_points
from saeflow.sources.model_source import ModelSource
from saeflow.sources.packing import Packer, Piece
from saeflow.sources.text_files import check_encoding
from saeflow.sources.tokenizers import special_token

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

_CHARACTERS_AT_ONCE = 1 << 20
_LOG_EVERY_S = 30
_SPARE, _MOST_SPARE = 2, 16
"""Evaluation contexts that are read, and that are packed at most, for each that is asked for, where some may be left out."""


def check(name: str, params: Mapping[str, Any], folder: Path) -> None:
    """Check hook points and length as far as they can be told before the model is fetched, and the text's encoding."""
    shape = check_hook_points(name, params, folder)
    if shape is not None and "context_length" in params:
        check_length(int(params["context_length"]), shape.n_positions, f"sources.{name}.")
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
) -> dict[str, Any]:
    """Tokenise and pack documents into contexts, split by document; memory stays bounded.

    Documents come in random order (`seed`) and follow one another with the tokenizer's EOS after each; a context may
    begin and end inside a document. Of a document longer than `contexts_per_document` contexts, so much is taken,
    from a random place. Evaluation contexts that share a run of `shared_run` tokens with the training contexts are
    left out, and others are looked for, up to 16 times as many as are asked for.

    Args:
        params: a text source.
        rows: rows asked for by split, rounded up to whole contexts.
        model: the folder that `fetch_model` wrote.
        folder: written: `{split}.npy` (contexts, context_length) int32 token ids, and
            `{split}_documents.npy` (contexts,) int32, the document of each context: the one its middle is of.

    Returns:
        What was read, for the record: `files`, of each file (or data set) the documents and tokens that were packed;
        `left_out`, how many documents (or tokens of long ones) by the reason; `splits`, of each split the contexts, their documents and tokens
        and how many contexts were left out for a `shared_run`.

    Raises:
        UserError: too little text, or the tokenizer or model does not fit.
    """
    from saeflow.sources.models import load_config, load_tokenizer

    tokenizer: Any = load_tokenizer(model)
    length = int(params["context_length"])
    config = load_config(model)
    check_length(length, getattr(config, "max_position_embeddings", None))
    bos = [special_token(tokenizer, "bos")] if params["prepend_bos"] else []
    eos = special_token(tokenizer, "eos")
    wanted = {split: math.ceil(n / rows_per_context(params)) for split, n in rows.items()}
    run = params["shared_run"] if len(wanted) == 2 else None
    each = rows_per_context(params)
    spare = {"train": 1, "evaluation": 1 if run is None else _MOST_SPARE}
    packers = {
        split: Packer(folder, split, n, length, bos, each, spare[split] * n)
        for split, n in wanted.items()
    }
    if run is not None:
        packers["evaluation"].goal *= _SPARE
    most = params["contexts_per_document"]
    tokens_of_one = None if most is None else most * (length - len(bos))
    left_out: Counter[str] = Counter()
    logged = time.monotonic()
    for batch in _batches(params, packers, left_out):
        texts = [document.text for _, _, document in batch]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
        for (number, split, document), ids in zip(batch, encoded["input_ids"], strict=True):
            tokens = np.array([*ids, eos], dtype=np.int32)
            if (most_id := max([int(tokens.max()), *bos])) >= config.vocab_size:
                raise UserError(
                    f"{model}: the tokenizer gives id {most_id}, the model knows ids below "
                    f"{config.vocab_size}. Use the tokenizer that belongs to the model."
                )
            if tokens_of_one is not None and len(tokens) > tokens_of_one:
                left_out[f"tokens beyond contexts_per_document: {most}"] += (
                    len(tokens) - tokens_of_one
                )
                tokens = _some_of(tokens, tokens_of_one, (params["seed"], number))
            packers[split].add(Piece(number, document.file, tokens))
        if time.monotonic() - logged > _LOG_EVERY_S:
            logged = time.monotonic()
            logger.info("%s", ", ".join(map(str, packers.values())))
        if all(packer.has_enough for packer in packers.values()) and (
            run is None
            or packers["evaluation"].leave_out(packers["train"].bodies, run)
            or packers["evaluation"].is_full
        ):
            break
    for packer in packers.values():
        packer.close()
    names = [str(Path(name)) for name in params["text"].get("files", ())] or sorted(
        {name for packer in packers.values() for name in packer.n_tokens}
    )
    files = {
        name: {
            "documents": sum(packer.n_documents[name] for packer in packers.values()),
            "tokens": sum(packer.n_tokens[name] for packer in packers.values()),
        }
        for name in names
    }
    if run is not None:
        packers["evaluation"].leave_out(packers["train"].bodies, run)
    splits = {}
    for split, packer in packers.items():
        kept, dropped = packer.keep(run if split == "evaluation" else None)
        splits[split] = {
            "contexts": len(kept), "documents": len(np.unique(kept)),
            "tokens": len(kept) * packer.body, "shared": dropped,
        }  # fmt: skip
        logger.info(
            "%s: %d contexts of %d documents; %d left out for a run of tokens of train",
            split, len(kept), splits[split]["documents"], dropped,
        )  # fmt: skip
    return {"files": files, "left_out": dict(left_out), "splits": splits, "shared_run": run}


def _some_of(tokens: np.ndarray, most: int, seed: tuple[int, int]) -> np.ndarray:
    """Return so many tokens of a longer document, from a random place, with its EOS at their end."""
    start = int(np.random.default_rng(seed).integers(len(tokens) - most + 1))
    return np.append(tokens[start : start + most - 1], tokens[-1])


def check_length(length: int, limit: int | None, where: str = "") -> None:
    """Check that contexts are not longer than a model's positions, where these are known.

    Raises:
        UserError: they are.
    """
    if limit is not None and length > limit:
        raise UserError(
            f"{where}context_length: expected at most {limit} (the model's positions), found {length}. Lower it."
        )


def _batches(
    params: Mapping[str, Any], packers: Mapping[str, Packer], left_out: Counter[str]
) -> Iterator[list[tuple[int, str, Document]]]:
    """Documents that are still wanted as (number, split, document), some characters at a time."""
    batch: list[tuple[int, str, Document]] = []
    characters = 0
    for number, document in shuffled(read_documents(params["text"], left_out), params["seed"]):
        is_held_out = is_evaluation(document.text, params["evaluation_share"])
        split = "evaluation" if is_held_out else "train"
        if split in packers and not packers[split].is_full:
            batch.append((number, split, document))
            characters += len(document.text)
        if characters >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


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
        super().__init__(params, folder, device, positions(params), rows_per_context(params))
        self.context_length = int(params["context_length"])

    def prove(self, model: "nn.Module") -> None:
        """Compare sums, neighbours, hidden states and logits of a few tokens, and run one whole context."""
        from saeflow.sources.proof import prove_with_context

        proof = prove_with_context(model, self.hook_points, self.context_length)
        logger.info("hook points proved: %s", proof)

    def model_input(self, inputs: "Tensor") -> "Tensor":
        """(n, context_length) token ids."""
        return inputs.long()

    @cached_property
    def d_in(self) -> dict[str, int]:
        """Width of the activations by hook point; what is not the residual stream's is asked of the model."""
        import torch

        from saeflow.sources.hook_points import capture
        from saeflow.sources.models import load_config

        width = getattr(load_config(self.folder / "model"), "hidden_size", None)
        found = dict.fromkeys(self.hook_points, width or 0)
        if others := [n for n in found if width is None or not HookPoint.parse(n).is_in_stream]:
            ids = torch.zeros(1, 2, dtype=torch.long, device=self.device)
            found |= {name: x.shape[-1] for name, x in capture(self.model, others, ids).items()}
        return found

    def known(self, split: str, start: int, stop: int) -> dict[str, np.ndarray]:
        """The token of each row."""
        return {"token": self.inputs(split)[start:stop, self.positions]}


def documents_of(inputs: Path, split: str) -> np.ndarray:
    """(contexts,) int32, the document of each context that `prepare_inputs` wrote to a folder."""
    documents: np.ndarray = np.load(inputs / f"{split}_documents.npy")
    return documents


class TextInputs(Inputs):
    """Packed contexts of tokens and the documents that they are of."""

    def tokens(self, split: str) -> np.ndarray:
        """(contexts, length) token ids, mapped from disk."""
        result: np.ndarray = np.load(self.folder / f"{split}.npy", mmap_mode="r")
        return result

    def units(self, split: str) -> np.ndarray:
        """(contexts,) the document of each context."""
        return documents_of(self.folder, split)

    def known(self, split: str) -> dict[str, Any]:
        """`strings`: token id to text; where documents are of several kinds, `kinds` and `all_kinds`."""
        from saeflow.sources.models import load_tokenizer
        from saeflow.sources.tokenizers import token_texts

        known: dict[str, Any] = {"strings": token_texts(load_tokenizer(self.model))}
        kinds = document_kinds(self.params["text"])
        if kinds is not None:
            known["all_kinds"] = set(kinds.tolist())
            known["kinds"] = kinds[self.units(split)]
        return known


KIND = SourceKind(
    check=check,
    external_inputs=external_inputs,
    prepare_inputs=prepare_inputs,
    open=open_source,
    inputs=TextInputs,
    rows_per_context=rows_per_context,
    probed_position=lambda params: int(params["context_length"]) - 1,
    has_tokens=True,
    in_model=InModel(module="saeflow.evaluation.in_model.text", options=("ce_contexts",)),
)
