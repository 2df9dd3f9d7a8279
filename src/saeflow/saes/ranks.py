"""Training one SAE on several processes: what a rank knows of the others.

Every rank works out the same loss. What it is made of is summed over ranks on the way there, and a sum's
gradient passes unchanged to each summand, so that each rank's gradients are its part of the whole: `batch`
gives each rank some rows of every batch, `latents` a slice of the dictionary and all rows. Gradients of
what all ranks hold are then summed over ranks; what all of them compute alike from it (`shared`) counts once.
"""

import os
from collections.abc import Sized
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from saeflow.errors import UserError
from saeflow.operators import SparseLatents, topk_sparse
from saeflow.operators.autograd import applied
from saeflow.operators.feature_choice import Ordered
from saeflow.operators.gpu.lists import Lists
from saeflow.operators.rows import pad

Split = Literal["batch", "latents"]


class Ranks:
    """One rank among some, or a process alone, for which every method gives back what it was given.

    Args:
        split: what is divided among ranks: the rows of a batch, or the latents.
        rank, size: of the group that torch.distributed was set up with.
        device: of its tensors.
    """

    def __init__(
        self, split: Split = "batch", rank: int = 0, size: int = 1, device: str = "cpu"
    ) -> None:
        self.split, self.rank, self.size, self.device = split, rank, size, device

    @staticmethod
    def from_environment(split: Split, device: str) -> "Ranks":
        """The rank that `torchrun` made this process, or the only one."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return Ranks()
        if device.startswith("cuda"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        return Ranks(split, dist.get_rank(), size, device)

    @property
    def of_batch(self) -> int:
        """Ranks that rows are divided among."""
        return self.size if self.split == "batch" else 1

    @property
    def of_latents(self) -> int:
        """Ranks that latents are divided among."""
        return self.size if self.split == "latents" else 1

    # Sums that can be differentiated.

    def over_batch(self, part: Tensor) -> Tensor:
        """The sum over all rows of the batch, of sums over those of each rank."""
        return self._sum(part) if self.of_batch > 1 else part

    def over_latents(self, part: Tensor) -> Tensor:
        """The sum over all latents, of sums over those of each rank."""
        return self._sum(part) if self.of_latents > 1 else part

    def over_both(self, part: Tensor) -> Tensor:
        """The sum over all latents of all rows, of sums over those of each rank."""
        return self._sum(part) if self.size > 1 else part

    def rows(self, of_rank: Sized) -> int:
        """Return the number of rows of the whole batch, given this rank's."""
        return len(of_rank) * self.of_batch

    def batch_mean(self, of_rows: Tensor) -> Tensor:
        """() the mean over all rows of the batch, of one number for each row of this rank."""
        if self.of_batch == 1:
            return of_rows.mean()
        return self.over_batch(of_rows.sum()) / self.rows(of_rows)

    def shared(self, same: Tensor) -> Tensor:
        """Mark a value that every rank computes alike: its gradient, summed over ranks, counts once."""
        return same if self.size == 1 else applied(_Once, same, self.size)

    def of_rows(self, same: Tensor) -> Tensor:
        """Mark a value that every rank with the same rows computes alike from them, as `shared` does."""
        return same if self.of_latents == 1 else applied(_Once, same, self.size)

    def _sum(self, part: Tensor) -> Tensor:
        return applied(_Sum, part)

    # Without gradient.

    def smallest(self, value: Tensor) -> Tensor:
        """The smallest of each rank's value."""
        return self._reduced(value, dist.ReduceOp.MIN) if self.size > 1 else value

    def largest(self, value: Tensor) -> Tensor:
        """The largest of each rank's value."""
        return self._reduced(value, dist.ReduceOp.MAX) if self.size > 1 else value

    def own_rows(self, x: Tensor) -> Tensor:
        """This rank's rows of a batch (B, ...)."""
        return x if self.of_batch == 1 else x.chunk(self.size)[self.rank]

    def all_rows(self, own: Tensor) -> Tensor:
        """(B,) what every rank has for its rows."""
        return own if self.of_batch == 1 else torch.cat(self.gather(own))

    def any_row(self, flags: Tensor) -> Tensor:
        """(n,) bool: true where it is for the rows of any rank."""
        if self.of_batch == 1:
            return flags
        return self._reduced(flags.to(torch.uint8), dist.ReduceOp.MAX).bool()

    def sum_(self, tensors: list[Tensor]) -> None:
        """Put the sum over ranks in the place of each tensor, which lies by rows or by columns."""
        for tensor in tensors:
            dist.all_reduce(tensor if tensor.is_contiguous() else tensor.t())

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Each rank's tensor, all of one shape, in the order of ranks."""
        tensor = tensor.contiguous()
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor)
        return found

    def agree(self, signal_number: int, is_due: bool) -> tuple[int, bool]:
        """The largest of each rank's pair, so that all do the same after a step."""
        if self.size == 1:
            return signal_number, is_due
        either = self.largest(torch.tensor([signal_number, int(is_due)], device=self.device))
        return int(either[0]), bool(either[1])

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()

    def _reduced(self, value: Tensor, operation: Any) -> Tensor:
        value = value.clone()
        dist.all_reduce(value, operation)
        return value

    # Selections that are exact across ranks.

    def largest_of_rows(self, chosen: SparseLatents, k: int | Tensor) -> SparseLatents:
        """Keep, of each row's largest latents on every rank, those among the k largest of the whole row.

        Args:
            chosen: (B, d_sae of this rank) at least the k largest of each row, or all.
            k: one number, or (B,); equal on all ranks.

        Returns:
            The entries that are kept of this rank's; ties go to the lower column of the whole row.
        """
        if self.of_latents == 1:
            return chosen
        width = int(k.max()) if isinstance(k, Tensor) else k
        padded, real = pad(chosen.values.detach(), chosen.offsets.diff(), float("-inf"), width)
        everyone = torch.cat(self.gather(padded), dim=1)
        best = topk_sparse(everyone, k)
        mine = torch.zeros_like(everyone, dtype=torch.bool)
        mine.view(-1)[best.flat] = True
        return chosen.keep(mine[:, self.rank * width : (self.rank + 1) * width][real])

    def largest_of_batch(self, chosen: SparseLatents, total: int) -> SparseLatents:
        """Keep, of the largest entries on every rank, those among the `total` largest of the whole batch.

        Args:
            chosen: at least the `total` largest of this rank's entries, or all.
            total: entries to keep, over all ranks.

        Returns:
            The entries that are kept of this rank's; ties go to the lower rank, then to the lower place.
        """
        if self.size == 1:
            return chosen
        if chosen.lists is not None:
            return SparseLatents.of(self._largest_of_lists(chosen.lists, total))
        padded = chosen.values.new_full((1, total), float("-inf"))
        count = len(chosen.values)
        padded[0, :count] = chosen.values.detach()
        best = topk_sparse(torch.cat(self.gather(padded), dim=1), total)
        mine = torch.zeros(self.size * total, dtype=torch.bool, device=padded.device)
        mine[best.columns] = True
        return chosen.keep(mine[self.rank * total :][:count])

    def largest_of_columns(self, ordered: Ordered, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many of each column's largest entries are this rank's, and where the choice ends.

        Args:
            ordered: of this rank's rows, for these counts.
            counts: (n,) entries to take of each column of the whole batch.

        Returns:
            (n,) int64, of equal entries those of lower ranks first; and (n,) the number halfway between the last entry
            that is taken and the one after it, inf where none is taken.
        """
        if self.of_batch == 1:
            return counts, ordered.border
        depth, n = ordered.columns.shape
        taken = (counts + 1).clamp(max=depth)  # what any rank may add
        places = torch.arange(depth, device=counts.device)[:, None]
        mine = ordered.columns.t()[(places < taken).t()]
        columns = torch.arange(n, device=counts.device).repeat_interleave(taken)
        every = torch.stack(self.gather(mine)).view(-1)
        columns, owners = columns.repeat(self.size), torch.arange(len(every), device=counts.device)
        order = every.argsort(descending=True, stable=True)
        order = order[columns[order].argsort(stable=True)]  # by column, then size, then rank
        begins = self.size * (taken.cumsum(0) - taken)
        columns, owners = columns[order], owners[order] // len(mine)
        is_kept = torch.arange(len(every), device=counts.device) - begins[columns] < counts[columns]
        own = torch.bincount(columns[is_kept & (owners == self.rank)], minlength=n)
        values = torch.cat((every[order], every.new_zeros(1)))
        least = values[begins + (counts - 1).clamp(min=0)].where(counts > 0, torch.inf)
        following = values[begins + counts].where(counts < self.size * taken, 0)
        return own, Ordered(ordered.columns, least, following).border

    def _largest_of_lists(self, lists: Lists, total: int) -> Lists:
        """The same of lists of a fixed size, equal on all ranks; the host waits for nothing."""
        own = lists.values.detach().masked_fill(~lists.real, float("-inf"))
        everyone = torch.stack(self.gather(own))
        threshold = everyone.view(-1).sort(descending=True).values[min(total, everyone.numel()) - 1]
        above, ties = everyone > threshold, everyone == threshold
        ties &= everyone > float("-inf")
        order = ties.view(-1).cumsum(0).view_as(ties)
        best = above | (ties & (order <= total - above.sum()))
        return lists.keep(best[self.rank])


def check_divides(what: str, number: int, ranks: Ranks, split: Split) -> None:
    """Refuse a number that cannot be divided among ranks evenly.

    Raises:
        UserError: it cannot.
    """
    if ranks.split == split and number % ranks.size:
        raise UserError(
            f"{what}: expected a multiple of the {ranks.size} ranks that divide the {split}, found {number}. "
            "Change it, or the number of ranks."
        )


class _Sum(torch.autograd.Function):
    """The sum over ranks; every rank's loss is the same function of it, so the gradient is as well."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        whole = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, same: Tensor, size: int) -> Tensor:
        ctx.size = size
        return same.view_as(same)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.size, None
