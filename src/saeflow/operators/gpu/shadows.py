"""bfloat16 copies of weights, which the update of the weights writes, so that no step rounds them anew.

A copy lies with its parameter. It is made when a product in bfloat16 first asks for it, where the host must not wait
for the device, and is made anew wherever torch counts a change of the parameter that the update did not make.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_NAME = "bfloat16_copy"


@dataclass(eq=False)
class Shadow:
    """A copy of a parameter, laid out alike, and the parameter's version when they last agreed."""

    copy: Tensor
    version: int


def multiplies_in_bf16(tensor: Tensor) -> bool:
    """Return whether products on a tensor's device are in bfloat16 now."""
    kind = tensor.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16


def shadow(weights: Tensor) -> Tensor:
    """Return the bfloat16 copy of a parameter that is trained, or of its transpose; other weights are rounded here.

    Args:
        weights: (m, n) float32.
    """
    parameter = weights if weights._base is None else weights._base
    if not (parameter.is_leaf and parameter.requires_grad):
        return weights.to(torch.bfloat16)
    if weights is not parameter and weights.shape != parameter.shape[::-1]:
        return weights.to(torch.bfloat16)
    copy = refresh(parameter)
    if copy is None:
        copy = parameter.detach().to(torch.bfloat16)
        setattr(parameter, _NAME, Shadow(copy, parameter._version))
    return copy if weights.stride() == parameter.stride() else copy.t()


@torch.no_grad()
def refresh(parameter: Tensor) -> Tensor | None:
    """Make a parameter's copy what the parameter is, and return it; None where there is no copy."""
    found: Shadow | None = getattr(parameter, _NAME, None)
    if found is None or found.copy.device != parameter.device:
        return None
    if found.version != parameter._version:
        found.copy.copy_(parameter)
        found.version = parameter._version
    return found.copy


def written(parameter: Tensor) -> None:
    """Say that parameter and copy were both written, and agree."""
    found: Shadow | None = getattr(parameter, _NAME, None)
    if found is not None:
        found.version = parameter._version
