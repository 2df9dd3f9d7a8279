"""Rows divided by their norm, with the norm, in one pass each way."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saeflow.operators import gpu

LEAST = 1e-12  # norm that a row is divided by


def unit_rows(x: Tensor, centre: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale (x - centre) / |x - centre| of each row (B, d), and the norms |x - centre| (B,), with gradient.

    A row is divided by 1e-12 at least; where its norm is 0, the norm has no gradient.

    Args:
        x: (B, d).
        centre: (d,); None: 0.
        scale: ().
    """
    tensors = (x, scale) if centre is None else (x, scale, centre)
    if gpu.serves(*tensors) and x.numel() and not x.requires_grad:
        result: tuple[Tensor, Tensor] = _UnitRows.apply(x, centre, scale)  # type: ignore[no-untyped-call]
        return result
    centred = x if centre is None else x - centre
    norm = torch.linalg.vector_norm(centred, dim=1)
    return centred / norm.clamp(min=LEAST)[:, None] * scale, norm


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, centre: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        unit, norms = torch.empty_like(x), x.new_empty(len(x))
        _launch("unit_rows", x, centre, scale, unit, norms)
        ctx.save_for_backward(x, centre, scale, norms)
        return unit, norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_unit: Tensor, of_norm: Tensor) -> tuple[Tensor | None, ...]:
        x, centre, scale, norms = ctx.saved_tensors
        count = -(-len(x) // gpu.of_tiles(x.shape[1])["ROWS"])
        of_centre, of_scale = x.new_empty(count, x.shape[1]), x.new_empty(count)
        grads = of_unit.contiguous(), of_norm.contiguous(), of_centre, of_scale
        _launch("unit_gradient_rows", x, centre, scale, norms, *grads)
        wanted = ctx.needs_input_grad[1:]
        return None, of_centre.sum(0) if wanted[0] else None, of_scale.sum() if wanted[1] else None


def _launch(kernel: str, x: Tensor, centre: Tensor | None, *arguments: Any) -> None:
    """Run a kernel of one program for each few rows."""
    tiles, function = gpu.of_tiles(x.shape[1]), getattr(gpu.load("units"), kernel)
    function[(-(-len(x) // tiles["ROWS"]),)](
        x, x if centre is None else centre, *arguments, *x.shape, HAS_CENTRE=centre is not None, **tiles
    )  # fmt: skip
