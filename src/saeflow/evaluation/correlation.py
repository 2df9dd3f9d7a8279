"""Rank correlations, those with a third quantity taken out, and their intervals over units."""

from collections.abc import Mapping

import numpy as np

from saeflow.evaluation.resampling import drawn_units


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


def multiplicities(units: np.ndarray, settings: Mapping[str, int]) -> np.ndarray:
    """(resamples, rows) float32: how often each row is in samples of as many units as there are, with replacement.

    Args:
        units: (rows,) the unit that each row is of; all rows of a unit are drawn together.
        settings: resamples and seed.
    """
    _, unit_of = np.unique(units, return_inverse=True)
    times = np.stack(list(drawn_units(int(unit_of.max()) + 1, settings)))
    return times[:, unit_of].astype(np.float32)


def resampled_ranks(values: np.ndarray, times: np.ndarray) -> np.ndarray:
    """(resamples, rows) float32 ranks in samples that hold rows several times or not at all; ties share their mean rank.

    Args:
        values: (rows,).
        times: (resamples, rows), see `multiplicities`.
    """
    order = np.argsort(values, kind="stable")
    placed = values[order]
    starts = np.flatnonzero(np.concatenate([[True], placed[1:] != placed[:-1]]))
    held = np.add.reduceat(times[:, order], starts, axis=1)
    shared = held.cumsum(axis=1) - (held - 1) / 2
    ranks = np.empty_like(times)
    ranks[:, order] = np.repeat(shared, np.diff([*starts, len(values)]), axis=1)
    return ranks


def resampled_correlations(a: np.ndarray, b: np.ndarray, times: np.ndarray) -> np.ndarray:
    """(resamples,) correlations of ranks (resamples, rows) in samples; NaN where a side is constant."""
    rows = times.sum(axis=1, keepdims=True)
    left, right = (x - (times * x).sum(axis=1, keepdims=True) / rows for x in (a, b))
    over = (times * left * right).sum(axis=1)
    under = (times * left**2).sum(axis=1) * (times * right**2).sum(axis=1)
    with np.errstate(all="ignore"):
        return np.where(under > 0, over / np.sqrt(under), np.nan)


def resampled_partial(ab: np.ndarray, a_given: np.ndarray, b_given: np.ndarray) -> np.ndarray:
    """(resamples,) partial correlations from the pairwise ones, which are 0 with a third quantity that is constant."""
    a_given, b_given = np.nan_to_num(a_given), np.nan_to_num(b_given)
    rest = (1 - a_given**2) * (1 - b_given**2)
    with np.errstate(all="ignore"):
        return np.where(rest > 0, (ab - a_given * b_given) / np.sqrt(rest), np.nan)
