"""Sparse probing: how well a few latents tell what is asked of a row (Gurnee et al. 2023, arXiv 2305.01610).

For each question the k latents whose mean activations on training rows differ most, in absolute value, between yes
and no (Gurnee et al.'s maximum mean difference, as in SAEBench, arXiv 2503.09532) go into a logistic regression with
an L2 penalty, which is then asked of held-out rows. The same is done with k of the activation's own dimensions
(neurons), and with all of them, for comparison.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

logger = logging.getLogger(__name__)

_FEWEST = 50
"""A question with fewer rows of either answer is left out."""
_STEPS = 500


@dataclass(frozen=True)
class Rows:
    """Some rows of one split.

    Attributes:
        x: (rows, d_in) float32 activations.
        latents: (rows, d_sae) sparse.
        answers: by question, (rows,) bool.
    """

    x: np.ndarray
    latents: sparse.csr_array
    answers: Mapping[str, np.ndarray]


def probe(
    train: Rows, test: Rows, counts: Sequence[int], limit: int, seed: int
) -> list[dict[str, Any]]:
    """Answer every question from a few latents, from a few neurons and from the whole activation.

    Args:
        train: rows on which latents are chosen and regressions fitted.
        test: rows they are asked of.
        counts: k, how many latents or neurons; where there are fewer, a line is left out.
        limit: rows of each split used at most, half of them yes.
        seed: which rows.

    Returns:
        Lines: task, method (latents, neurons, activation), k (empty for activation), train_rows, test_rows,
        accuracy, f1, auc.
    """
    lines = []
    for task in train.answers:
        if task not in test.answers:
            logger.info("%s: not asked of held-out rows, left out", task)
            continue
        chosen = [
            balanced(split.answers[task], limit, seed + i) for i, split in enumerate((train, test))
        ]
        if min(map(len, chosen)) < 2 * _FEWEST:
            logger.info("%s: too few rows, left out", task)
            continue
        y = [split.answers[task][rows] for split, rows in zip((train, test), chosen, strict=True)]
        for method, k, inputs in _inputs(train, test, chosen, y[0], counts):
            known = {"task": task, "method": method, "k": k}
            sizes = {"train_rows": len(chosen[0]), "test_rows": len(chosen[1])}
            lines.append({**known, **sizes, **regress(*inputs, *y)})
    return lines


def balanced(answers: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """Row numbers, equally many yes and no, at most `limit`, in ascending order."""
    rng = np.random.default_rng(seed)
    sides = [np.flatnonzero(answers), np.flatnonzero(~answers)]
    each = min(*map(len, sides), limit // 2)
    return np.sort(np.concatenate([rng.permutation(side)[:each] for side in sides]))


def most_different(values: Any, answers: np.ndarray, k: int) -> np.ndarray:
    """The k columns of `values` (rows, columns) whose means differ most between yes and no, the first on a tie."""
    means = [
        np.asarray(values[side].mean(axis=0, dtype=np.float64)).reshape(-1)
        for side in (answers, ~answers)
    ]
    return np.argsort(-np.abs(means[0] - means[1]), kind="stable")[:k]


def _inputs(
    train: Rows, test: Rows, rows: Sequence[np.ndarray], y: np.ndarray, counts: Sequence[int]
) -> Iterator[tuple[str, int | None, tuple[np.ndarray, np.ndarray]]]:
    """Method, k, and what goes into the regression of each split."""
    for method, parts in (
        ("latents", (train.latents[rows[0]], test.latents[rows[1]])),
        ("neurons", (train.x[rows[0]], test.x[rows[1]])),
    ):
        order = most_different(parts[0], y, max(counts))
        picked = tuple(_dense(part[:, order]) for part in parts)
        for k in counts:
            if k > parts[0].shape[1]:
                continue
            yield method, k, (picked[0][:, :k], picked[1][:, :k])
    yield "activation", None, (train.x[rows[0]], test.x[rows[1]])


def _dense(values: Any) -> np.ndarray:
    return values.toarray() if sparse.issparse(values) else np.asarray(values)


def regress(
    train: np.ndarray, test: np.ndarray, y_train: np.ndarray, y_test: np.ndarray
) -> dict[str, float]:
    """Return accuracy, F1 and AUC on the test rows of a logistic regression on standardised inputs."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score, roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_STEPS))
    model.fit(train, y_train)
    said = model.predict(test)
    return {
        "accuracy": float((said == y_test).mean()),
        "f1": float(f1_score(y_test, said)),
        "auc": float(roc_auc_score(y_test, model.decision_function(test))),
    }
