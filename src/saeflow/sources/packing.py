"""Packing of documents' tokens into contexts of one length, written to disk as they fill."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saeflow.errors import UserError
from saeflow.sources.overlap import shared_contexts

_CONTEXTS_AT_ONCE = 4096


@dataclass(frozen=True)
class Piece:
    """Tokens of a document, or those that its contexts have left over."""

    document: int
    file: str
    tokens: np.ndarray
    is_rest: bool = False


class Packer:
    """Contexts of one split, written to disk as they fill.

    Args:
        folder: where `{split}.npy` and `{split}_documents.npy` go.
        split: its name.
        n: contexts that are asked for.
        length: tokens of a context.
        bos: the tokens that each begins with.
        rows: rows that a context gives.
        most: contexts that may be packed.

    Attributes:
        goal: contexts that are enough, at most `most`; `n` at first.
        shared: (contexts,) bool, which of the first ones `leave_out` left out.
    """

    def __init__(
        self, folder: Path, split: str, n: int, length: int, bos: list[int], rows: int, most: int
    ) -> None:
        self.split = split
        self.folder = folder
        self.count = 0
        self.n = self.goal = n
        self.most = most
        self.rows = rows
        self.shared = np.zeros(0, bool)
        self.length = length
        self.bos = bos
        self.body = length - len(bos)
        self.tokens = _new_array(folder / f"{split}.npy", (self.most, length))
        self.documents = np.empty(self.most, np.int32)
        self.pending: list[Piece] = []
        self.pending_size = 0
        self.n_documents: Counter[str] = Counter()
        self.n_tokens: Counter[str] = Counter()

    @property
    def is_full(self) -> bool:
        return self.count >= self.most

    @property
    def has_enough(self) -> bool:
        return self.count >= self.goal

    def __str__(self) -> str:
        return f"{self.split}: {self.count} of {self.n} contexts"

    def add(self, piece: Piece) -> None:
        """Append a document's tokens, and write the contexts that are complete."""
        self.pending.append(piece)
        self.pending_size += len(piece.tokens)
        full = min(self.pending_size // self.body, self.most - self.count)
        if full == 0:
            return
        joined = np.concatenate([piece.tokens for piece in self.pending])
        numbers = np.array([piece.document for piece in self.pending])
        ends = np.cumsum([len(piece.tokens) for piece in self.pending])
        middles = np.arange(full) * self.body + self.body // 2
        rows = slice(self.count, self.count + full)
        self.tokens[rows, : len(self.bos)] = self.bos
        self.tokens[rows, len(self.bos) :] = joined[: full * self.body].reshape(full, self.body)
        self.documents[rows] = numbers[np.searchsorted(ends, middles, side="right")]
        self.count += full
        self._count_used(full * self.body)
        rest = joined[full * self.body :]
        left = Piece(piece.document, piece.file, rest, is_rest=len(rest) < len(piece.tokens))
        self.pending = [left] if len(rest) else []
        self.pending_size = len(rest)

    def _count_used(self, size: int) -> None:
        """Count the first tokens that wait, and their documents, as used."""
        for piece in self.pending:
            used = min(size, len(piece.tokens))
            self.n_tokens[piece.file] += used
            self.n_documents[piece.file] += used > 0 and not piece.is_rest
            size -= used

    @property
    def bodies(self) -> np.ndarray:
        """(count, body) token ids of the contexts that were packed, without their BOS."""
        return self.tokens[: self.count, len(self.bos) :]

    def leave_out(self, train: np.ndarray, run: int) -> bool:
        """Leave out contexts that share a run of tokens with those of train; tell whether enough are left.

        Of those that are packed so many are looked at as it takes; where all were, the goal is twice as many.

        Args:
            train: (contexts, body) token ids.
            run: tokens of a run.
        """
        while True:
            more = self.bodies[len(self.shared) : self.goal]
            self.shared = np.concatenate([self.shared, shared_contexts(train, more, run)])
            if int((~self.shared).sum()) >= self.n:
                return True
            has_more = self.count > self.goal
            self.goal = min(self.most, 2 * self.goal)
            if not has_more:
                return False

    def close(self) -> None:
        """Check that there are enough contexts.

        Raises:
            UserError: there were too few.
        """
        if self.count < self.n:
            raise UserError(
                f"text: it gives {self.count} contexts of {self.length} tokens for the {self.split} "
                f"split, {self.n} are asked for. Lower {self.split}_rows in stores{self._to(self.count)}, change "
                "evaluation_share, raise contexts_per_document, or add text."
            )

    def _to(self, contexts: int) -> str:
        return f" to {contexts * self.rows}" if contexts else ""

    def keep(self, run: int | None) -> tuple[np.ndarray, int]:
        """Put the contexts that are asked for on disk: the first ones that are not left out.

        Args:
            run: tokens of a run for which contexts were left out; None where none were.

        Returns:
            (n,) the document of each, and how many contexts were left out for them.

        Raises:
            UserError: too few are left.
        """
        left = np.arange(self.count) if run is None else np.flatnonzero(~self.shared)
        if len(left) < self.n:
            raise UserError(
                f"text: {len(self.shared) - len(left)} of {len(self.shared)} contexts of the {self.split} split share a run of "
                f"{run} tokens with the training split, {len(left)} are left, {self.n} are asked for. Lower "
                f"{self.split}_rows in stores{self._to(len(left))}, add text, or set shared_run to a longer run or null."
            )
        left = left[: self.n]
        dropped = int(left[-1]) + 1 - self.n
        documents = self.documents[left]
        if self.most > self.n:
            path = self.folder / f"{self.split}.npy"
            kept = _new_array(path.with_suffix(".part"), (self.n, self.length))
            for start in range(0, self.n, _CONTEXTS_AT_ONCE):
                some = slice(start, start + _CONTEXTS_AT_ONCE)
                kept[some] = self.tokens[left[some]]
            self.tokens = kept
            path.with_suffix(".part").replace(path)
        self.tokens.flush()
        np.save(self.folder / f"{self.split}_documents.npy", documents)
        return documents, dropped


def _new_array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.int32, shape=shape)
