"""Rank correlations, and those with a third quantity taken out."""

import numpy as np


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's; None where one side is constant."""
    from scipy.stats import spearmanr

    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(spearmanr(a, b)[0])


def partial_correlation(a: np.ndarray, b: np.ndarray, given: np.ndarray) -> float | None:
    """Spearman's, with what the ranks of `given` explain linearly taken from both sides' ranks."""
    from scipy.stats import rankdata

    ranks = [rankdata(values) for values in (a, b, given)]
    a_rank, b_rank, g = (rank - rank.mean() for rank in ranks)
    if not (g @ g and a_rank @ a_rank and b_rank @ b_rank):
        return correlation(a, b)
    left, right = (rank - (rank @ g) / (g @ g) * g for rank in (a_rank, b_rank))
    scale = np.sqrt((left @ left) * (right @ right))
    return float(left @ right / scale) if scale > 1e-9 * len(a) else None


def partial_of(ab: float, a_given: float, b_given: float) -> float | None:
    """The partial correlation of a and b from the three pairwise ones; None where the third decides either wholly."""
    rest = (1 - a_given**2) * (1 - b_given**2)
    return (ab - a_given * b_given) / rest**0.5 if rest > 1e-12 else None
