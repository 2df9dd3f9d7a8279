"""Everything about an SAE that needs activations only, in one pass over a store."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from saeflow.evaluation.reconstruction import Reconstruction
from saeflow.evaluation.recovery import Recovery
from saeflow.evaluation.rows import RowSelection, RowStatistics, selected_rows
from saeflow.evaluation.sparsity import Histogram, Sparsity
from saeflow.sources.copies import Copies


def column_of(store: Any, rows: np.ndarray, name: str) -> np.ndarray:
    """A column of a store for some rows in ascending order."""
    first, last = int(rows[0]), int(rows[-1]) + 1
    values: np.ndarray = store.column(name, first, last)[rows - first]
    return values


@dataclass(frozen=True)
class Seen:
    """Some evaluated rows and what the SAE made of them."""

    rows: np.ndarray  # (n,) numbers in the store
    x: Tensor  # (n, d_in) on the device
    x_hat: Tensor  # (n, d_in) on the device
    latents: Tensor  # (n, d_sae) on the device
    l0: Tensor  # (n,) on the CPU
    allowed: Tensor | None  # (n,) on the CPU: k, where the variant chooses it
    terms: Mapping[
        str, Tensor
    ]  # (n,) on the CPU: what each row adds to sums, see Reconstruction.add
    column: Callable[[str], np.ndarray]  # a column of the store for these rows


class Observer(Protocol):
    """Takes every evaluated row in, and gives metrics."""

    def add(self, seen: Seen) -> None: ...

    def metrics(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class Measured:
    """Measurements of one SAE or baseline."""

    metrics: dict[str, float]
    histograms: dict[str, Histogram]
    fired: np.ndarray  # (d_sae,) rows on which each latent fired


class _Watch:
    """Shows rows to observers; on a GPU one batch late, so that what they read is copied beside the next one.

    Args:
        observers: take rows in.
        device: where rows are measured.
    """

    def __init__(self, observers: Sequence[Observer], device: str) -> None:
        self.observers, self.copies = observers, Copies(device)
        self.late: tuple[Seen, Callable[[], None]] | None = None

    def add(self, seen: Seen) -> None:
        """Take rows whose numbers are still on the device."""
        if not self.observers:
            return
        terms = {name: self._on_host(values) for name, values in seen.terms.items()}
        allowed = None if seen.allowed is None else self._on_host(seen.allowed)
        copied = replace(seen, terms=terms, allowed=allowed, l0=self._on_host(seen.l0))
        before, self.late = self.late, (copied, self.copies.when_done())
        self._show(before)
        if not self.copies.is_locked:
            self.finish()

    def finish(self) -> None:
        """Show the last rows."""
        last, self.late = self.late, None
        self._show(last)

    def _on_host(self, values: Tensor) -> Tensor:
        if not self.copies.is_locked:
            return values
        out = self.copies.host_memory(tuple(values.shape), values.dtype)
        self.copies.to_host(values, out)
        return out

    def _show(self, late: tuple[Seen, Callable[[], None]] | None) -> None:
        if late is not None:
            seen, wait = late
            wait()
            for observer in self.observers:
                observer.add(seen)


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
    allowed_total, allowed_rows = torch.zeros((), dtype=torch.float64, device=device), 0
    watch = _Watch(observers, device)
    with torch.inference_mode():
        for rows, x in selected_rows(store, selection, batch_size, device):
            latents = sae.encode(x)
            x_hat = sae.decode(latents)
            terms = rebuilt.add(x, x_hat)
            sparsity = sparsity or Sparsity(latents.shape[1], latents.device)
            l0 = sparsity.add(latents)
            allowed = sae.allowed_k(x)
            if allowed is not None:
                allowed_total += allowed.double().sum()
                allowed_rows += len(x)

            column = partial(column_of, store, rows)
            if recovery is not None:
                recovery.add(latents, column("true_indices"), allowed)
            watch.add(Seen(rows, x, x_hat, latents, l0, allowed, terms, column))
        watch.finish()
    metrics = rebuilt.metrics()
    assert sparsity is not None  # rebuilt.metrics refuses an empty selection
    metrics |= sparsity.metrics()
    if allowed_rows:
        metrics["k_hat_mean"] = float(allowed_total) / allowed_rows
    if recovery is not None:
        metrics |= recovery.metrics()
    for observer in observers:
        metrics |= observer.metrics()
    return Measured(metrics, sparsity.histograms(), sparsity.fired.cpu().numpy())
