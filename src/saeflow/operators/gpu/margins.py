"""Margins by which scores of a rounded product may lie from exact ones, and thresholds that are lowered by as much."""

import torch
from torch import Tensor

from saeflow.operators import gpu

PIECE = 8192  # numbers that a program sums the squares of
WIDE = 1024


def of_norms(inputs: Tensor, centre: Tensor, matrix: Tensor, times: float) -> Tensor:
    """Return times |inputs - centre| |matrix| (), without gradient.

    Args:
        inputs: (B, d).
        centre: (d,).
        matrix: (d, M) of any precision, or laid out by columns.
        times: a number.
    """
    of_inputs = inputs.dtype == centre.dtype == torch.float32
    is_narrow = matrix.dtype in (torch.float32, torch.bfloat16)
    if not (of_inputs and is_narrow and gpu.runs_triton(inputs, matrix) and inputs.numel()):
        kind = torch.float32 if matrix.dtype == torch.bfloat16 else None
        of_matrix = torch.linalg.vector_norm(matrix, dtype=kind)
        norms: Tensor = torch.linalg.vector_norm(inputs - centre) * of_matrix
        return norms * times
    x, numbers = inputs.detach().contiguous(), matrix.detach()
    numbers = numbers.t() if numbers.t().is_contiguous() else numbers.contiguous()
    tiles = gpu.of_tiles(x.shape[1])
    of_x = -(-len(x) // tiles["ROWS"])
    parts = x.new_empty(of_x + -(-numbers.numel() // PIECE))
    margin, kernels = x.new_empty(()), gpu.load("margins")
    kernels.squares_of_pieces[(len(parts),)](
        x, centre.detach().contiguous(), numbers, parts, x.shape[1], len(x), of_x, numbers.numel(),
        PIECE=PIECE, **tiles,
    )  # fmt: skip
    kernels.margin_of_parts[(1,)](parts, margin, of_x, len(parts), times, WIDE=WIDE, num_warps=4)
    return margin


def shifted(threshold: Tensor, below: float, *, of_log: bool) -> Tensor:
    """Return each threshold, given as its log or itself, less a number."""
    t = threshold.exp() if of_log else threshold
    return t - below if below else t


def lowered(
    threshold: Tensor, margin: Tensor | float, share: float, below: float, *, of_log: bool
) -> Tensor:
    """Return t - share |t| - margin for t of `shifted`, without gradient.

    Args:
        threshold: of any shape.
        margin: () or a number.
        share, below: numbers.
        of_log: thresholds are given as their logs.
    """
    is_there = isinstance(margin, Tensor) and gpu.serves(threshold, margin)
    if not (is_there and threshold.numel()):
        t = shifted(threshold, below, of_log=of_log)
        return t.sub(t.abs(), alpha=share) - margin
    given = threshold.detach().contiguous()
    out = torch.empty_like(given)
    gpu.load("margins").lowered_columns[(-(-given.numel() // WIDE),)](
        given, margin, out, below, share, given.numel(), OF_LOG=of_log, WIDE=WIDE, num_warps=4
    )
    return out
