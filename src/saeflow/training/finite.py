"""Steps whose loss or gradient is not finite: found on the device, named when the host asks."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from saeflow.batch import Batch
from saeflow.operators.gpu.record import keep_first


class NotFinite(NamedTuple):
    """The first step that could not be taken."""

    step: int
    terms: str  # of the loss, and the gradient's norm, with their values
    is_of_batch: bool  # whether its batch already was not finite


class Watch:
    """Device-side record of the first such step; looking at a step does not wait for it.

    Args:
        device: of the tensors that are looked at.
    """

    def __init__(self, device: torch.device) -> None:
        self.step = torch.full((), -1, dtype=torch.int64, device=device)
        self.now = torch.zeros((), dtype=torch.int64, device=device)
        self.names: list[str] = []
        self.values = torch.zeros(0, device=device)

    def begin(self, step: int) -> None:
        """Say which step is looked at next."""
        self.now.fill_(step)

    @torch.no_grad()
    def look(
        self, batch: Batch, terms: Mapping[str, Tensor], ignored: Tensor | None = None
    ) -> Tensor:
        """Return whether this step, or one before it, cannot be taken; true where it is ignored.

        Args:
            batch: of the step.
            terms: () each.
            ignored: () bool, true of a step that is taken again anyway; None: it is not.

        Returns:
            () bool, on the device.
        """
        total = sum((rows.sum() for rows in batch.tensors()[1:]), batch.x.sum())
        values = torch.stack([total, *(term.detach().float() for term in terms.values())])
        if self.names != list(terms):
            self.names, self.values = list(terms), torch.zeros_like(values)
        return keep_first(values, self.now, self.values, self.step, ignored)

    def read(self) -> NotFinite | None:
        """The first step that could not be taken; None where all could. Waits for the device."""
        step = int(self.step)
        if step < 0:
            return None
        batch, *values = self.values.tolist()
        terms = (f"{name} {value:g}" for name, value in zip(self.names, values, strict=True))
        return NotFinite(step, ", ".join(terms), not abs(batch) < float("inf"))
