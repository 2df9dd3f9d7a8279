"""Sums, means and selections over the whole batch and the whole dictionary, for losses and statistics.

Several processes may train one SAE, each with some rows of the batch or some of the latents (`saes.ranks`). A
variant that writes its losses with these methods is right in either case and does not know of it.
"""

from collections.abc import Sized

from torch import Tensor, nn

from saeflow.operators import SparseLatents, choose_by_column, order_columns
from saeflow.saes.ranks import Ranks


class Totals(nn.Module):
    """The methods by which a variant sums and selects.

    Attributes:
        d_sae: number of latents of this process: all, unless ranks divide them.
    """

    d_sae: int
    ranks = Ranks()  # this process alone

    @property
    def has_all_latents(self) -> bool:
        """Return whether this process has the whole dictionary."""
        return self.ranks.of_latents == 1

    @property
    def whole_d_sae(self) -> int:
        """Return the number of latents of the whole dictionary."""
        return self.d_sae * self.ranks.of_latents

    # With gradient.

    def rows(self, of_batch: Sized) -> int:
        """Return the number of rows of the whole batch, given anything with one entry for each row of this process."""
        return self.ranks.rows(of_batch)

    def sum_over_rows(self, part: Tensor) -> Tensor:
        """Return the sum over all rows, of a sum over those of this process."""
        return self.ranks.over_batch(part)

    def sum_over_latents(self, part: Tensor) -> Tensor:
        """Return the sum over all latents, of a sum over those of this process."""
        return self.ranks.over_latents(part)

    def sum_over_entries(self, part: Tensor) -> Tensor:
        """Return the sum over all rows and all latents, of a sum over those of this process."""
        return self.ranks.over_both(part)

    def mean_over_rows(self, of_rows: Tensor) -> Tensor:
        """Return the mean () over all rows of one number for each row (B,)."""
        return self.ranks.batch_mean(of_rows)

    def counted_once(self, term: Tensor) -> Tensor:
        """Return a term of the loss that is computed from no row of the batch, so that ranks do not add it up."""
        return self.ranks.shared(term)

    # Without gradient.

    def mean_over_latents(self, of_latents: Tensor) -> Tensor:
        """Return the mean () over all latents of one number for each latent (d_sae,)."""
        return self.ranks.over_latents(of_latents.mean()) / self.ranks.of_latents

    def least_of_batch(self, value: Tensor) -> Tensor:
        """Return the smallest value () that any process has."""
        return self.ranks.smallest(value)

    def of_all_rows(self, of_rows: Tensor) -> Tensor:
        """Return what all rows of the batch have, of what those of this process have (B,)."""
        return self.ranks.all_rows(of_rows)

    # Selections.

    def largest_of_rows(self, chosen: SparseLatents, k: int | Tensor) -> SparseLatents:
        """Keep those of each row's entries that are among its k largest in the whole dictionary.

        Args:
            chosen: (B, d_sae) at least the k largest of each row among this process's latents.
            k: one number, or (B,).
        """
        return self.ranks.largest_of_rows(chosen, k)

    def share_of_batch(self, k: Tensor | float) -> Tensor | float:
        """Return the entries that a row of this process may have on average, where a row of the batch has k."""
        return k if self.ranks.of_batch == 1 else k * self.ranks.of_batch

    def largest_of_batch(self, chosen: SparseLatents, k: float) -> SparseLatents:
        """Keep the entries that are among the B k largest of the whole batch of B rows.

        Args:
            chosen: the largest of this process's rows, `share_of_batch(k)` to a row.
        """
        return self.ranks.largest_of_batch(chosen, round(self.ranks.rows(chosen) * k))

    def largest_of_columns(self, values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Choose, for each latent, the rows of the whole batch on which it is largest, of those where it is above 0.

        Args:
            values: (B, d_sae) of this process's rows and latents.
            counts: (d_sae,) int64, rows of the whole batch that each latent takes at most.

        Returns:
            Mask (B, d_sae); and (d_sae,) the number halfway between the least entry that each latent takes and the
            largest that it leaves, inf where it takes none.
        """
        ordered = order_columns(values, counts.clamp(max=len(values)))
        own, border = self.ranks.largest_of_columns(ordered, counts)
        if own is not counts:
            ordered = order_columns(values, own)
        return choose_by_column(values, own, ordered.least), border
