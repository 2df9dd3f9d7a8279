"""Dtypes of stored activations: how each looks as a torch tensor, in a file, and when it is not finite."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Dtype:
    """One dtype of stored activations.

    Attributes:
        name: as in params.yaml and in a store's attributes.
        torch: of the tensors that a store gives.
        storage: of the Zarr array. Neither numpy nor Zarr 3.1 knows bfloat16: its bits are kept as uint16.
        bits: the unsigned integer of the same width.
        infinity: bits of +inf; every non-finite value has at least these, its sign bit aside.
    """

    name: str
    torch: torch.dtype
    storage: np.dtype
    bits: np.dtype
    infinity: int

    def encode(self, activations: Tensor) -> np.ndarray:
        """(...) floating point -> (...) `storage`, rounded to nearest, ties to even."""
        return self.bits_of(activations.to(self.torch).contiguous())

    def decode(self, stored: np.ndarray) -> Tensor:
        """(...) `storage` -> (...) `torch`, sharing the memory."""
        tensor = torch.from_numpy(stored)
        return tensor.view(self.torch) if self.name == "bfloat16" else tensor

    def bits_of(self, tensor: Tensor) -> np.ndarray:
        """(...) `torch` on the CPU -> (...) `storage`, sharing the memory."""
        return (tensor.view(torch.uint16) if self.name == "bfloat16" else tensor).numpy()

    def is_finite(self, stored: np.ndarray) -> bool:
        """Return whether every value of a `storage` array is finite; two passes, no temporaries."""
        bits = stored.view(self.bits)
        if not bits.size:
            return True
        sign = 1 << (8 * self.bits.itemsize - 1)
        positive = bits.view(np.dtype(f"i{self.bits.itemsize}")).max() < self.infinity
        return bool(positive and bits.max() < sign | self.infinity)


DTYPES = {
    dtype.name: dtype
    for dtype in (
        Dtype("float32", torch.float32, np.dtype("<f4"), np.dtype("<u4"), 0x7F800000),
        Dtype("float16", torch.float16, np.dtype("<f2"), np.dtype("<u2"), 0x7C00),
        Dtype("bfloat16", torch.bfloat16, np.dtype("<u2"), np.dtype("<u2"), 0x7F80),
    )
}
