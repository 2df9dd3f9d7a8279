"""Kernels of the sparse backward pass: one walk over each latent's entries.

Rows of the batch that a latent was active in are gathered from the cache; each row of the decoder, of
its gradient and of the encoder's gradient is touched once.
"""

import numpy as np
from numba import njit

jit = njit(nogil=True, error_model="numpy", cache=True)
fast = njit(nogil=True, error_model="numpy", cache=True, fastmath={"reassoc", "contract", "nsz"})


@jit
def transpose(offsets, columns, d_sae, order, rows, starts):
    """The entries by column, then row: their place by row, their row, where each column starts."""
    starts[:] = 0
    for entry in range(len(columns)):
        starts[columns[entry] + 1] += 1
    for column in range(d_sae):
        starts[column + 1] += starts[column]
    places = starts[:d_sae].copy()
    for row in range(len(offsets) - 1):
        for entry in range(offsets[row], offsets[row + 1]):
            place = places[columns[entry]]
            order[place] = entry
            rows[place] = row
            places[columns[entry]] = place + 1


@fast
def decoder_gradient(grad, W, values, order, rows, starts, grad_values, grad_W, start, stop):
    """grad_values[entry] = grad[row] . W[latent], grad_W[latent] = sum of values[entry] grad[row]."""
    d = grad.shape[1]
    for latent in range(start, stop):
        out, direction = grad_W[latent], W[latent]
        out[:] = 0
        for place in range(starts[latent], starts[latent + 1]):
            entry, g = order[place], grad[rows[place]]
            value, product = values[entry], np.float32(0)
            for i in range(d):
                product += g[i] * direction[i]
                out[i] += value * g[i]
            grad_values[entry] = product


@fast
def products(grad, W, order, rows, starts, grad_values, start, stop):
    """grad_values[entry] = grad[row] . W[latent]."""
    d = grad.shape[1]
    for latent in range(start, stop):
        direction = W[latent]
        for place in range(starts[latent], starts[latent + 1]):
            g, product = grad[rows[place]], np.float32(0)
            for i in range(d):
                product += g[i] * direction[i]
            grad_values[order[place]] = product


@fast
def encoder_gradient(x, weights, order, rows, starts, grad_W, grad_b, start, stop):
    """grad_W[latent] = sum of weights[entry] x[row], grad_b[latent] = sum of weights[entry]."""
    d = x.shape[1]
    for latent in range(start, stop):
        out, total = grad_W[latent], np.float32(0)
        out[:] = 0
        for place in range(starts[latent], starts[latent + 1]):
            weight, row = weights[order[place]], x[rows[place]]
            total += weight
            for i in range(d):
                out[i] += weight * row[i]
        grad_b[latent] = total
