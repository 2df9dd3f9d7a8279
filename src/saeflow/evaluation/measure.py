"""Measurements of an SAE that need activations only, in one pass over a store."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from saeflow.evaluation.reconstruction import Reconstruction
from saeflow.evaluation.rows import EvaluatedRows
from saeflow.evaluation.sparsity import Histogram, Sparsity
from saeflow.sources.copies import Copies


@dataclass(frozen=True)
class Seen:
    """Some evaluated rows and what the SAE made of them.

    Attributes:
        rows: (n,) numbers in the store.
        x: (n, d_in) on the device.
        x_hat: (n, d_in) on the device.
        latents: (n, d_sae) on the device.
        l0: (n,) on the CPU.
        allowed: (n,) on the CPU: k, where the variant chooses it.
        terms: (n,) each on the CPU: what each row adds to sums, see `Reconstruction.add`.
        column: a column of the store for these rows.
    """

    rows: np.ndarray
    x: Tensor
    x_hat: Tensor
    latents: Tensor
    l0: Tensor
    allowed: Tensor | None
    terms: Mapping[str, Tensor]
    column: Callable[[str], np.ndarray]


Lines = list[dict[str, Any]]
"""Lines of a table."""


@dataclass(frozen=True)
class Result:
    """Metrics and lines of tables, by name."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    tables: Mapping[str, Lines] = field(default_factory=dict)


class Observer(Protocol):
    """One measure: takes every evaluated row in during the pass, and gives its result after it."""

    def update(self, seen: Seen) -> None: ...

    def result(self) -> Result: ...


@dataclass(frozen=True)
class Measured:
    """Measurements of one SAE or baseline, from one pass over the rows.

    Attributes:
        metrics: in the order of the observers.
        tables: lines by table.
        histograms: by name.
        fired: (d_sae,) rows on which each latent fired.
    """

    metrics: dict[str, float]
    tables: dict[str, Lines]
    histograms: dict[str, Histogram]
    fired: np.ndarray


class _Watch:
    """Show rows to observers; on a GPU one batch late, so that what they read is copied beside the next one.

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
                observer.update(seen)


def measure_rows(sae: Any, rows: EvaluatedRows, observers: Sequence[Observer] = ()) -> Measured:
    """Measure reconstruction and sparsity, and whatever observers measure, in one pass over a store.

    Args:
        sae: `encode`, `decode` and `allowed_k` on the device of the rows; takes and returns raw activations.
        rows: of the evaluation split.
        observers: see every row too.
    """
    rebuilt = Reconstruction(rows.statistics.mean)
    sparsity: Sparsity | None = None
    allowed_total = torch.zeros((), dtype=torch.float64, device=rows.device)
    allowed_rows = 0
    watch = _Watch(observers, rows.device)
    with torch.inference_mode():
        for batch in rows:
            x = batch.x
            latents = sae.encode(x)
            x_hat = sae.decode(latents)
            terms = rebuilt.add(x, x_hat)
            sparsity = sparsity or Sparsity(latents.shape[1], latents.device)
            l0 = sparsity.add(latents)
            allowed = sae.allowed_k(x)
            if allowed is not None:
                allowed_total += allowed.double().sum()
                allowed_rows += len(x)
            watch.add(Seen(batch.numbers, x, x_hat, latents, l0, allowed, terms, batch.column))
        watch.finish()
    metrics = rebuilt.metrics()
    assert sparsity is not None  # rebuilt.metrics refuses an empty selection
    metrics |= sparsity.metrics()
    if allowed_rows:
        metrics["k_hat_mean"] = float(allowed_total) / allowed_rows
    tables: dict[str, Lines] = {}
    for observer in observers:
        found = observer.result()
        metrics |= found.metrics
        tables |= found.tables
    return Measured(metrics, tables, sparsity.histograms(), sparsity.fired.cpu().numpy())
