"""Rows that a step trains on: what the encoder reads, and what the decoder has to reconstruct."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs and targets of some rows.

    Attributes:
        x: (B, d_in) read by the encoder.
        target: (B, d_out) compared with the reconstruction. An SAE reconstructs its input: then it is the same
            tensor as `x`, of which nothing is computed, copied or kept twice. A transcoder has another.
    """

    x: Tensor
    target: Tensor

    @staticmethod
    def of(rows: "Batch | Tensor") -> "Batch":
        """Return a batch as it is, and a tensor as rows that are their own targets."""
        return rows if isinstance(rows, Batch) else Batch(rows, rows)

    @property
    def has_own_target(self) -> bool:
        return self.target is not self.x

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that the batch holds: one, or two where targets are not the inputs."""
        return (self.x, self.target) if self.has_own_target else (self.x,)

    def map(self, of_x: Change, of_target: Change | None = None) -> "Batch":
        """Return the batch with inputs and targets changed; one tensor stays one.

        Args:
            of_x: change of the inputs.
            of_target: change of targets that are not the inputs; None: the same.
        """
        x = of_x(self.x)
        return Batch(x, (of_target or of_x)(self.target) if self.has_own_target else x)

    def is_finite(self) -> bool:
        """Return whether all numbers are; waits for the device."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in self.tensors())
