"""The input scale: an SAE is trained on (x - shift) / scale, and saved so that it takes raw activations x.

It decides what every loss weight, threshold and temperature of a run means.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from saeflow.errors import UserError

KINDS = ("unit", "dimension", "raw", "centred")


class Moments(Protocol):
    """Moments of a store that an input scale needs."""

    d_in: int
    scale: float  # sqrt(mean ||x||^2 / d_in)
    mean: Tensor  # (d_in,) the mean row


@dataclass(frozen=True)
class InputScale:
    """Training sees (x - shift) / scale of raw activations x; a shift of None is 0.

    Attributes:
        scale: in units of the raw activations.
        shift: (d_in,) float32, in the same units.
    """

    scale: float
    shift: Tensor | None = None

    @classmethod
    def of(cls, kind: str, store: Moments) -> "InputScale":
        """The input scale of a kind, on rows of a store.

        `unit`: mean squared norm 1, no shift, as the language-model runs of dictionary_learning have it;
        `dimension`: mean squared norm d_in; `raw`: as they are; `centred`: the mean row is taken away, the
        scale stays that of `unit`, so that the mean squared norm is below 1 (the CLIP runs of SoftSAE).

        Raises:
            UserError: an unknown kind.
        """
        root_mean_square = store.scale * math.sqrt(store.d_in)  # of ||x||
        match kind:
            case "unit":
                return cls(root_mean_square)
            case "dimension":
                return cls(store.scale)
            case "raw":
                return cls(1.0)
            case "centred":
                return cls(root_mean_square, store.mean.to(torch.float32))
        raise UserError(f"input_scale: expected one of {', '.join(KINDS)}, found {kind!r}.")

    def __call__(self, x: Tensor) -> Tensor:
        """Raw activations (..., d_in) of any precision to what training sees, float32."""
        x = x.to(torch.float32)
        return (x if self.shift is None else x - self.shift) / self.scale

    def to(self, device: torch.device) -> "InputScale":
        """The same with its shift on a device."""
        shift = None if self.shift is None else self.shift.to(device)
        return dataclasses.replace(self, shift=shift)
