"""A uniform shuffle of any number of rows that needs no memory: a keyed Feistel network."""

import hashlib
import math
from collections.abc import Callable

import numpy as np

_ROUNDS = 16  # 8 are enough for large n; with 8 the orders of five ids are visibly unequal


class Permutation:
    """An exact permutation of 0..n-1, chosen by a seed.

    An id is written as two digits, left * b + right, with left < a, right < b and a * b just above n.
    Rounds in turn add a keyed hash of one digit to the other, modulo its base. A result outside 0..n-1 is
    permuted again until it falls inside (cycle walking), so the map stays one to one.

    Args:
        n: number of ids, 1 <= n < 2^62.
        seed: chooses the permutation.
        window: number of the window whose rows are shuffled; each has a permutation of its own.

    Source: Black & Rogaway 2002, "Ciphers with arbitrary finite domains".
    """

    def __init__(self, n: int, seed: int, window: int = 0) -> None:
        if not 1 <= n < 1 << 62:
            raise ValueError(f"n must be in 1..2^62 - 1, got {n}")
        self.n = n
        a = math.isqrt(n - 1) + 1
        self._bases = (np.uint64(a), np.uint64(-(-n // a)))
        chosen = f"saeflow permutation {n} {seed}" + (f" {window}" if window else "")
        digest = hashlib.shake_256(chosen.encode()).digest(8 * _ROUNDS)
        self._keys = np.frombuffer(digest, "<u8")

    def forward(self, ids: np.ndarray) -> np.ndarray:
        """(...) integers in 0..n-1 -> (...) int64: where each id goes."""
        return self._walk(ids, self._encrypt)

    def inverse(self, places: np.ndarray) -> np.ndarray:
        """(...) integers in 0..n-1 -> (...) int64: which id went to each place."""
        return self._walk(places, self._decrypt)

    def _walk(self, ids: np.ndarray, step: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        given = np.asarray(ids, np.int64)
        if given.size and not 0 <= given.min() <= given.max() < self.n:
            raise ValueError(f"ids must be in 0..{self.n - 1}")
        values = step(given.ravel().astype(np.uint64))
        while (outside := np.flatnonzero(values >= self.n)).size:
            values[outside] = step(values[outside])
        return values.astype(np.int64).reshape(given.shape)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        digits = list(np.divmod(values, self._bases[1]))
        for i, key in enumerate(self._keys):
            base = self._bases[i % 2]
            digits[i % 2] = (digits[i % 2] + _hash(digits[1 - i % 2], key) % base) % base
        result: np.ndarray = digits[0] * self._bases[1] + digits[1]
        return result

    def _decrypt(self, values: np.ndarray) -> np.ndarray:
        digits = list(np.divmod(values, self._bases[1]))
        for i, key in reversed(list(enumerate(self._keys))):
            base = self._bases[i % 2]
            digits[i % 2] = (digits[i % 2] + base - _hash(digits[1 - i % 2], key) % base) % base
        result: np.ndarray = digits[0] * self._bases[1] + digits[1]
        return result


def _hash(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """uint64 -> uint64: the finaliser of SplitMix64 (Steele et al. 2014), keyed."""
    mixed = values * np.uint64(0x9E3779B97F4A7C15) + key
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
