"""Everything about an SAE that needs activations only, in one pass over a store."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from saeflow.evaluation.reconstruction import Reconstruction
from saeflow.evaluation.recovery import Recovery
from saeflow.evaluation.rows import RowSelection, RowStatistics, selected_rows
from saeflow.evaluation.sparsity import Histogram, Sparsity


def column_of(store: Any, rows: np.ndarray, name: str) -> np.ndarray:
    """A column of a store for some rows in ascending order."""
    first, last = int(rows[0]), int(rows[-1]) + 1
    values: np.ndarray = store.column(name, first, last)[rows - first]
    return values


@dataclass(frozen=True)
class Seen:
    """Some evaluated rows and what the SAE made of them."""

    rows: np.ndarray  # (n,) numbers in the store
    x: Tensor  # (n, d_in)
    x_hat: Tensor  # (n, d_in)
    latents: Tensor  # (n, d_sae)
    l0: Tensor  # (n,)
    allowed: Tensor | None  # (n,) k, where the variant chooses it
    terms: Mapping[str, Tensor]  # (n,) what each row adds to sums, see Reconstruction.add
    column: Callable[[str], np.ndarray]  # a column of the store for these rows


class Observer(Protocol):
    """Takes every evaluated row in, and gives metrics."""

    def add(self, seen: Seen) -> None: ...

    def metrics(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class Measured:
    """What was measured of one SAE or baseline."""

    metrics: dict[str, float]
    histograms: dict[str, Histogram]
    fired: np.ndarray  # (d_sae,) rows on which each latent fired


def measure_rows(
    sae: Any,
    store: Any,
    selection: RowSelection,
    statistics: RowStatistics,
    batch_size: int,
    device: str,
    features: Tensor | None = None,
    observers: Sequence[Observer] = (),
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
        observers: see every row too.
    """
    rebuilt = Reconstruction(statistics.mean)
    recovery = None if features is None else Recovery(features, sae.directions())
    sparsity: Sparsity | None = None
    allowed_total, allowed_rows = 0.0, 0
    with torch.inference_mode():
        for rows, x in selected_rows(store, selection, batch_size, device):
            latents = sae.encode(x)
            x_hat = sae.decode(latents)
            terms = rebuilt.add(x, x_hat)
            sparsity = sparsity or Sparsity(latents.shape[1], latents.device)
            l0 = sparsity.add(latents)
            allowed = sae.allowed_k(x)
            if allowed is not None:
                allowed_total += float(allowed.double().sum())
                allowed_rows += len(x)

            column = partial(column_of, store, rows)
            if recovery is not None:
                recovery.add(latents, column("true_indices"), allowed)
            for observer in observers:
                observer.add(Seen(rows, x, x_hat, latents, l0, allowed, terms, column))
    metrics = rebuilt.metrics()
    assert sparsity is not None  # rebuilt.metrics refuses an empty selection
    metrics |= sparsity.metrics()
    if allowed_rows:
        metrics["k_hat_mean"] = allowed_total / allowed_rows
    if recovery is not None:
        metrics |= recovery.metrics()
    for observer in observers:
        metrics |= observer.metrics()
    return Measured(metrics, sparsity.histograms(), sparsity.fired.cpu().numpy())
