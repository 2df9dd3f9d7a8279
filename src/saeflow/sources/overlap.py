"""Overlap of the evaluation split with the training split, counted in runs of tokens.

Equal documents share a split; a paragraph that several documents quote, or a text that stands twice in one file, can
still be in both.
"""

import numpy as np

RUN = 32
"""Tokens of a run: long enough to be no coincidence (Lee et al. 2022, arXiv:2107.06499, take 50)."""
_SAMPLE = 8
"""One run of so many is looked at, chosen by its hash, so alike in both splits."""
_AT_ONCE = 1 << 22
_BASE = 0x9E3779B97F4A7C15
"""Odd, so that powers of it modulo 2^64 keep apart what they multiply."""


def shared_runs(train: np.ndarray, evaluation: np.ndarray) -> float:
    """Share of the evaluation split's runs of RUN tokens that stand in the training split.

    Args:
        train: (contexts, length) token ids, each context going on where the last one ends; perhaps mapped from
            disk, and read some at a time.
        evaluation: the same of the evaluation split.

    Returns:
        In 0..1, from a sample of the runs; 0 where there are none.
    """
    wanted = _sampled(evaluation.reshape(-1))
    if not len(wanted):
        return 0.0
    known = np.unique(wanted)
    is_shared = np.zeros(len(known), bool)
    length = train.shape[1]
    rows, more = -(-_AT_ONCE // length), -(-(RUN - 1) // length)  # and the runs that go on
    for start in range(0, len(train), rows):
        found = _sampled(train[start : start + rows + more].reshape(-1))
        places = np.searchsorted(known, found).clip(max=len(known) - 1)
        is_shared[places[known[places] == found]] = True
    return float(is_shared[np.searchsorted(known, wanted)].mean())


def _sampled(tokens: np.ndarray) -> np.ndarray:
    """Hashes, uint64, of the sampled runs of some tokens: polynomials in _BASE, whose length is doubled."""
    hashes = (np.asarray(tokens).astype(np.uint64) + np.uint64(1)) * np.uint64(_BASE)
    length = 1
    while length < RUN:
        factor = np.uint64(pow(_BASE, length, 1 << 64))
        hashes = hashes[:-length] * factor + hashes[length:]
        length *= 2
    mixed = (hashes ^ (hashes >> np.uint64(29))) * np.uint64(_BASE)
    return mixed[(mixed >> np.uint64(40)) % np.uint64(_SAMPLE) == 0]
