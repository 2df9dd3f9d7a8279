"""Rows on manifolds whose dimension is known: the positive control of estimators of local intrinsic dimension."""

import numpy as np

PARTS = (("sphere", 2), ("torus", 4), ("sphere", 8), ("torus", 16))
"""Kind and dimension of the parts of the union; those that the width cannot hold are left out."""
_NOISE = 0.01
"""Norm of the noise of a row, in the manifolds' radius."""
_APART = 10.0
"""Distance of each part's centre from the origin, in the manifolds' radius: no neighbourhood holds two parts."""


def union(rows: int, width: int, seed: int) -> tuple[np.ndarray, list[tuple[str, int]]]:
    """Sample a union of spheres and tori of radius 1, embedded at random and with small noise in all directions.

    Args:
        rows: of all parts together, each of which has as many, or one more.
        width: d_in of the activations that are measured beside it.
        seed: of points, embedding and noise.

    Returns:
        (rows, width) float64, and the kind and the dimension of each row's part. No rows where the width holds no part.
    """
    random = np.random.default_rng(seed)
    held = [part for part in PARTS if _across(*part) <= width]
    x, parts = [np.empty((0, width))], []
    for number, (kind, dimension) in enumerate(held):
        count = (rows + number) // len(held)
        points = _sphere if kind == "sphere" else _torus
        basis, _ = np.linalg.qr(random.normal(size=(width, _across(kind, dimension))))
        centre = random.normal(size=width)
        noise = random.normal(size=(count, width)) * _NOISE / np.sqrt(width)
        x.append(
            points(count, dimension, random) @ basis.T
            + noise
            + _APART * centre / np.linalg.norm(centre)
        )
        parts += [(kind, dimension)] * count
    return np.concatenate(x), parts


def _across(kind: str, dimension: int) -> int:
    """Return the number of coordinates of a manifold."""
    return dimension + 1 if kind == "sphere" else 2 * dimension


def _sphere(count: int, dimension: int, random: np.random.Generator) -> np.ndarray:
    """(count, dimension + 1) uniform on the unit sphere."""
    x = random.normal(size=(count, dimension + 1))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def _torus(count: int, dimension: int, random: np.random.Generator) -> np.ndarray:
    """(count, 2 dimension) uniform on a product of circles whose points have norm 1."""
    angles = random.uniform(0, 2 * np.pi, size=(count, dimension))
    x = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    x /= np.sqrt(dimension)
    return x
