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
from sklearn.model_selection import GridSearchCV, KFold

from saeflow.complexity.files import PROBE
from saeflow.config import SPLITS
from saeflow.errors import UserError
from saeflow.files import atomic_file, write_json
from saeflow.stores import Store

logger = logging.getLogger(__name__)

QUALITY, PREDICTIONS = "quality.json", "predictions.csv"
PIECE_ROWS = 8192
LARGEST = 10.0
LAMBDAS = [0.01, 0.1, 1.0, 10.0, 100.0, 1000.0]
FOLDS = 5
_RANGE = (1, 99)  # percentiles of the training scores that map to 0 and LARGEST


def fit_probe(
    scores: Path,
    stores: Mapping[str, Store],
    low_high: tuple[float, float] | None,
    where: Mapping[str, str],
    out: Path,
) -> None:
    """Fit the probe on the training split, and say how good it is on the evaluation split.

    Args:
        scores: scores.csv of `score_contexts`.
        stores: of one hook point, by split.
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
    rows = {split: scored_rows(stores[split], table[table["split"] == split]) for split in SPLITS}
    train_scores = rows["train"][2]
    low, high = low_high or np.percentile(train_scores, _RANGE).tolist()
    if not low < high:
        raise UserError(
            f"complexity: all contexts have the score {low:g}; a probe cannot learn from it. Choose "
            "another scorer, or give a range."
        )
    y = {
        split: np.clip((score - low) / (high - low), 0, 1) * LARGEST
        for split, (_, _, score) in rows.items()
    }
    scale = stores["train"].scale
    x = {split: rows[split][1].double().numpy() / scale for split in SPLITS}
    search = GridSearchCV(
        Ridge(),
        {"alpha": LAMBDAS},
        scoring="neg_root_mean_squared_error",
        cv=KFold(FOLDS, shuffle=True, random_state=0),
    ).fit(x["train"], y["train"])
    best = search.best_estimator_
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
        "cross_validated_rmse": -search.best_score_,
        "range": [low, high],
        **{split: agreement(y[split], predicted[split]) for split in SPLITS},
    }
    write_json(out / QUALITY, quality)
    logger.info("probe: %s on held-out contexts", quality["evaluation"])


def scored_rows(store: Store, table: pd.DataFrame) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
    """The rows of a store that have a score.

    Rows that the store left out (for their norm) are left out here.

    Returns:
        context (n,), activations (n, d_in) float32 raw, score (n,), in the store's order.

    Raises:
        UserError: fewer than 10.
    """
    if len(table) == 0:
        raise UserError(f"{store.path}: no context of its split has a complexity score. Add some.")
    length = int(table["position"].max()) + 1
    keys = (table["context"] * length + table["position"]).to_numpy(np.int64)
    order = np.argsort(keys)
    keys, scores = keys[order], table["score"].to_numpy(np.float64)[order]
    contexts, activations, found = [], [], []
    for start, rows in store.in_order(PIECE_ROWS):
        context = store.column("context", start, start + len(rows))
        position = store.column("position", start, start + len(rows)).astype(np.int64)
        wanted = context * length + position
        at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        hit = np.flatnonzero((keys[at] == wanted) & (position < length))
        contexts.append(context[hit])
        activations.append(rows[torch.from_numpy(hit)].float())
        found.append(scores[at[hit]])
    if sum(map(len, found)) < 2 * FOLDS:
        raise UserError(
            f"{store.path}: expected at least {2 * FOLDS} rows with a complexity score, found "
            f"{sum(map(len, found))}. Score more contexts, or extract more rows."
        )
    return np.concatenate(contexts), torch.cat(activations), np.concatenate(found)


def agreement(score: np.ndarray, predicted: np.ndarray) -> dict[str, float | None]:
    """RMSE, R^2, Pearson and Spearman correlation; None where one side is constant."""
    error = float(np.square(score - predicted).sum())
    spread = float(np.square(score - score.mean()).sum())
    varies = spread > 0 and bool(np.ptp(predicted) > 0)
    return {
        "contexts": len(score),
        "rmse": (error / len(score)) ** 0.5,
        "r2": 1 - error / spread if spread > 0 else None,
        "pearson": float(pearsonr(score, predicted)[0]) if varies else None,
        "spearman": float(spearmanr(score, predicted)[0]) if varies else None,
    }
