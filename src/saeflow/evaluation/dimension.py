"""Local intrinsic dimension of activations: how many directions vary around a row.

By scikit-dimension: the maximum-likelihood estimator (Levina and Bickel 2004; averaged over neighbours as
Haro et al. 2008) and TwoNN (Facco et al. 2017) in the neighbourhood of each row. Neighbours are taken
among the sampled rows alone.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from saeflow.errors import UserError

logger = logging.getLogger(__name__)

DIMENSIONS = "dimension.safetensors"


def write_dimensions(store: Any, settings: Mapping[str, Any], folder: Path) -> None:
    """Estimate the dimension around the first rows of a store, which are a random sample of it.

    Args:
        store: the evaluation split.
        settings: `rows`, and `neighbours`, sizes of the neighbourhood to sweep.
        folder: written: dimension.safetensors with `mle-K` and `twonn-K` (rows,) float32 for each
            size K, and `norm` (rows,).

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
    found = {"norm": np.linalg.norm(x, axis=1).astype(np.float32)}
    for neighbours in settings["neighbours"]:
        for name, values in local_dimensions(x, neighbours).items():
            found[f"{name}-{neighbours}"] = values.astype(np.float32)
            logger.info("%s, %d neighbours: mean %.1f", name, neighbours, np.nanmean(values))
    save_file(found, folder / DIMENSIONS)


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
