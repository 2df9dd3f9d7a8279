"""Yes-or-no questions about a row whose answer the source knows: what sparse probes are asked for.

Text: what kind of token it is, and of which kind of document. Scenes: whether a patch shows an object, and of
which colour and size. Labelled images: the image's class. Synthetic data: whether a true feature is active.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_FEATURES = 8
_CLASSES = 12

TOKENS: dict[str, Callable[[str], bool]] = {
    "starts a word": lambda text: text[:1].isspace() and text.strip().isalpha(),
    "letters without a space before": lambda text: text.isalpha(),
    "capitalised": lambda text: text.strip()[:1].isupper(),
    "number": lambda text: any(c.isdigit() for c in text),
    "punctuation": lambda text: (
        bool(text.strip()) and not any(c.isalnum() or c == _PIECE for c in text)
    ),
    "white space": lambda text: bool(text) and text.isspace(),
}
"""Facts that a token's own text shows."""
_PIECE = "\ufffd"
"""The text of bytes that are no whole character."""


def asked(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """(rows,) bool: which rows are asked; where patches show objects, not the CLS token, which shows them all."""
    if _of_patches(columns):
        return columns["position"] > 0
    return np.ones(len(columns["position"]), bool)


def tasks(columns: Mapping[str, np.ndarray], known: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The questions that rows of a store have an answer to.

    Args:
        columns: the store's columns, each (rows, ...).
        known: of text, `strings` (token id -> text) and, where documents are of several kinds, `kinds`, (contexts,)
            the kind of the document that each context begins in, and `all_kinds`; of images, `classes`, their names;
            of other sources, `questions`, each with the column that answers it: 0 for no.

    Returns:
        By question, (rows,) bool.
    """
    if "token" in columns:
        return _of_text(columns, known)
    if "true_indices" in columns:
        indices = columns["true_indices"]
        return {f"feature {i}": (indices == i).any(1) for i in range(_FEATURES)}
    if _of_patches(columns):
        return _of_scenes(columns["cover"])
    if "questions" in known:
        return {name: columns[column] != 0 for name, column in known["questions"].items()}
    names = known.get("classes", [])[:_CLASSES]
    return {name: columns["label"] == number for number, name in enumerate(names)}


def _of_patches(columns: Mapping[str, np.ndarray]) -> bool:
    return "cover" in columns and bool((columns["position"] > 0).any())


def _of_text(columns: Mapping[str, np.ndarray], known: Mapping[str, Any]) -> dict[str, np.ndarray]:
    tokens, place = np.unique(columns["token"], return_inverse=True)
    texts = [known["strings"](int(token)) for token in tokens]
    found = {name: np.array([says(text) for text in texts])[place] for name, says in TOKENS.items()}
    kinds = known.get("kinds")
    if kinds is not None:
        of_row, names = np.asarray(kinds)[columns["context"]], sorted(known["all_kinds"])
        shown = names[1:] if len(names) == 2 else names  # of two, one is the other's no
        found |= {f"document: {kind}": of_row == kind for kind in shown}
    return found


def _of_scenes(cover: np.ndarray) -> dict[str, np.ndarray]:
    from saeflow.sources.scenes import CLASSES, COLOURS

    shown = np.array([*CLASSES, ""])[cover]  # -1: nothing
    found = {"an object": cover >= 0}
    found |= {f"{colour} object": np.char.find(shown, f" {colour} ") >= 0 for colour in COLOURS}
    return found | {"large object": np.char.startswith(shown, "large")}
