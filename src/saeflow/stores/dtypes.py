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

    @property
    def given(self) -> str:
        """Name of the dtype of the tensors that a store gives."""
        return str(self.torch).removeprefix("torch.")

    def encode(self, activations: Tensor) -> np.ndarray:
        """(n, d_in) floating point -> (n, width(d_in)) `storage`, rounded to nearest, ties to even."""
        return self.bits_of(activations.to(self.torch).contiguous())

    def decode(self, stored: np.ndarray) -> Tensor:
        """(n, width(d_in)) `storage` -> (n, d_in) `torch`, sharing the memory where values are stored as they are."""
        tensor = torch.from_numpy(stored)
        return tensor.view(self.torch) if self.name == "bfloat16" else tensor

    def width(self, d_in: int) -> int:
        """Values of `storage` that a row takes."""
        return d_in

    def d_in(self, width: int) -> int:
        """Activations of a row that takes so many values of `storage`."""
        return width

    def bits_of(self, tensor: Tensor) -> np.ndarray:
        """(...) `torch` on the CPU -> (...) `storage`, sharing the memory; of dtypes whose values are stored as they are."""
        return (tensor.view(torch.uint16) if self.name == "bfloat16" else tensor).numpy()

    def is_finite(self, stored: np.ndarray) -> bool:
        """Return whether every value of a `storage` array is finite; two passes, no temporaries."""
        bits = stored.view(self.bits)
        if not bits.size:
            return True
        sign = 1 << (8 * self.bits.itemsize - 1)
        positive = bits.view(np.dtype(f"i{self.bits.itemsize}")).max() < self.infinity
        return bool(positive and bits.max() < sign | self.infinity)


_LEVELS = 127
"""Steps of int8 on either side of zero; -128 is not used."""


class ScaledRows(Dtype):
    """Rows of int8, each with a float32 scale behind it: a value is scale times a whole number in -127..127.

    The scale is the row's largest absolute value over 127. The tensors that a store gives are float32.
    """

    def encode(self, activations: Tensor) -> np.ndarray:
        x = activations.float()
        scale = x.abs().amax(dim=1, keepdim=True) / _LEVELS
        steps = torch.where(scale > 0, x / scale, 0.0).round_().clamp_(-_LEVELS, _LEVELS)
        stored = np.empty((len(x), self.width(x.shape[1])), self.storage)
        split = _scale_at(stored)
        stored[:, :split] = steps.nan_to_num_().to(torch.int8).numpy().view(self.storage)
        stored[:, split:] = scale.numpy().view(self.storage)
        return stored

    def decode(self, stored: np.ndarray, out: Tensor | None = None) -> Tensor:
        """(n, d_in + 4) uint8 -> (n, d_in) float32, new or `out`."""
        split = _scale_at(stored)
        steps = torch.from_numpy(stored[:, :split].view(np.int8))
        return torch.mul(steps, torch.from_numpy(_scales(stored)), out=out)

    def width(self, d_in: int) -> int:
        return d_in + _SCALE.itemsize

    def d_in(self, width: int) -> int:
        return width - _SCALE.itemsize

    def bits_of(self, tensor: Tensor) -> np.ndarray:
        raise TypeError("a row of int8 is decoded, and shares no memory with its tensor")

    def is_finite(self, stored: np.ndarray) -> bool:
        return bool(np.isfinite(_scales(stored) * np.float32(_LEVELS)).all())


_SCALE = np.dtype("<f4")


def _scale_at(stored: np.ndarray) -> int:
    return int(stored.shape[1]) - _SCALE.itemsize


def _scales(stored: np.ndarray) -> np.ndarray:
    """(n, 1) float32 scales of rows as they are stored."""
    return np.ascontiguousarray(stored[:, _scale_at(stored) :]).view(_SCALE)


DTYPES = {
    dtype.name: dtype
    for dtype in (
        Dtype("float32", torch.float32, np.dtype("<f4"), np.dtype("<u4"), 0x7F800000),
        Dtype("float16", torch.float16, np.dtype("<f2"), np.dtype("<u2"), 0x7C00),
        Dtype("bfloat16", torch.bfloat16, np.dtype("<u2"), np.dtype("<u2"), 0x7F80),
        ScaledRows("int8", torch.float32, np.dtype("u1"), np.dtype("u1"), 0),
    )
}
