"""Edits of latents, for `saeflow.hook(..., edit=...)`: switch latents off, hold them at a value, push them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from saeflow.errors import UserError

Edit = Callable[[Tensor], Tensor]
"""Latents (n, d_sae) to latents of the same shape; their gradient goes through."""


def ablate(latents: int | Sequence[int]) -> Edit:
    """Set some latents to 0 at every position."""
    return clamp(latents, 0.0)


def clamp(latents: int | Sequence[int], value: float) -> Edit:
    """Hold some latents at a value at every position (Templeton et al. 2024, Scaling Monosemanticity).

    Args:
        latents: one index or several.
        value: in units of the latents; the activations of a strong example tell what is usual.
    """
    return _at(latents, lambda chosen: torch.full_like(chosen, value))


def scale(latents: int | Sequence[int], factor: float) -> Edit:
    """Multiply some latents by a factor, where they are active."""
    return _at(latents, lambda chosen: chosen * factor)


def add(latents: int | Sequence[int], value: float) -> Edit:
    """Add a value to some latents at every position: their decoder rows become steering vectors."""
    return _at(latents, lambda chosen: chosen + value)


def _at(latents: int | Sequence[int], change: Callable[[Tensor], Tensor]) -> Edit:
    indices = [latents] if isinstance(latents, int) else list(latents)

    def edit(z: Tensor) -> Tensor:
        if wrong := [i for i in indices if not 0 <= i < z.shape[-1]]:
            raise UserError(
                f"edit: expected latents in 0..{z.shape[-1] - 1}, found {', '.join(map(str, wrong))}. "
                "Take indices of this SAE."
            )
        places = torch.tensor(indices, dtype=torch.long, device=z.device)
        return z.index_copy(-1, places, change(z[..., places]))

    return edit
