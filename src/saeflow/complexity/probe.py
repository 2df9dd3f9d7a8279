"""The complexity probe: ridge regression from an activation to a score in 0..10 (arXiv:2508.17320, section 3.1)."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from scipy.stats import pearsonr, spearmanr
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold

from saeflow.complexity.files import PROBE
from saeflow.config import SPLITS
from saeflow.errors import UserError
from saeflow.files import atomic_file, write_json
from saeflow.stores import Store

logger = logging.getLogger(__name__)

QUALITY, PREDICTIONS = "quality.json", "predictions.csv"
PIECE_ROWS = 8192
LARGEST = 10.0
LAMBDAS = [10.0**power for power in range(-8, 3)]
"""Penalties that are tried, times the number of rows; rows are divided so that their mean squared norm is 1."""
FOLDS = 5
Rows = tuple[np.ndarray, torch.Tensor, np.ndarray, np.ndarray]
"""Context (n,), activations (n, d_in) float32 raw, score (n,), unit (n,)."""
_RESAMPLES, _INTERVAL = 1000, (0.025, 0.975)
_RANGE = (1, 99)  # percentiles of the training scores that map to 0 and LARGEST


def fit_probe(
    scores: Path,
    stores: Mapping[str, Store],
    low_high: tuple[float, float] | None,
    where: Mapping[str, str],
    out: Path,
) -> None:
    """Fit the probe on the training split, and say how good it is on the evaluation split.

    Without a training split, whose rows are trained on window by window, a random half of the evaluation split's documents
    takes its place.

    Args:
        scores: scores.csv of `score_contexts`.
        stores: of one hook point, by split; the training split may be left out.
        low_high: the scores that map to 0 and 10; None: the 1st and 99th percentile of the training
            split's. What lies beyond is 0 or 10.
        where: columns that predictions.csv begins with: source, hook_point, complexity.
        out: written: probe.safetensors with weight (d_in,), bias () and what a joint training needs,
            examples (n, d_in) raw activations, scores (n,), ridge () and the scale () that rows were divided
            by where it counts, float64; predictions.csv;
            quality.json with rmse, r2, pearson and spearman by split.

    Raises:
        UserError: fewer than 10 scored rows are in a store.
    """
    table = pd.read_csv(scores)
    found = {
        split: scored_rows(store, table[table["split"] == split]) for split, store in stores.items()
    }
    rows = found if "train" in found else _halves(found["evaluation"])
    train_scores = rows["train"][2]
    low, high = low_high or np.percentile(train_scores, _RANGE).tolist()
    if not low < high:
        raise UserError(
            f"complexity: all contexts have the score {low:g}; a probe cannot learn from it. Choose "
            "another scorer, or give a range."
        )
    y = {
        split: np.clip((score - low) / (high - low), 0, 1) * LARGEST
        for split, (_, _, score, _) in rows.items()
    }
    scale = stores.get("train", stores["evaluation"]).scale
    x = {split: rows[split][1].double().numpy() / scale for split in SPLITS}
    units = {split: rows[split][3] for split in SPLITS}
    if (groups := len(np.unique(units["train"]))) < 2:
        raise UserError(
            "complexity: expected scored contexts of two or more documents in the training split, found one; cross-validation "
            "needs documents to hold out. Score more contexts, or extract more rows."
        )
    search = GridSearchCV(
        Ridge(),
        {"alpha": [ridge * len(y["train"]) for ridge in LAMBDAS]},
        scoring="neg_root_mean_squared_error",
        cv=GroupKFold(min(FOLDS, groups), shuffle=True, random_state=0),
    ).fit(x["train"], y["train"], groups=units["train"])
    best = search.best_estimator_
    at_edge = search.best_index_ in (0, len(LAMBDAS) - 1)
    if at_edge:
        logger.warning(
            "probe: the penalty with the least error, %g, is at the edge of those tried: a better one may lie beyond",
            best.alpha,
        )
    predicted = {split: np.clip(best.predict(x[split]), 0, LARGEST) for split in SPLITS}
    tensors = {
        "weight": torch.tensor(best.coef_ / scale, dtype=torch.float32),
        "bias": torch.tensor(best.intercept_, dtype=torch.float32),
        "ridge": torch.tensor(best.alpha, dtype=torch.float32),
        "scale": torch.tensor(scale, dtype=torch.float64),
        "examples": rows["train"][1],
        "scores": torch.tensor(y["train"], dtype=torch.float32),
    }
    with atomic_file(out / PROBE) as staged:
        save_file(tensors, staged)
    predictions = [
        pd.DataFrame(
            {
                **where,
                "split": split,
                "context": rows[split][0],
                "score": y[split],
                "predicted": predicted[split],
            }
        )
        for split in SPLITS
    ]
    pd.concat(predictions).to_csv(out / PREDICTIONS, index=False, lineterminator="\n")
    quality: dict[str, Any] = {
        "ridge": best.alpha,
        "at_edge": at_edge,
        "cross_validated_rmse": -search.best_score_,
        "range": [low, high],
        **{split: agreement(y[split], predicted[split], units[split]) for split in SPLITS},
    }
    write_json(out / QUALITY, quality)
    logger.info("probe: %s on held-out contexts", quality["evaluation"])


def _halves(rows: Rows) -> dict[str, Rows]:
    """Rows by split, where a random half of their documents is trained on and the rest is held out."""
    units = np.unique(rows[3])
    chosen = np.random.default_rng(0).permutation(units)[: -(-len(units) // 2)]
    is_chosen = np.isin(rows[3], chosen)
    logger.info(
        "probe: fitted to %d of the %d held-out documents, and measured on the others", len(chosen), len(units),
    )  # fmt: skip
    context, x, score, unit = rows
    return {
        split: (context[of], x[torch.from_numpy(of)], score[of], unit[of])
        for split, of in (("train", is_chosen), ("evaluation", ~is_chosen))
    }


def scored_rows(store: Store, table: pd.DataFrame) -> Rows:
    """The rows of a store that have a score.

    Rows that the store left out (for their norm) are left out here.

    Returns:
        context (n,), activations (n, d_in) float32 raw, score (n,), unit (n,), in the store's order.

    Raises:
        UserError: fewer than 10.
    """
    if len(table) == 0:
        raise UserError(f"{store.path}: no context of its split has a complexity score. Add some.")
    length = int(table["position"].max()) + 1
    keys = (table["context"] * length + table["position"]).to_numpy(np.int64)
    order = np.argsort(keys)
    keys, scores = keys[order], table["score"].to_numpy(np.float64)[order]
    units = table["unit"].to_numpy(np.int64)[order]
    contexts, activations, found, of = [], [], [], []
    for start, rows in store.in_order(PIECE_ROWS):
        context = store.column("context", start, start + len(rows))
        position = store.column("position", start, start + len(rows)).astype(np.int64)
        wanted = context * length + position
        at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        hit = np.flatnonzero((keys[at] == wanted) & (position < length))
        contexts.append(context[hit])
        activations.append(rows[torch.from_numpy(hit)].float())
        found.append(scores[at[hit]])
        of.append(units[at[hit]])
    if sum(map(len, found)) < 2 * FOLDS:
        raise UserError(
            f"{store.path}: expected at least {2 * FOLDS} rows with a complexity score, found "
            f"{sum(map(len, found))}. Score more contexts, or extract more rows."
        )
    return (
        np.concatenate(contexts),
        torch.cat(activations),
        np.concatenate(found),
        np.concatenate(of),
    )


def agreement(
    score: np.ndarray, predicted: np.ndarray, units: np.ndarray
) -> dict[str, float | None]:
    """RMSE, R^2 with its 95 % interval over units, Pearson and Spearman correlation; None where one side is constant.

    Args:
        score, predicted: (n,).
        units: (n,) the document (image, sample) that each is of; one alone gives no interval.
    """
    error = float(np.square(score - predicted).sum())
    spread = float(np.square(score - score.mean()).sum())
    varies = spread > 0 and bool(np.ptp(predicted) > 0)
    return {
        "contexts": len(score),
        "rmse": (error / len(score)) ** 0.5,
        "r2": 1 - error / spread if spread > 0 else None,
        **_interval(np.square(score - predicted), np.square(score - score.mean()), units),
        "pearson": float(pearsonr(score, predicted)[0]) if varies else None,
        "spearman": float(spearmanr(score, predicted)[0]) if varies else None,
    }


def _interval(errors: np.ndarray, spreads: np.ndarray, units: np.ndarray) -> dict[str, Any]:
    """The bootstrap interval of R^2, drawn by units."""
    names, unit_of = np.unique(units, return_inverse=True)
    sums = np.stack([np.bincount(unit_of, weights=values) for values in (errors, spreads)])
    low = high = None
    if len(names) > 1 and spreads.sum() > 0:
        random = np.random.default_rng(0)
        drawn = random.integers(len(names), size=(_RESAMPLES, len(names)))
        counts = np.stack([np.bincount(one, minlength=len(names)) for one in drawn])
        error, spread = sums @ counts.T
        known = spread > 0
        low, high = np.quantile(1 - error[known] / spread[known], _INTERVAL).tolist()
    return {"units": len(names), "r2_low": low, "r2_high": high}
