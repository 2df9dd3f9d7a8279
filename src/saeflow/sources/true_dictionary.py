"""Unit vectors whose coherence is set: the features that synthetic activations are made of."""

import math
from collections.abc import Iterator

import numpy as np

from saeflow.errors import UserError

CLUSTER = 8
"""Features that share a direction when the coherence is raised above that of random directions."""
_ROWS_AT_ONCE = 1024
_LOWERING_STEPS = 300
_RAISING_STEPS = 30


def mean_max_cosine(features: np.ndarray) -> float:
    """Mean over features of the largest |cosine| to another feature.

    Args:
        features: (n_features, d_in) unit rows.
    """
    largest = [np.abs(cosines).max(axis=1) for _, cosines in _cosines(features)]
    return float(np.concatenate(largest).mean())


def true_dictionary(
    n_features: int, d_in: int, coherence: float | None, rng: np.random.Generator
) -> np.ndarray:
    """Unit rows with a given coherence.

    Args:
        n_features, d_in: shape.
        coherence: the mean over features of the largest |cosine| to another one; None leaves the
            directions random.
        rng: source of randomness.

    Returns:
        (n_features, d_in) float32. Lower coherence than random comes from pushing the most similar
        pairs apart, higher from a direction that each CLUSTER features share.

    Raises:
        UserError: so little coherence of so many features was not reached.
    """
    features = _unit(rng.standard_normal((n_features, d_in)))
    if coherence is not None:
        if mean_max_cosine(features) > coherence:
            features = _lowered(features, coherence)
        else:
            centres = _unit(rng.standard_normal((math.ceil(n_features / CLUSTER), d_in)))
            shared = np.repeat(centres, CLUSTER, axis=0)[:n_features]
            features = _raised(features, shared, coherence)
    return features.astype(np.float32)


def _unit(rows: np.ndarray) -> np.ndarray:
    result: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return result


def _cosines(features: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Cosines of some rows to all rows, 0 to themselves, a few rows at a time."""
    for start in range(0, len(features), _ROWS_AT_ONCE):
        rows = slice(start, min(start + _ROWS_AT_ONCE, len(features)))
        cosines = features[rows] @ features.T
        cosines[np.arange(rows.stop - start), np.arange(start, rows.stop)] = 0
        yield rows, cosines


def _lowered(features: np.ndarray, coherence: float) -> np.ndarray:
    """Gradient steps on the sum of (|cosine| - margin)+ squared, until the mean maximum is low enough."""
    margin, lowest = 0.8 * coherence, 1.0
    for _ in range(_LOWERING_STEPS):
        push = np.empty_like(features)
        for rows, cosines in _cosines(features):
            excess = np.sign(cosines) * np.maximum(np.abs(cosines) - margin, 0)
            # A step as long as the excess itself, shared among all the pairs that a feature is in.
            push[rows] = (excess @ features) / (1 + np.abs(excess).sum(axis=1, keepdims=True))
        features = _unit(features - 0.5 * push)
        lowest = min(lowest, mean_max_cosine(features))
        if lowest <= coherence:
            return features
    raise UserError(
        f"coherence: expected what {len(features)} features in {features.shape[1]} dimensions have room "
        f"for (reached: {lowest:.3f}), found {coherence}. Raise it, raise d_in or lower n_features."
    )


def _raised(features: np.ndarray, shared: np.ndarray, coherence: float) -> np.ndarray:
    """Mix in the shared directions, by bisection on how much."""
    low, high = 0.0, 1.0
    while mean_max_cosine(_unit(features + high * shared)) < coherence:
        low, high = high, 2 * high
    for _ in range(_RAISING_STEPS):
        middle = (low + high) / 2
        if mean_max_cosine(_unit(features + middle * shared)) < coherence:
            low = middle
        else:
            high = middle
    return _unit(features + high * shared)
