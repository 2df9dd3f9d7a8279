"""Automated interpretability by detection (after Paulo et al. 2024, arXiv 2410.13928), without a network.

From examples on which a latent fires and on which it does not, a scorer says of held-out windows of text whether
the latent fires on their marked token. What it gets right is the latent's score. The scorer is a function, so that
a language model can take the place of the one given here, which knows tokens and nothing of meaning: a latent that
it cannot predict may still have a meaning, one that it can predict has a simple one.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import sparse

from saeflow.config import SCORER
from saeflow.errors import UserError
from saeflow.plugins import load_function

logger = logging.getLogger(__name__)

_SMOOTHING = 0.5


@dataclass(frozen=True)
class Window:
    """A marked token of a text with what stands around it.

    Attributes:
        tokens: ids, -1 outside of the context.
        mark: place of the marked one.
        fires: whether the latent fires on it; None where the scorer is asked.
        texts: of each token, empty outside of the context.
    """

    tokens: tuple[int, ...]
    mark: int
    fires: bool | None = None
    texts: tuple[str, ...] = ()


Scorer = Callable[[Sequence[Window], Sequence[Window]], Sequence[float]]
"""From examples and windows to a finite score for each window, positive where the latent is said to fire."""


def by_tokens(examples: Sequence[Window], windows: Sequence[Window]) -> list[float]:
    """Naive Bayes on the marked token and the one before it: log P(token | fires) / P(token | not), summed.

    Probabilities are (count + 1/2) / (examples + 1); a token that no example has says nothing.
    """
    places = (0, -1)
    counts: dict[tuple[int, bool], dict[int, int]] = {}
    totals = {fires: sum(one.fires is fires for one in examples) for fires in (True, False)}
    for one in examples:
        for place in places:
            held = counts.setdefault((place, bool(one.fires)), {})
            token = _token(one, place)
            held[token] = held.get(token, 0) + 1

    def score(window: Window) -> float:
        found = 0.0
        for place in places:
            token = _token(window, place)
            yes, no = (
                (counts.get((place, fires), {}).get(token, 0) + _SMOOTHING) / (totals[fires] + 1)
                for fires in (True, False)
            )
            found += float(np.log(yes / no))
        return found

    return [score(window) for window in windows]


def _token(window: Window, place: int) -> int:
    at = window.mark + place
    return window.tokens[at] if at >= 0 else -1


SCORERS: dict[str, Scorer] = {"tokens": by_tokens}


def scorer_of(name: str) -> Scorer:
    """A key of SCORERS, or the function that `package.module:function` names.

    Raises:
        UserError: it cannot be imported, or is no function.
    """
    return SCORERS.get(name) or load_function(name, SCORER)


@dataclass(frozen=True)
class Text:
    """Rows of one split of a text.

    Attributes:
        latents: (rows, d_sae) sparse.
        context, position: (rows,) where each row stands.
        tokens: (contexts, length) token ids.
        strings: from a token's id to its text.
    """

    latents: sparse.csr_array
    context: np.ndarray
    position: np.ndarray
    tokens: np.ndarray
    strings: Callable[[int], str]

    def window(self, row: int, before: int, after: int, fires: bool | None) -> Window:
        """Return the tokens around a row."""
        line, at = self.tokens[self.context[row]], int(self.position[row])
        places = range(at - before, at + after + 1)
        held = tuple(int(line[i]) if 0 <= i < len(line) else -1 for i in places)
        texts = tuple("" if token < 0 else self.strings(token) for token in held)
        return Window(held, before, fires, texts)


def detect(
    train: Text, test: Text, settings: Mapping[str, Any], scorer: Scorer
) -> list[dict[str, Any]]:
    """Score a random sample of the latents that can be judged.

    A latent can be judged if it fires on so many rows as are shown and asked about, and on at most half of the rows.

    Args:
        train: rows that examples are taken from.
        test: rows that are asked about.
        settings: latents (how many), examples (of each side), windows (of each side), before, after,
            threshold, seed.
        scorer: is shown examples of a latent, asked about windows in random order.

    Returns:
        Lines: latent, firing (rows of test), balanced_accuracy, auc, shuffled, interpretable (0 or 1).

    Raises:
        UserError: the scorer gives something else than a finite number for each window.
    """
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(settings["seed"])
    columns = {split: text.latents.tocsc() for split, text in (("train", train), ("test", test))}
    fired = {split: np.diff(column.indptr) for split, column in columns.items()}
    enough = (fired["train"] >= settings["examples"]) & (fired["test"] >= settings["windows"])
    for split, column in columns.items():
        enough &= fired[split] <= column.shape[0] // 2
    judged = np.sort(rng.permutation(np.flatnonzero(enough))[: settings["latents"]])
    logger.info("%d of %d latents can be judged", enough.sum(), len(enough))
    lines = []
    for latent in judged.tolist():
        sides = {}
        for split, text, count in (
            ("train", train, settings["examples"]),
            ("test", test, settings["windows"]),
        ):
            column = columns[split]
            on = column.indices[column.indptr[latent] : column.indptr[latent + 1]]
            off = np.setdiff1d(np.arange(column.shape[0]), on)
            rows = [(int(row), True) for row in rng.permutation(on)[:count]]
            rows += [(int(row), False) for row in rng.permutation(off)[:count]]
            shuffled = [rows[i] for i in rng.permutation(len(rows))]  # their order tells nothing
            sides[split] = [
                text.window(row, settings["before"], settings["after"], fires)
                for row, fires in shuffled
            ]
        asked = [replace(one, fires=None) for one in sides["test"]]
        scores = _checked(scorer(sides["train"], asked), len(asked), latent)
        answers = np.array([bool(one.fires) for one in sides["test"]])
        accuracy = balanced_accuracy(scores, answers)
        lines.append(
            {
                "latent": latent, "firing": int(fired["test"][latent]), "balanced_accuracy": accuracy,
                "auc": float(roc_auc_score(answers, scores)),
                "shuffled": balanced_accuracy(scores, rng.permutation(answers)),
                "interpretable": int(accuracy >= settings["threshold"]),
            }
        )  # fmt: skip
    return lines


def _checked(scores: Any, windows: int, latent: int) -> np.ndarray:
    try:
        found = np.asarray(scores, float)
    except (TypeError, ValueError):
        found = np.array(None, float)
    where = f"{SCORER}: latent {latent}: expected {windows} finite numbers, one a window, found"
    if found.shape != (windows,):
        what = f"an array of shape {found.shape}" if found.ndim else f"{scores!r:.60}"
        raise UserError(f"{where} {what}. Fix the scorer.")
    if not np.isfinite(found).all():
        first = int(np.flatnonzero(~np.isfinite(found))[0])
        raise UserError(f"{where} {found[first]} for window {first}. Fix the scorer.")
    return found


def balanced_accuracy(scores: np.ndarray, answers: np.ndarray) -> float:
    """Mean over both answers of the share that the sign of the score gets right."""
    said = scores > 0
    return float((said[answers].mean() + (~said[~answers]).mean()) / 2)
