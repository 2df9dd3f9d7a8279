"""One training pass of an SAE over a batch: the quantities that losses and statistics are computed from."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from saeflow.batch import Batch
from saeflow.operators import SparseLatents
from saeflow.operators.gpu import dense, record


class Errors(NamedTuple):
    """Errors of a reconstruction, where one pass over the latents found them with their gradients."""

    squares: Tensor
    """(B,) |target - x_hat|^2, with gradient; where a variant has groups, of all prefixes."""
    error: Tensor
    """(B, d_out) x_hat - target, without gradient."""
    of_constant: Tensor | None = None
    """(B,) the squares of the reconstruction by `Contract.decoded_beside`, with gradient, where a variant has one."""


@dataclass
class Forward:
    """One training pass over a batch.

    Attributes:
        batch: inputs (B, d_in) and targets (B, d_out), scaled.
        condition: (B,) what the variant decides from each input, see `Contract.condition`.
        pre_acts: (B, d_sae); without gradient on the sparse path.
        selected: (B, d_sae) pre-activations with gradient: the selected ones, on the dense path all.
        latents: (B, d_sae).
        rebuilt: x_hat (B, d_out), or a function that computes it if it is wanted.
        parts: (B, G, d_out) what each group of latents adds, where there are some.
        is_rounded: whether `pre_acts` are of a bfloat16 product.
        errors: where one pass gave them; then losses need no x_hat.
        beside: what one pass found with dense latents, see `Contract.activate_at_once`.
        has_fired: (d_sae,) bool, see `fired`, where it is known already.
        dead: () number of dead latents where AuxK had no room for all, else 0; None without AuxK on a GPU.
    """

    batch: Batch
    condition: Tensor | None
    pre_acts: Tensor
    selected: Tensor | SparseLatents
    latents: Tensor | SparseLatents
    rebuilt: Tensor | Callable[[], Tensor]
    parts: Tensor | None = None
    is_rounded: bool = False
    errors: Errors | None = None
    beside: tuple[Tensor, ...] = ()
    has_fired: Tensor | None = None
    dead: Tensor | None = None

    @property
    def x(self) -> Tensor:
        """Return the inputs (B, d_in)."""
        return self.batch.x

    @property
    def target(self) -> Tensor:
        """Return what x_hat is to be (B, d_out)."""
        return self.batch.target

    @cached_property
    def x_hat(self) -> Tensor:
        """Return the reconstruction (B, d_out), with gradient."""
        return self.rebuilt if isinstance(self.rebuilt, Tensor) else self.rebuilt()

    @property
    def squared_errors(self) -> Tensor:
        """Return |target - x_hat|^2 (B,), with gradient."""
        if self.errors is not None:
            return self.errors.squares
        return (self.target - self.x_hat).square().sum(1)

    @property
    def residual(self) -> Tensor:
        """Return target - x_hat (B, d_out), without gradient."""
        if self.errors is not None:
            return -self.errors.error
        return (self.target - self.x_hat).detach()

    @property
    def is_sparse(self) -> bool:
        return isinstance(self.latents, SparseLatents)

    @property
    def values(self) -> Tensor:
        """Every latent that is stored: (count,) on the sparse path, (B, d_sae) on the dense one."""
        return self.latents.values if isinstance(self.latents, SparseLatents) else self.latents

    def forget_scores(self, *, with_latents: bool = False) -> None:
        """Free what is as large as the scores and is not needed once the loss is known, but for its gradient.

        Args:
            with_latents: dense latents too, once they are counted.
        """
        nothing = self.pre_acts.new_empty(0)
        self.pre_acts, self.beside = nothing, ()
        if isinstance(self.selected, Tensor):
            self.selected = nothing
        if with_latents and isinstance(self.latents, Tensor):
            self.counts  # noqa: B018  # kept
            self.latents = nothing
            if not isinstance(self.rebuilt, Tensor):  # which would hold them
                self.rebuilt = nothing

    def forget_graph(self) -> None:
        """Let go of what gradients were computed by: a step that is recorded must not meet an earlier one's."""
        self.condition = None if self.condition is None else self.condition.detach()
        self.selected, self.latents = self.selected.detach(), self.latents.detach()
        is_there = isinstance(self.rebuilt, Tensor) or "x_hat" in self.__dict__
        self.rebuilt = self.x_hat.detach() if is_there else self.pre_acts.new_empty(0)
        self.__dict__.pop("x_hat", None)
        self.parts, self.beside = None, ()
        if self.errors is not None:
            squares, error, of_constant = self.errors
            of_constant = None if of_constant is None else of_constant.detach()
            self.errors = Errors(squares.detach(), error, of_constant)

    @cached_property
    def counts(self) -> tuple[Tensor, Tensor]:
        """Return (B,) number of non-zero latents of a dense pass, and (d_sae,) bool: those that are not zero somewhere."""
        assert isinstance(self.latents, Tensor)
        return dense.count(self.latents)

    def l0(self) -> Tensor:
        """(B,) number of non-zero latents."""
        return self.latents.l0() if isinstance(self.latents, SparseLatents) else self.counts[0]

    def count_active(self, out: Tensor) -> None:
        """Write how many latents of all rows are not zero, () int64."""
        if isinstance(self.latents, SparseLatents) and self.latents.lists is not None:
            record.count_active(self.latents.lists, out)
        else:
            torch.sum(self.l0(), 0, out=out)

    def lacking(self) -> Tensor:
        """Return (2,) int64: rows that lost latents for want of room, and dead latents where there was none for all."""
        if isinstance(self.latents, SparseLatents) and self.latents.lists is not None:
            return record.lacking(self.latents.lists, self.dead)
        lacking = torch.zeros(2, dtype=torch.int64, device=self.x.device)
        if self.dead is not None:
            lacking[1].copy_(self.dead)
        return lacking

    def fired(self) -> Tensor:
        """(d_sae,) bool: latents that are not zero somewhere in the batch."""
        if self.has_fired is not None:
            return self.has_fired
        return self.latents.fired() if isinstance(self.latents, SparseLatents) else self.counts[1]
