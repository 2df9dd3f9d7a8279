"""Orthogonality: how near each direction is to the most similar other one of its chunk."""

import torch
from torch import Tensor


def orthogonality(directions: Tensor, order: Tensor, size: int) -> Tensor:
    """Mean over directions of the square of each one's largest cosine with another one of its chunk.

    mean_i max(0, max_{j != i} cos(d_i, d_j))^2 over j of the chunk of i. Directions that are opposite, or at more than
    90 degrees from all others, cost nothing. Memory is that of one chunk's cosines, (size, size), at a time, and of
    all of them in the backward pass.

    Args:
        directions: (n, d) floating point, of any lengths; one of length 0 has cosine 0 with every other.
        order: (n,) a permutation of 0..n - 1: each `size` of it in turn are a chunk, the last with what is left.
        size: directions of a chunk, >= 2.

    Returns:
        () in [0, 1], differentiable in `directions`; where two cosines tie, the gradient is of the first in the chunk.

    Raises:
        ValueError: size < 2, or `order` has another number of entries than `directions`.

    Source: Korznikov et al. 2025 (OrtSAE, arXiv:2509.22033), whose chunks are drawn anew in every step. The form is that of
    a public re-implementation; the authors' code was not found.
    """
    if size < 2:
        raise ValueError(f"size: expected at least 2 directions in a chunk, found {size}.")
    if order.shape != directions.shape[:1]:
        raise ValueError(
            f"order: expected {len(directions)} entries, one a direction, found {tuple(order.shape)}."
        )
    lengths = torch.linalg.vector_norm(directions, dim=1, keepdim=True)
    unit = directions / torch.where(lengths > 0, lengths, 1)
    total = unit.new_zeros(())
    for part in unit[order].split(size):
        if len(part) > 1:
            cosines = (part @ part.t()).fill_diagonal_(-torch.inf)
            total = total + cosines.max(dim=1).values.relu().square().sum()
    return total / len(directions)
