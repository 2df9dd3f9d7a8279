"""Notes of a step on the device: its faults, the latents that fired, the tokens since they did, the least latent."""

import torch
from torch import Tensor

from saeflow.operators import gpu
from saeflow.operators.gpu.lists import OVERFLOW, Lists
from saeflow.operators.gpu.sparse import column_totals

WIDE = 1024
COLUMNS = 128  # that a program reads entries of
PIECE = 4096  # entries that a program looks for the least of, or counts


@torch.no_grad()
def keep_first(
    values: Tensor, now: Tensor, kept: Tensor, step: Tensor, before: Tensor | None = None
) -> Tensor:
    """Keep the values and the number of the first step with a fault, and tell whether there was one by now.

    Args:
        values: (n,); a fault is a value that is not finite in float32, and one that is not 0 in int64.
        now: () int64, the step's number.
        kept: (n,), written if this is the first step with a fault.
        step: () int64, the number of that step, below 0 until there is one; written.
        before: () bool; true of a step that is not taken for another reason and is not looked at.

    Returns:
        () bool: there was a fault by now, or `before`.
    """
    if not (gpu.runs_triton(values) and len(values)):
        is_finite = values.dtype.is_floating_point
        has_fault = ~values.isfinite().all() if is_finite else values.any()
        was_stopped = step >= 0 if before is None else (step >= 0) | before
        is_first = has_fault & ~was_stopped
        kept.copy_(torch.where(is_first, values, kept))
        step.copy_(torch.where(is_first, now, step))
        return has_fault | was_stopped
    is_stopped = torch.empty((), dtype=torch.bool, device=values.device)
    tensors = (values, now, kept, step, is_stopped if before is None else before)
    gpu.load("record").keep_first[(1,)](
        *(_as_bytes(tensor) for tensor in (*tensors, is_stopped)), len(values),
        OF_FINITE=values.dtype.is_floating_point, HAS_BEFORE=before is not None,
        WIDE=gpu.block_for(len(values)), num_warps=1,
    )  # fmt: skip
    return is_stopped


def lacking(lists: Lists, number: Tensor | None = None) -> Tensor:
    """Return how many rows of lists have more entries than room, and a number () int64 beside it, 0 unless given: (2,) int64."""
    if not gpu.runs_triton(lists.status):
        rows = (lists.status & OVERFLOW != 0).sum()
        return torch.stack((rows, torch.zeros_like(rows) if number is None else number))
    out = torch.empty(2, dtype=torch.int64, device=lists.status.device)
    gpu.load("record").count_flagged[(1,)](
        lists.status, out if number is None else number, out, len(lists.status),
        FLAG=OVERFLOW, HAS_NUMBER=number is not None, WIDE=WIDE, num_warps=4,
    )  # fmt: skip
    return out


def fired(lists: Lists) -> Tensor:
    """Return which columns (M,) bool of lists have an entry that is not 0."""
    values = lists.values.detach()
    if not (gpu.runs_triton(values) and values.numel()):
        return column_totals(lists, (values != 0).float()) > 0
    out = torch.empty(lists.d_sae, dtype=torch.bool, device=values.device)
    gpu.load("record").fired_columns[(-(-lists.d_sae // COLUMNS),)](
        values.contiguous(), *lists.transposed, out.view(torch.uint8), lists.d_sae, WIDE=COLUMNS, num_warps=4
    )  # fmt: skip
    return out


@torch.no_grad()
def count_active(lists: Lists, out: Tensor) -> None:
    """Write how many entries of lists are not 0 to a tensor () int64."""
    values, n = lists.values.detach(), lists.values.numel()
    if not (gpu.runs_triton(values, out) and n):
        out.copy_(values.count_nonzero())
        return
    gpu.load("record").active_pieces[(-(-n // PIECE),)](
        values.contiguous(), out.zero_(), n, WIDE=PIECE, num_warps=8
    )


@torch.no_grad()
def count_silent(silent: Tensor, has_fired: Tensor, rows: int, limit: int) -> Tensor:
    """Add a step's rows to what latents (M,) int64 have been silent for, or begin anew where one (M,) bool fired.

    Returns:
        (M,) bool: silent for at least the limit.
    """
    if not (gpu.runs_triton(silent) and len(silent)):
        silent.add_(rows)
        silent.masked_fill_(has_fired, 0)
        return silent >= limit
    out = torch.empty_like(has_fired)
    gpu.load("record").count_silent[(-(-len(silent) // WIDE),)](
        silent, *map(_as_bytes, (has_fired, out)), rows, limit, len(silent), WIDE=WIDE, num_warps=4
    )
    return out


@torch.no_grad()
def least_positive(values: Tensor) -> Tensor:
    """Return the least number () above 0 of any; inf where there is none."""
    values, n = values.detach(), values.numel()
    if not (gpu.runs_triton(values) and n):
        return torch.where(values > 0, values, torch.inf).amin()
    programs = -(-n // PIECE)
    least = torch.empty(programs, device=values.device)
    gpu.load("record").least_of_pieces[(programs,)](
        values.contiguous(), least, n, WIDE=PIECE, num_warps=8
    )
    return least.amin()


@torch.no_grad()
def follow(
    threshold: Tensor, weight: Tensor, least: Tensor, decay: float, *, is_unbiased: bool
) -> None:
    """Move a running mean towards a number, where it is finite.

    Args:
        threshold: () float32, the mean; written.
        weight: () float32, the sum of the weights of what it is of, 0 before the first; written.
        least: () float32 the number.
        decay: of the weights.
        is_unbiased: weigh the first numbers alike while they are few; else the first is taken whole and has all weight.
    """
    if gpu.runs_triton(threshold):
        tensors = (least, threshold, weight)
        gpu.load("record").follow_least[(1,)](
            *tensors, decay, 1 - decay, IS_UNBIASED=is_unbiased, num_warps=1
        )
        return
    is_some = least.isfinite()
    of_first = torch.where(weight > 0, 1.0, 1 - decay)
    has = decay * weight + (1 - decay) if is_unbiased else of_first
    step = (1 - decay) / has
    threshold.add_(torch.where(is_some, step * (least - threshold), 0))
    weight.copy_(torch.where(is_some, has, weight))


def _as_bytes(tensor: Tensor) -> Tensor:
    """Return a tensor as kernels read it: a bool as the byte that it is."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
