"""Stability over seeds: agreement of dictionaries and of the number of latents of each row."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeflow.evaluation.correlation import correlation
from saeflow.evaluation.recovery import cosines, match
from saeflow.evaluation.rows import EvaluatedRows
from saeflow.evaluation.setup import Setup
from saeflow.tables.evaluations import write_of_seeds

MOST_MATCHED = 4096
"""Latents that Hungarian matching takes: 128 MiB of cosines, and time that grows with the cube."""
_AT_ONCE = 1024


class PerSeed:
    """One SAE's L0 and k of every evaluated row: 4 bytes a row for each.

    Args:
        d_sae: number of latents.
        rows: at most so many. Their numbers have their place from the start: small arrays kept between the
            large ones of every batch would hold memory that those leave.
    """

    def __init__(self, d_sae: int, rows: int) -> None:
        self.fired = np.zeros(d_sae, bool)
        self.rows = 0
        self._l0 = np.empty(rows, np.int32)
        self._k_hat: np.ndarray | None = None

    def add(self, latents: Tensor, allowed: Tensor | None) -> None:
        """Add rows: latents (n, d_sae), and the k allowed (n,) where the variant chooses it."""
        active = latents != 0
        self.fired |= active.any(0).cpu().numpy()
        held = slice(self.rows, self.rows + len(latents))
        self._l0[held] = active.sum(1).cpu().numpy()
        if allowed is not None:
            if self._k_hat is None:
                self._k_hat = np.empty(len(self._l0), np.float32)
            self._k_hat[held] = allowed.float().cpu().numpy()
        self.rows = held.stop

    @property
    def l0(self) -> np.ndarray:
        return self._l0[: self.rows]

    @property
    def k_hat(self) -> np.ndarray | None:
        return None if self._k_hat is None else self._k_hat[: self.rows]


def compare_dictionaries(
    a: Tensor, b: Tensor, fired: Sequence[np.ndarray], most_matched: int = MOST_MATCHED
) -> dict[str, float]:
    """Return the metrics between two seeds that need directions.

    Args:
        a, b: (d_sae, d_in) directions of two seeds.
        fired: (d_sae,) bool of each, whether a latent fires on an evaluated row.
        most_matched: latents up to which they are matched one to one.
    """
    nearest_b, of_a, of_b = _nearest(a, b)
    metrics = {"max_cosine_ab": float(of_a.mean()), "max_cosine_ba": float(of_b[0].mean())}
    if len(a) > most_matched:
        mutual = of_b[1][nearest_b] == np.arange(len(a))
        metrics["mutual_share"] = float(mutual.mean())
        metrics["mutual_max_cosine"] = float(of_a[mutual].mean())
        return metrics
    similarity = cosines(a, b)
    metrics["matched_cosine"] = float(match(similarity).cosine.mean())
    alive = similarity[np.ix_(*fired)]
    if alive.size:
        metrics["matched_cosine_alive"] = float(match(alive).cosine.sum() / min(alive.shape))
    return metrics


def _nearest(a: Tensor, b: Tensor) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Each a's nearest b and their cosine; the cosine and number of each b's nearest a. In blocks of a."""
    places, highest = [], []
    best, best_at = np.full(len(b), -np.inf), np.zeros(len(b), np.int64)
    for start in range(0, len(a), _AT_ONCE):
        block = cosines(a[start : start + _AT_ONCE], b)
        places.append(block.argmax(1))
        highest.append(block.max(1))
        top = block.argmax(0)
        value = block[top, np.arange(len(b))]
        better = value > best
        best[better], best_at[better] = value[better], start + top[better]
    return np.concatenate(places), np.concatenate(highest), (best, best_at)


def compare_seeds(saes: Mapping[int, Any], rows: EvaluatedRows) -> list[dict[str, Any]]:
    """Every pair of seeds of one setting, in one pass over a store.

    Args:
        saes: by seed, on the device of the rows, in evaluation mode.
        rows: of the evaluation split.

    Returns:
        Lines of seed_a, seed_b, metric and value.
    """
    seen = {seed: PerSeed(sae.d_sae, rows.store.rows) for seed, sae in saes.items()}
    with torch.inference_mode():
        for batch in rows:
            for seed, sae in saes.items():
                seen[seed].add(sae.encode(batch.x), sae.allowed_k(batch.x))
    lines = []
    for first, second in itertools.combinations(sorted(saes), 2):
        a, b = seen[first], seen[second]
        directions = [saes[seed].directions().detach() for seed in (first, second)]
        metrics: dict[str, float | None] = dict(
            compare_dictionaries(directions[0], directions[1], (a.fired, b.fired))
        )
        metrics["spearman_l0"] = correlation(a.l0, b.l0)
        if a.k_hat is not None and b.k_hat is not None:
            metrics["spearman_k_hat"] = correlation(a.k_hat, b.k_hat)
        lines += [
            {"seed_a": first, "seed_b": second, "metric": name, "value": value}
            for name, value in metrics.items()
            if value is not None
        ]
    return lines


def write_stability(
    saes: Mapping[int, Any], config: Mapping[str, Any], setup: Setup, folder: Path
) -> None:
    """Compare the seeds of one setting and write stability.csv.

    Args:
        saes: by seed, as `saeflow.load` returns them.
        config: config.json of one of them.
        setup: of the store they were trained on.
    """
    moved = {seed: sae.to(setup.device).eval() for seed, sae in saes.items()}
    write_of_seeds(folder, config, compare_seeds(moved, setup.rows))
