"""Unit vectors pushed towards orthogonality by gradient steps, as `sae_lens.synthetic` does."""

import numpy as np

_BETAS, _EPSILON = (0.9, 0.999), 1e-8
"""Adam's, as torch has them."""


def orthogonalised(features: np.ndarray, *, steps: int, lr: float) -> np.ndarray:
    """Take Adam's steps on the sum of squared cosines of all pairs, with norms held near 1, and normalise.

    The loss is sum over i != j of (f_i . f_j)^2 plus n sum over i of (|f_i|^2 - 1)^2. Its gradient goes through the
    (d_in, d_in) second moment, so that no n times n matrix is made.

    Args:
        features: (n, d_in) rows of norm 1.
        steps: number of steps.
        lr: learning rate.

    Returns:
        (n, d_in) float32 unit rows.
    """
    rows = features.astype(np.float32)
    n = np.float32(len(rows))
    momentum, square = np.zeros_like(rows), np.zeros_like(rows)
    for step in range(1, steps + 1):
        norms = np.square(rows).sum(axis=1, keepdims=True)
        gradient = 4 * (rows @ (rows.T @ rows) - norms * rows + n * (norms - 1) * rows)
        momentum += (1 - _BETAS[0]) * (gradient - momentum)
        square += (1 - _BETAS[1]) * (np.square(gradient) - square)
        spread = np.sqrt(square / (1 - _BETAS[1] ** step)) + _EPSILON
        rows -= np.float32(lr / (1 - _BETAS[0] ** step)) * momentum / spread
    result: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return result.astype(np.float32)
