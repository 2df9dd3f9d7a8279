"""Local intrinsic dimension of activations: how many directions vary around a row.

By scikit-dimension: the maximum-likelihood estimator (Levina and Bickel 2004; averaged over neighbours as
Haro et al. 2008) and TwoNN (Facco et al. 2017) in the neighbourhood of each row. Neighbours are taken
among the sampled rows alone. Two tables say what the estimates are worth: how far they agree with each other, and how
far they are right on as many rows of a union of manifolds of known dimension.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from saeflow.errors import UserError
from saeflow.evaluation import manifolds
from saeflow.evaluation.correlation import correlation
from saeflow.evaluation.measure import Lines
from saeflow.tables.evaluations import write_lines

logger = logging.getLogger(__name__)

DIMENSIONS = "dimension.safetensors"
_SEED = 0  # of the manifolds


def write_dimensions(
    store: Any, place: Mapping[str, str], settings: Mapping[str, Any], folder: Path
) -> None:
    """Estimate the dimension around the first rows of a store, which are a random sample of it.

    Args:
        store: the evaluation split.
        place: its source and hook_point.
        settings: `rows`, and `neighbours`, sizes of the neighbourhood to sweep.
        folder: written: dimension.safetensors with `mle-K` and `twonn-K` (rows,) float32 for each
            size K, and `norm` (rows,); dimension_agreement.csv and dimension_control.csv.

    Raises:
        UserError: the split has too few rows.
    """
    count = min(settings["rows"], store.rows)
    if count <= 2 * max(settings["neighbours"]):
        raise UserError(
            f"evaluation.dimension.neighbours: expected less than half of the {count} sampled rows, found "
            f"{max(settings['neighbours'])}. Sample more rows, or lower it."
        )
    x = store.read(0, count).double().numpy()
    found = _estimates(x, settings["neighbours"])
    norm = np.linalg.norm(x, axis=1).astype(np.float32)
    save_file({"norm": norm, **found}, folder / DIMENSIONS)
    rows, parts = manifolds.union(count, x.shape[1], _SEED)
    smallest = min(map(parts.count, parts), default=0)
    sizes = [
        size for size in settings["neighbours"] if size < smallest
    ]  # neighbours of its own part
    tables = {
        "dimension_agreement": agreement(found),
        "dimension_control": control(_estimates(rows, sizes), parts),
    }
    for name, lines in tables.items():
        write_lines(folder, name, [{**place, **line} for line in lines])


def _estimates(x: np.ndarray, sizes: Sequence[int]) -> dict[str, np.ndarray]:
    """`ESTIMATOR-NEIGHBOURS`: (rows,) float32 estimates around each row of x (rows, d_in)."""
    found = {}
    for neighbours in sizes:
        for name, values in local_dimensions(x, neighbours).items():
            found[f"{name}-{neighbours}"] = values.astype(np.float32)
            logger.info("%s, %d neighbours: mean %.1f", name, neighbours, np.nanmean(values))
    return found


def named(estimates: Mapping[str, np.ndarray]) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Estimator and neighbours of each estimate, and its values (rows,)."""
    for name in sorted(estimates):
        estimator, _, neighbours = name.partition("-")
        yield {"estimator": estimator, "neighbours": int(neighbours)}, estimates[name]


def agreement(estimates: Mapping[str, np.ndarray]) -> Lines:
    """Spearman correlation of any two estimates, over the rows that have both."""
    lines = []
    for (one, a), (other, b) in itertools.combinations(named(estimates), 2):
        both = np.isfinite(a) & np.isfinite(b)
        line = one | {f"other_{name}": value for name, value in other.items()}
        line |= {"rows": int(both.sum()), "spearman": correlation(a[both], b[both])}
        lines.append(line)
    return lines


def control(estimates: Mapping[str, np.ndarray], parts: Sequence[tuple[str, int]]) -> Lines:
    """Bias of each estimate on each manifold, and rank correlation with the true dimension on their union.

    Args:
        estimates: on the rows of `manifolds.union`.
        parts: kind and dimension of the manifold of each row.
    """
    truth = np.array([dimension for _, dimension in parts])
    lines = []
    for line, values in named(estimates):
        known = np.isfinite(values)
        for kind, dimension in dict.fromkeys(parts):
            mine = known & np.array([part == (kind, dimension) for part in parts])
            bias = float(values[mine].mean()) - dimension if mine.any() else None
            own = {"manifold": kind, "true_dimension": dimension, "rows": int(mine.sum())}
            lines.append(line | own | {"bias": bias})
        rank = correlation(values[known], truth[known])
        lines.append(line | {"manifold": "union", "rows": int(known.sum()), "spearman": rank})
    return lines


def local_dimensions(x: np.ndarray, neighbours: int) -> dict[str, np.ndarray]:
    """Both estimates around each row of x (rows, d_in), NaN where one has no value."""
    from skdim.id import MLE, TwoNN

    distinct, inverse = np.unique(
        x, axis=0, return_inverse=True
    )  # a distance of 0 has no logarithm
    with np.errstate(all="ignore"):
        mle = MLE().fit(distinct, n_neighbors=neighbours).dimension_pw_
        twonn = TwoNN().fit_pw(distinct, n_neighbors=neighbours).dimension_pw_
    return {
        name: np.where(np.isfinite(values), values, np.nan)[inverse.reshape(-1)]
        for name, values in (("mle", np.asarray(mle, float)), ("twonn", np.asarray(twonn, float)))
    }
