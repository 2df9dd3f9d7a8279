"""Recovery of a known dictionary: is every true feature found, and does its latent fire when it is on?"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saeflow.evaluation.correlation import partial_of
from saeflow.evaluation.measure import Result, Seen

_K_STEPS = 64
_NORM_STEPS = 256
"""Steps of a norm's logarithm to base 2: 0.3 % of the norm."""
_CHANCE_SEED = 271828
SIMILAR = 0.7
"""Cosine above which a feature counts as found."""


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
        is_signed: whether latents may be negative, so that one stands for a direction and its opposite: then signs
            of cosines do not count.
    """

    def __init__(self, features: Tensor, directions: Tensor, *, is_signed: bool = False) -> None:
        similarity = cosines(features, directions)
        absolute = match(np.abs(similarity))
        self.matching = absolute if is_signed else match(similarity)
        self.mcc = float(absolute.cosine.sum() / min(similarity.shape))
        generator = torch.Generator().manual_seed(_CHANCE_SEED)
        random = torch.randn(directions.shape, generator=generator, dtype=torch.float64)
        by_chance = cosines(features, random)
        self.chance = float(match(np.abs(by_chance) if is_signed else by_chance).cosine.mean())
        self.rows = self.hits = self.fired = self.present = 0
        self.l0_pairs: Counter[tuple[int, int]] = Counter()
        self.k_pairs: Counter[tuple[int, int]] = Counter()
        self.norm_pairs: dict[str, Counter[tuple[int, int]]] = {
            name: Counter() for name in ("true", "l0", "k_hat")
        }

    def add(
        self,
        latents: Tensor,
        true_indices: np.ndarray,
        allowed_k: Tensor | None = None,
        norms: Tensor | None = None,
    ) -> None:
        """Add rows.

        Args:
            latents: (n, d_sae).
            true_indices: (n, most) int, the features that are on, padded with -1.
            allowed_k: (n,) the k that the SAE allowed each row, where it chooses one.
            norms: (n,) of the activations, where correlations are wanted given the norm.
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
        seen = {"true": true_count.tolist(), "l0": l0.tolist()}
        self.l0_pairs.update(zip(seen["l0"], seen["true"], strict=True))
        if allowed_k is not None:
            seen["k_hat"] = (allowed_k.double() * _K_STEPS).round().long().tolist()
            self.k_pairs.update(zip(seen["k_hat"], seen["true"], strict=True))
        if norms is not None:
            steps = (norms.double().clamp(min=1e-30).log2() * _NORM_STEPS).round().long().tolist()
            for name, values in seen.items():
                self.norm_pairs[name].update(zip(steps, values, strict=True))

    def update(self, seen: Seen) -> None:
        """Add rows of a store with the column `true_indices`."""
        self.add(
            seen.latents, seen.column("true_indices"), seen.allowed, seen.x.double().norm(dim=1)
        )

    def result(self) -> Result:
        return Result(self.metrics())

    def metrics_of_dictionary(self) -> dict[str, float]:
        """Return the metrics that need no rows: the matching, and what random directions would reach."""
        return {
            "matched_feature_cosine": float(self.matching.cosine.mean()),
            "matched_feature_cosine_chance": self.chance,
            "features_found": float((self.matching.cosine > SIMILAR).mean()),
            "mcc": self.mcc,
        }

    def _given_norm(self) -> dict[str, float | None]:
        """Return what the norm alone tells of the true count, and what L0 and k tell that it does not."""
        found = {name: spearman(pairs) for name, pairs in self.norm_pairs.items() if pairs}
        true = found.get("true")
        of_norm: dict[str, float | None] = {"spearman_norm_true": true}
        for name, pairs in (("l0", self.l0_pairs), ("k_hat", self.k_pairs)):
            with_true = spearman(pairs) if pairs else None
            with_norm = found.get(name)
            if with_true is not None and with_norm is not None and true is not None:
                of_norm[f"partial_{name}_true"] = partial_of(with_true, with_norm, true)
        return of_norm

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
            **self._given_norm(),
        }
        return {name: value for name, value in metrics.items() if value is not None}
