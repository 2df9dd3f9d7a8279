"""Everything about an SAE that needs activations only, in one pass over a store."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saeflow.evaluation.reconstruction import Reconstruction
from saeflow.evaluation.recovery import Recovery
from saeflow.evaluation.rows import RowSelection, RowStatistics, selected_rows
from saeflow.evaluation.sparsity import Histogram, Sparsity


@dataclass(frozen=True)
class Measured:
    """What was measured of one SAE or baseline."""

    metrics: dict[str, float]
    histograms: dict[str, Histogram]


def measure_rows(
    sae: Any,
    store: Any,
    selection: RowSelection,
    statistics: RowStatistics,
    batch_size: int,
    device: str,
    features: Tensor | None = None,
) -> Measured:
    """Everything that needs activations only, in one pass over a store.

    Args:
        sae: `encode`, `decode` and `allowed_k` on `device`; takes and returns raw activations.
        store: the evaluation split.
        selection: which rows count.
        statistics: of these rows.
        batch_size: rows per step; does not change a result beyond rounding.
        device: where the SAE is.
        features: (n_features, d_in) true dictionary, for an SAE with `directions` on a store
            with a column `true_indices`; None leaves recovery out.
    """
    rebuilt = Reconstruction(statistics.mean)
    recovery = None if features is None else Recovery(features, sae.directions())
    sparsity: Sparsity | None = None
    allowed_total, allowed_rows = 0.0, 0
    with torch.inference_mode():
        for rows, x in selected_rows(store, selection, batch_size, device):
            latents = sae.encode(x)
            rebuilt.add(x, sae.decode(latents))
            sparsity = sparsity or Sparsity(latents.shape[1], latents.device)
            sparsity.add(latents)
            allowed = sae.allowed_k(x)
            if allowed is not None:
                allowed_total += float(allowed.double().sum())
                allowed_rows += len(x)
            if recovery is not None:
                first, last = int(rows[0]), int(rows[-1]) + 1
                truth = store.column("true_indices", first, last)[rows - first]
                recovery.add(latents, truth, allowed)
    metrics = rebuilt.metrics()
    assert sparsity is not None  # rebuilt.metrics refuses an empty selection
    metrics |= sparsity.metrics()
    if allowed_rows:
        metrics["k_hat_mean"] = allowed_total / allowed_rows
    if recovery is not None:
        metrics |= recovery.metrics()
    return Measured(metrics, sparsity.histograms())
