"""Triton's kernels compile for GPUs, and where one is at hand give what plain torch gives on a CPU."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saeflow.operators import (
    batch_topk,
    decode_sparse,
    entmax,
    gather_pre_acts,
    keep_topk,
    soft_topk,
    sparse,
    sparsemax,
    squared_errors,
    topk_sparse,
)

needs_gpu = pytest.mark.gpu
OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "keep_topk": lambda x: keep_topk(x, 32),
    "keep_topk, k by row": lambda x: keep_topk(x, torch.arange(len(x), device=x.device) % 50),
    "batch_topk": lambda x: batch_topk(x, 32),
    "sparsemax": sparsemax,
    "entmax 1.5": lambda x: entmax(x, 1.5),
    "entmax 1.8": lambda x: entmax(x, 1.8),
    "soft_topk": lambda x: soft_topk(x, 32.5, 0.1),
}


@pytest.fixture(autouse=True)
def path() -> None:
    """On this machine's own paths, once."""


@pytest.mark.parametrize("forms", [("90",), ("80", "first")])
def test_every_kernel_compiles_for_a_gpu(forms: tuple[str, ...]) -> None:
    script = Path(__file__).parent / "compile_kernels.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), *forms],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@needs_gpu
@pytest.mark.parametrize("n", [40, 3072, 24576])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_gpu_gives_the_values_and_gradients_of_a_cpu(name: str, n: int) -> None:
    x = torch.randn(256, n, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(256, n, generator=torch.Generator().manual_seed(1))
    found: list[Any] = []
    for device in ("cpu", "cuda"):
        on = x.to(device).requires_grad_()
        out = OPERATORS[name](on)
        (grad,) = torch.autograd.grad((out * weights.to(device)).sum(), on)
        found.append((out.detach().cpu(), grad.cpu()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_the_sparse_path_gives_a_gpu_the_gradients_of_a_cpu(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As near as sums of float32 in another order can be, given float64 gradients as reference.

    A sum of n products has an error of at most about n u S, with u = 2^-24 and S the sum of the products'
    sizes; in random order it is near sqrt(n) u S. Gradients here pass through two such sums, of up to 96
    and 64 terms, whose terms are no larger than the largest gradient: sqrt(96) + sqrt(64) < 20, so up to
    20 u of that is expected and 40 u allowed. On a CPU 4.5 u was seen with rows of any length, and 2.9 u with
    those of the same room, as on a GPU. Entries that nearly cancel have no smaller error, so that a
    tolerance relative to each entry would refuse correct results.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((64, 96), (768, 96), (768,), (768, 96))
    ]
    found: list[Any] = []
    kinds = [("cpu", torch.float64, False), ("cpu", torch.float32, False)]
    for place, dtype, has_room in (*kinds, (device, torch.float32, True)):
        monkeypatch.setattr(sparse, "is_padded", has_room)
        leaves = [t.to(place, dtype).requires_grad_() for t in tensors]
        on, rows, bias, directions = leaves
        with torch.no_grad():
            chosen = topk_sparse(on @ rows.t() + bias, 16, 16)
        centre = torch.zeros(96, device=place, dtype=dtype)
        latents = gather_pre_acts(
            on, rows.t(), bias, centre, chosen, is_rounded=has_room, W_dec=directions
        )
        assert (latents.lists is not None) == has_room
        if has_room:
            loss = squared_errors(latents, directions, centre, on.detach())[0].sum()
        else:
            loss = (decode_sparse(latents, directions) - on.detach()).square().sum()
        found.append([g.double().cpu() for g in torch.autograd.grad(loss, leaves)])
    for exact, by_rows, by_lists in zip(*found, strict=True):
        allowed = 40 * 2.0**-24 * float(exact.abs().max())
        torch.testing.assert_close(by_rows, exact, rtol=0, atol=allowed)
        torch.testing.assert_close(by_lists, exact, rtol=0, atol=allowed)
