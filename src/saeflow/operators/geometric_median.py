"""Geometric median: the point with the smallest sum of distances to all points."""

import torch
from torch import Tensor

from saeflow.operators.rows import refuse_rows


def geometric_median(points: Tensor, tol: float = 1e-5, max_iter: int = 100) -> Tensor:
    """Weiszfeld iterations from the mean, in float64.

    Where the estimate coincides with points, they are set aside and their number weighed against
    the pull of the others (Vardi & Zhang), so the iteration neither divides by zero nor sticks.

    Args:
        points: (n, d) floating point, n >= 1.
        tol: stop when a step is at most this fraction of the mean distance to the points.
        max_iter: most iterations.

    Returns:
        (d,), dtype and device of `points`. Not differentiable.

    Raises:
        TypeError: `points` is not floating point.
        ValueError: `points` is not (n, d) with n >= 1, or a row (named) is not finite.

    Source: Weiszfeld 1937; Vardi & Zhang 2000 (doi:10.1073/pnas.97.4.1423), eq. 2.6.
    """
    if not points.is_floating_point():
        raise TypeError(f"points must be floating point, got {points.dtype}")
    if points.ndim != 2 or len(points) == 0:
        raise ValueError(f"points must be (n, d) with n >= 1, got {tuple(points.shape)}")
    x = points.detach().double()
    refuse_rows(~x.isfinite().all(1), 0, "points must be finite")
    median = x.mean(0)
    for _ in range(max_iter):
        offsets = x - median
        distances = offsets.norm(dim=1)
        apart = distances > 1e-12 * distances.max()
        if not apart.any():
            break
        weights = torch.where(apart, 1 / distances, 0)
        pull = weights @ offsets
        coincident = (~apart).sum()
        step = pull / weights.sum() * (1 - coincident / pull.norm().clamp(min=1e-300)).clamp(min=0)
        median = median + step
        if step.norm() <= tol * distances.mean():
            break
    return median.to(points.dtype)
