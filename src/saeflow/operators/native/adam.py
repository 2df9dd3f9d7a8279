"""Kernels of the update: the gradient's part along unit rows, its norm, Adam and unit rows again."""

import math

import numpy as np
from numba import njit

fast = njit(nogil=True, error_model="numpy", cache=True, fastmath={"reassoc", "contract", "nsz"})


@fast
def measure_rows(grad, W, is_unit, squares, start, stop):
    """Sums of squares of the gradient's rows, first freed of their part along W's where it is unit."""
    for r in range(start, stop):
        g, w = grad[r], W[r]
        if is_unit:
            along = np.float32(0)
            for i in range(len(g)):
                along += g[i] * w[i]
            for i in range(len(g)):
                g[i] -= along * w[i]
        square = np.float32(0)
        for i in range(len(g)):
            square += g[i] * g[i]
        squares[r] = square


@fast
def update_rows(
    W, grad, first, second, is_unit, clip, rate, beta1, beta2, correction, epsilon, start, stop
):
    """Adam with the gradient times `clip`; then unit rows.

    rate: learning rate / (1 - beta1^t); correction: 1 / sqrt(1 - beta2^t).
    """
    rest1, rest2 = np.float32(1) - beta1, np.float32(1) - beta2
    for r in range(start, stop):
        w, g, m, v = W[r], grad[r], first[r], second[r]
        square = np.float32(0)
        for i in range(len(w)):
            change = g[i] * clip
            mean = m[i] + rest1 * (change - m[i])
            spread = beta2 * v[i] + rest2 * change * change
            m[i], v[i] = mean, spread
            new = w[i] - rate * mean / (np.sqrt(spread) * correction + epsilon)
            w[i] = new
            square += new * new
        if is_unit:
            scale = np.float32(1) / np.float32(math.sqrt(square))
            for i in range(len(w)):
                w[i] *= scale
