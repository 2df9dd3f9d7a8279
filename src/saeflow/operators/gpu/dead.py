"""AuxK's pieces on a GPU: dead columns, the largest of each row, their gradients, and the share of the error they leave.

Latents have the precision of the scores they are chosen from, as in dense steps; sums and errors are in float32.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saeflow.operators import gpu
from saeflow.operators.autograd import applied
from saeflow.operators.gpu.dense import COLUMNS, ROWS, TALL
from saeflow.operators.gpu.selection import places_of

MOST_DEAD = 16384  # columns of a row that a program holds
WIDE = 4096  # columns that are looked at together


def columns_of(dead: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the columns of dead latents, for which the host does not wait.

    Args:
        dead: (d_sae,) bool.
        count: 1 to d_sae.

    Returns:
        (count,) int64, the first dead ones, ascending, then live ones if there are fewer, none twice; () int64, how many are
        dead; () int64, the same where these are more than `count`, else 0.
    """
    if not gpu.runs_triton(dead):
        number = dead.sum()
        columns = (~dead).to(torch.uint8).sort(stable=True).indices[:count]
        return columns, number, number.where(number > count, 0)
    columns = torch.empty(count, dtype=torch.int64, device=dead.device)
    numbers, wide = columns.new_empty(2), min(WIDE, gpu.block_for(len(dead)))
    gpu.load("dead").dead_columns[(1,)](
        dead.view(torch.uint8), columns, numbers, count, len(dead), WIDE=wide, num_warps=8
    )
    return columns, numbers[0], numbers[1]


def largest(
    scores: Tensor, columns: Tensor, number: Tensor, k: int, *, is_signed: bool = False
) -> Tensor:
    """Return the k largest positive scores of each row in some columns, of equal ones the first; 0 for the others.

    Args:
        scores: (B, d_sae).
        columns: (n,) int64, of `columns_of`; at most MOST_DEAD.
        number: () int64, how many of the columns count.
        k: at least 1.
        is_signed: choose by size; negative ones are kept as they are.

    Returns:
        (B, n) in the dtype of the scores, without gradient.
    """
    scores, n = scores.detach().contiguous(), len(columns)
    if not gpu.serves_scores(scores):
        found = scores.index_select(1, columns)
        sizes = found.abs() if is_signed else found
        is_there = (sizes > 0) & (torch.arange(n, device=scores.device) < number)
        order = sizes.where(is_there, -1).sort(dim=1, descending=True, stable=True).indices
        kept = torch.zeros_like(is_there).scatter(1, order[:, :k], True)
        return found.where(kept & is_there, 0)
    out, wide = scores.new_empty(len(scores), n), gpu.block_for(n)
    gpu.load("dead").dead_rows[(len(scores),)](
        scores, columns, number, out, k, n, scores.shape[1],
        PLACES=places_of(scores), IS_SIGNED=is_signed, WIDE=wide, num_warps=max(1, min(32, wide // 512)),
    )  # fmt: skip
    return out


def where_active(grad: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Return a gradient (B, n) where latents (B, n) are not 0, else 0, and the sums (n,) of each column, float32."""
    if not gpu.serves_scores(grad):
        out = grad.where(active != 0, 0)
        return out, out.sum(0, dtype=torch.promote_types(out.dtype, torch.float32))
    out, (n_rows, n) = torch.empty_like(active), active.shape
    parts = torch.empty(-(-n_rows // TALL), n, device=grad.device)
    sizes = {"ROWS": ROWS, "TALL": TALL, "WIDE": COLUMNS}
    gpu.load("dead").dead_gradient_columns[(-(-n // COLUMNS), len(parts))](
        grad.contiguous(), active, out, parts, n, n_rows, **sizes, num_warps=8
    )
    return out, parts.sum(0)


def add_rows(matrix: Tensor, columns: Tensor, part: Tensor) -> None:
    """Add part (n, ...) of any precision to the rows of a matrix (m, ...) that columns (n,) name, none twice."""
    if not gpu.serves(matrix):
        matrix.index_add_(0, columns, part.to(matrix.dtype))
        return
    width = matrix[0].numel()
    gpu.load("dead").add_rows[(len(columns),)](
        matrix, columns, part.contiguous(), width, **gpu.of_rows(width)
    )


def share(
    error: Tensor, e_hat: Tensor, number: Tensor, total: Callable[[Tensor], Tensor], rows: int
) -> Tensor:
    """Return the share of an error's spread that is left once e_hat is added to it.

    It is there where Triton is; `operators.residual_share` of minus the error is its reference.

    Args:
        error: (B, d) float32, x_hat - x; a constant.
        e_hat: (B, d).
        number: () int64; the share is 0 where it is.
        total: the sum over a whole batch from that over these rows.
        rows: of the whole batch.

    Returns:
        () sum |error + e_hat|^2 / sum |error - mean|^2, differentiable in e_hat, 0 where undefined.
    """
    error = error.detach().contiguous()
    spread, squares = _Squares.apply(e_hat, error, total(error.sum(0)), rows)  # type: ignore[no-untyped-call]
    return applied(_Share, total(squares), total(spread), number)


class _Squares(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, e_hat: Tensor, error: Tensor, sums: Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(e_hat, error)
        width, parts = error.shape[1], error.new_empty(2, len(error))
        gpu.load("dead").share_rows[(len(error),)](
            error, e_hat.contiguous(), sums, *parts, rows, width, **gpu.of_rows(width)
        )
        spread, squares = parts.sum(1)
        ctx.mark_non_differentiable(spread)
        return spread, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor, None, None, None]:
        e_hat, error = ctx.saved_tensors
        out, width = torch.empty_like(e_hat, memory_format=torch.contiguous_format), error.shape[1]
        gpu.load("dead").share_gradient_rows[(len(error),)](
            error, e_hat.contiguous(), grad, out, width, **gpu.of_rows(width)
        )
        return out, None, None, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, squares: Tensor, spread: Tensor, number: Tensor) -> Tensor:
        found, inverse = torch.empty((), device=squares.device), torch.empty_like(squares)
        gpu.load("dead").defined_share[(1,)](spread, squares, number, found, inverse, num_warps=1)
        ctx.save_for_backward(inverse)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        of_squares: Tensor = grad * inverse
        return of_squares, None, None
