"""Triton kernels, for what plain torch needs several passes over the memory of a GPU.

Each kernel has a plain torch form beside its caller, which is the fallback and the reference. With
TRITON_INTERPRET=1, set before a kernel is first used, they run on a CPU, slowly: so they are tested where
there is no GPU.
"""

import importlib
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

MODULES = (
    "rows",
    "ranks",
    "selection",
    "spill",
    "soft",
    "lists",
    "sparse",
    "pairs",
    "columns",
    "dense",
    "dead",
    "margins",
    "units",
    "update",
    "record",
)
_SUM_BLOCK = 256
_WIDE = 1024  # entries of a row that are looked at together
_TILE = 8192  # numbers of a few rows that are looked at together
is_on = True


def serves(*tensors: Tensor) -> bool:
    """Return whether the kernels take these tensors: float32 on a GPU (or interpreted), with triton installed."""
    return (
        is_on
        and all(t.dtype == torch.float32 and t.device.type == _device() for t in tensors)
        and load("rows") is not None
    )


def runs_triton(*tensors: Tensor) -> bool:
    """Return whether these tensors, of any dtype, are on a device where Triton's kernels run, with triton installed."""
    is_there = all(t.device.type == _device() for t in tensors)
    return is_on and is_there and load("rows") is not None


def serves_scores(scores: Tensor) -> bool:
    """Return whether the kernels that read rows in chunks take these scores (B, M) of any width."""
    return scores.dtype != torch.float64 and scores.numel() > 0 and runs_triton(scores)


def _device() -> str:
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def on_device(value: Tensor | float, dtype: torch.dtype, like: Tensor) -> Tensor:
    """A tensor on the device of another, or a number put there by a kernel, which a CUDA graph can hold."""
    if isinstance(value, Tensor):
        return value.to(like.device, dtype)
    return torch.full((), value, dtype=dtype, device=like.device)


@cache
def load(name: str) -> Any:
    """A module of kernels, one of MODULES; None without triton."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return None
    return importlib.import_module(f"saeflow.operators.gpu.kernels.{name}")


def block_for(count: int) -> int:
    """Return how many numbers a program holds of so many, a power of two of 16 at least."""
    return 1 << max(4, (count - 1).bit_length())


def warps_for(block: int) -> int:
    """Return the warps of a program that holds a block of numbers."""
    return max(1, min(16, block // 256))


def of_rows(width: int) -> dict[str, int]:
    """Return constants of a kernel that holds rows of `width` numbers in registers."""
    block = block_for(width)
    return {"BLOCK": block, "num_warps": warps_for(block)}


def of_tiles(width: int) -> dict[str, int]:
    """Return constants of a kernel that holds a few rows of `width` numbers together."""
    block = block_for(width)
    return {"ROWS": max(1, _TILE // block), "BLOCK": block, "num_warps": 8}


def minus_product(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return -(matrix @ vector) (m,), of (m, n) and (n,), by one kernel."""
    return matrix.new_empty(len(matrix)).addmv_(matrix, vector, beta=0, alpha=-1)


def launch_rows(kernel: str, rows: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel that reads each of rows (B, n) in chunks."""
    wide = min(_WIDE, block_for(rows.shape[1]))
    function = getattr(load("soft"), kernel)
    tensors = (rows.detach(), *arguments)
    function[(len(rows),)](*tensors, rows.shape[1], WIDE=wide, num_warps=4, **constants)


def sum_rows(matrix: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """out[b] = sum over entries e in offsets[b]..offsets[b + 1] of weights[e] * matrix[ids[e]]."""
    width = matrix.shape[1]
    out = matrix.new_empty(len(offsets) - 1, width)
    grid = (len(out), -(-width // _SUM_BLOCK))
    if len(out):
        arguments = (matrix.contiguous(), ids, offsets, weights.contiguous(), out, width)
        load("rows").sum_rows[grid](*arguments, BLOCK=_SUM_BLOCK)
    return out


def row_products(
    left: Tensor, right: Tensor, order: Tensor, rows: Tensor, offsets: Tensor
) -> Tensor:
    """(count,) left[row] . right[column] of entries given by column: at order[e] for each of them."""
    products = left.new_empty(len(order))
    block = 1 << (right.shape[1] - 1).bit_length()
    arguments = (left.contiguous(), right.contiguous(), order, rows, offsets, products)
    load("rows").row_products[(len(right),)](*arguments, right.shape[1], BLOCK=block)
    return products
