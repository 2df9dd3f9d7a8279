"""Rows that training takes of a store: shuffled batches, their moments, and targets of their own where they have some."""

from collections.abc import Iterator
from typing import Protocol

from saeflow.batch import Batch
from saeflow.config import SAEConfig
from saeflow.errors import UserError
from saeflow.saes import SAE
from saeflow.saes.input_scale import Moments


class Shuffled(Protocol):
    """Rows in endless shuffled batches."""

    def batches(
        self, batch_size: int, seed: int, start_batch: int = 0, *, pin: bool = False
    ) -> Iterator[Batch]:
        """Endless shuffled batches, from any number on; dropped when done with."""
        ...


class Batches(Shuffled, Moments, Protocol):
    """The interface that the trainer needs of a store; its moments are those of the inputs."""

    model: str | None

    @property
    def targets(self) -> Moments | None:
        """Moments of the targets; None where rows are their own targets."""
        ...

    @property
    def positions(self) -> slice:
        """Positions of each context that give a row."""
        ...

    def last_rows(self) -> Shuffled:
        """Each context's last row alone."""
        ...


def check_targets(sae: SAE, config: SAEConfig, targets: Moments) -> None:
    """Refuse targets other than the inputs that an SAE cannot have.

    Raises:
        UserError: the variant reads inputs by more than `W_enc`, reconstructs another width, or aligns directions of
            the inputs with directions of the targets.
    """
    if sae.aligned:
        raise UserError(
            f"saes.{config.entry}.options.aligned: expected false where targets are not the inputs, since encoder and "
            "decoder directions then lie in different spaces, found true."
        )
    if not sae.takes_own_targets:
        raise UserError(
            f"saes.{config.entry}.variant: expected a variant whose targets may be other than its inputs, found "
            f"{config.variant}. Take another variant, or a store whose rows are their own targets."
        )
    if sae.d_out != targets.d_in:
        raise UserError(
            f"saes.{config.entry}: expected targets of width {sae.d_out}, found {targets.d_in}. Take a variant "
            "that reconstructs that width, or another store."
        )
