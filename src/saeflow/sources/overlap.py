"""Overlap of evaluation contexts with the training split: runs of tokens that stand in both.

Equal documents share a split; a paragraph that several documents quote, or a text that stands twice in one file, can
still be in both.
"""

import numpy as np

_AT_ONCE = 1 << 22
_BASE = 0x9E3779B97F4A7C15
"""Odd, so that powers of it modulo 2^64 keep apart what they multiply."""


def shared_contexts(train: np.ndarray, evaluation: np.ndarray, run: int) -> np.ndarray:
    """(contexts,) bool: the evaluation contexts that hold a run of tokens which stands in the training split.

    Brown et al. 2020 (arXiv:2005.14165, appendix C) call text with a shared run of 13 contaminated.

    Args:
        train: (contexts, length) token ids, each context going on where the last one ends; perhaps mapped from
            disk, and read some at a time, once for every 2^22 tokens of the evaluation split.
        evaluation: the same of the evaluation split.
        run: tokens of a run.
    """
    rows = max(1, _AT_ONCE // max(1, evaluation.shape[1]))
    parts = [evaluation[start : start + rows] for start in range(0, len(evaluation), rows)]
    found = [_shared(train, part, run) for part in parts]
    return np.concatenate(found) if found else np.zeros(0, bool)


def _shared(train: np.ndarray, evaluation: np.ndarray, run: int) -> np.ndarray:
    hashes = _hashes(evaluation, run)
    if not hashes.size:
        return np.zeros(len(evaluation), bool)
    known = np.unique(hashes)
    is_shared = np.zeros(len(known), bool)
    length = train.shape[1]
    rows, more = -(-_AT_ONCE // length), -(-(run - 1) // length)  # and the runs that go on
    for start in range(0, len(train), rows):
        found = _hashes(train[start : start + rows + more].reshape(-1), run)
        places = np.searchsorted(known, found).clip(max=len(known) - 1)
        is_shared[places[known[places] == found]] = True
    return np.asarray(is_shared[np.searchsorted(known, hashes)].any(axis=1))


def _hashes(tokens: np.ndarray, run: int) -> np.ndarray:
    """Hashes, uint64, of all runs along the last axis: polynomials in _BASE, put together from runs of powers of 2."""
    part = (np.asarray(tokens).astype(np.uint64) + np.uint64(1)) * np.uint64(_BASE)
    whole, done, length = part[..., :0], 0, 1
    while done < run:
        if run & length:
            whole = _joined(whole, part, done, length) if done else part
            done += length
        part, length = _joined(part, part, length, length), 2 * length
    return whole


def _joined(first: np.ndarray, second: np.ndarray, length: int, more: int) -> np.ndarray:
    """Hashes of runs of length + more tokens, from those of their beginnings and of their ends."""
    count = max(0, second.shape[-1] - length)
    factor = np.uint64(pow(_BASE, more, 1 << 64))
    result: np.ndarray = first[..., :count] * factor + second[..., length : length + count]
    return result
