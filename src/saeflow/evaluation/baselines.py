"""Baselines that any SAE must beat, with an SAE's interface: `encode`, `decode`, `forward`, `allowed_k`.

(The random frozen decoder is a trained SAE: an entry of `saes` with `train_decoder: false`.)
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from saeflow.errors import UserError

logger = logging.getLogger(__name__)


class Baseline(nn.Module):
    """A reconstruction without training: subclasses say `encode` and `decode`.

    Attributes:
        variant: its name in the tables.
        width: number of its coefficients (the tables' d_sae and k).
    """

    variant: str
    width: int

    def encode(self, x: Tensor) -> Tensor:
        """(n, d_in) activations to (n, width) coefficients."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """(n, width) coefficients to (n, d_in) reconstruction."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def allowed_k(self, x: Tensor) -> Tensor | None:
        return None


class Identity(Baseline):
    """x_hat = x: what the pipeline itself costs (nothing)."""

    variant = "identity"

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.width = d_in

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class Mean(Baseline):
    """x_hat = the mean row of the training split, whatever x is."""

    variant = "mean"
    width = 0
    mean: Tensor

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())

    def encode(self, x: Tensor) -> Tensor:
        return x.new_empty(len(x), 0)

    def decode(self, latents: Tensor) -> Tensor:
        return self.mean.expand(len(latents), -1)


class PCA(Baseline):
    """Projection on the first principal directions: the best linear code of `rank` numbers a row.

    Args:
        mean: (d_in,) mean of the training split.
        components: (rank, d_in) orthonormal rows.
    """

    variant = "pca"
    mean: Tensor
    components: Tensor

    def __init__(self, mean: Tensor, components: Tensor) -> None:
        super().__init__()
        self.width = len(components)
        self.register_buffer("mean", mean.float())
        self.register_buffer("components", components.float())

    def encode(self, x: Tensor) -> Tensor:
        return (x - self.mean) @ self.components.T

    def decode(self, latents: Tensor) -> Tensor:
        return latents @ self.components + self.mean


def principal_components(store: Any, batch_size: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Principal directions of all rows of a store, from its streamed covariance in float64.

    Args:
        store: open store; one batch of `batch_size` rows is in memory at a time.

    Returns:
        mean (d_in,), directions (d_in, d_in) as rows with the largest variance first, and the
        variances (d_in,) (sum over rows / rows); all float64 on the CPU.

    Raises:
        UserError: a row is not finite.
    """
    shift = store.mean.to(device)
    total = torch.zeros_like(shift)
    products = torch.zeros(len(shift), len(shift), dtype=torch.float64, device=device)
    rows = 0
    for _, batch in store.in_order(batch_size):
        x = batch.to(device=device, dtype=torch.float64) - shift
        total += x.sum(0)
        products += x.T @ x
        rows += len(x)
    if not bool(products.isfinite().all()):
        raise UserError(f"{store.path}: rows are not finite. Extract the store again.")
    offset = total / rows
    covariance = products / rows - torch.outer(offset, offset)
    variances, columns = torch.linalg.eigh(covariance)
    order = torch.arange(len(shift) - 1, -1, -1, device=device)
    return (shift + offset).cpu(), columns.T[order].cpu(), variances[order].clamp(min=0).cpu()


def baselines(store: Any, ranks: list[int], batch_size: int, device: str) -> list[Baseline]:
    """Identity, mean and a PCA per rank, of one training store.

    A rank that is not below the store's width is left out (it would be the identity), and PCA of a store
    whose rows are gone; the log says so.
    """
    found: list[Baseline] = [Identity(store.d_in), Mean(store.mean)]
    fitting = sorted({rank for rank in ranks if rank < store.d_in})
    if fitting and not store.has_rows:
        logger.warning(
            "%s: PCA is left out: its windows were deleted after training (stores.NAME.keep_windows)",
            store.path,
        )
        return found
    if left_out := sorted(set(ranks) - set(fitting)):
        logger.info("%s: PCA ranks %s left out, its width is %d", store.path, left_out, store.d_in)
    if fitting:
        mean, directions, _ = principal_components(store, batch_size, device)
        found += [PCA(mean, directions[:rank]) for rank in fitting]
    return found
