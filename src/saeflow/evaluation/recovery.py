"""Recovery of a known dictionary: is every true feature found, and does its latent fire when it is on?"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saeflow.evaluation.measure import Result, Seen

_K_STEPS = 64


@dataclass(frozen=True)
class Matching:
    """True features matched to latents.

    Attributes:
        latent: (features,) int64, the latent of each feature, -1 where it has none.
        cosine: (features,) float64, their similarity, 0 where it has none.
    """

    latent: np.ndarray
    cosine: np.ndarray


def cosines(features: Tensor, directions: Tensor) -> np.ndarray:
    """(features, latents) cosine similarities in float64; a zero vector is similar to nothing."""
    unit = [
        torch.nn.functional.normalize(rows.detach().cpu().double(), dim=1)
        for rows in (features, directions)
    ]
    return (unit[0] @ unit[1].T).numpy()


def match(similarity: np.ndarray) -> Matching:
    """One-to-one matching with the largest sum of `similarity` (features, latents)."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(similarity, maximize=True)
    latent = np.full(len(similarity), -1, dtype=np.int64)
    cosine = np.zeros(len(similarity))
    latent[rows], cosine[rows] = columns, similarity[rows, columns]
    return Matching(latent, cosine)


def spearman(pairs: Counter[tuple[int, int]]) -> float | None:
    """Spearman correlation of weighted pairs, ties at their mean rank; None if one is constant."""
    points = np.array(list(pairs.keys()))
    weights = np.array(list(pairs.values()), dtype=np.float64)
    ranks = [_weighted_ranks(points[:, axis], weights) for axis in (0, 1)]
    a, b = (rank - np.average(rank, weights=weights) for rank in ranks)
    scale = np.sqrt((weights * a * a).sum() * (weights * b * b).sum())
    return float((weights * a * b).sum() / scale) if scale > 0 else None


def _weighted_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    _, distinct = np.unique(values, return_inverse=True)
    mass = np.bincount(distinct, weights=weights)
    return (np.cumsum(mass) - (mass - 1) / 2)[distinct]


class Recovery:
    """Streaming sums of recovered supports.

    Args:
        features: (n_features, d_in) true dictionary.
        directions: (d_sae, d_in) decoder of the SAE.
    """

    def __init__(self, features: Tensor, directions: Tensor) -> None:
        similarity = cosines(features, directions)
        self.matching = match(similarity)
        absolute = match(np.abs(similarity))
        self.mcc = float(absolute.cosine.sum() / min(similarity.shape))
        self.rows = self.hits = self.fired = self.present = 0
        self.l0_pairs: Counter[tuple[int, int]] = Counter()
        self.k_pairs: Counter[tuple[int, int]] = Counter()

    def add(
        self, latents: Tensor, true_indices: np.ndarray, allowed_k: Tensor | None = None
    ) -> None:
        """Add rows.

        Args:
            latents: (n, d_sae).
            true_indices: (n, most) int, the features that are on, padded with -1.
            allowed_k: (n,) the k that the SAE allowed each row, where it chooses one.
        """
        indices = torch.as_tensor(np.asarray(true_indices), dtype=torch.int64)
        on = (indices >= 0).to(latents.device)
        latent_of = torch.as_tensor(self.matching.latent)[indices.clamp(min=0)].to(latents.device)
        active = latents != 0
        hit = active.gather(1, latent_of.clamp(min=0)) & on & (latent_of >= 0)
        l0, true_count = active.sum(1), on.sum(1)
        self.rows += len(latents)
        self.hits += int(hit.sum())
        self.fired += int(l0.sum())
        self.present += int(true_count.sum())
        self.l0_pairs.update(zip(l0.tolist(), true_count.tolist(), strict=True))
        if allowed_k is not None:
            steps = (allowed_k.double() * _K_STEPS).round().long()
            self.k_pairs.update(zip(steps.tolist(), true_count.tolist(), strict=True))

    def update(self, seen: Seen) -> None:
        """Add rows of a store with the column `true_indices`."""
        self.add(seen.latents, seen.column("true_indices"), seen.allowed)

    def result(self) -> Result:
        return Result(self.metrics())

    def metrics_of_dictionary(self) -> dict[str, float]:
        """Return matched_feature_cosine and mcc, which need no rows."""
        return {
            "matched_feature_cosine": float(self.matching.cosine.mean()),
            "mcc": self.mcc,
        }

    def metrics(self) -> dict[str, float]:
        """Return the metrics of recovery that have a value; needs at least one row."""
        metrics: dict[str, float | None] = {
            **self.metrics_of_dictionary(),
            "support_precision": self.hits / self.fired if self.fired else None,
            "support_recall": self.hits / self.present if self.present else None,
            "support_f1": (
                2 * self.hits / (self.fired + self.present) if self.fired + self.present else None
            ),
            "true_l0_mean": self.present / self.rows,
            "spearman_l0_true": spearman(self.l0_pairs),
            "spearman_k_hat_true": spearman(self.k_pairs) if self.k_pairs else None,
        }
        return {name: value for name, value in metrics.items() if value is not None}
