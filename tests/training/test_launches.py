"""A step on a GPU launches few kernels: each takes two microseconds at least, whatever it does."""

import dataclasses
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saeflow.operators import gpu, native, sparse
from saeflow.saes.density import FollowsDensity
from saeflow.training.run import Run

from .conftest import RUNTIME, Samples, config

AT_MOST = {
    "topk": 38, "adaptive_k": 67, "batch_topk": 56, "matryoshka": 55, "jumprelu": 47, "gated": 57, "relu": 47,
    "sparsemax": 49, "soft_topk": 61,
}  # fmt: skip
"""Launches of a sparse step, of which one updates and one measures the weights; a sort or a sum counts as one."""
FREE = {
    "view", "t", "detach", "select", "slice", "unsqueeze", "expand", "as_strided", "alias", "empty", "_unsafe_view",
    "permute", "split", "split_with_sizes", "unbind", "transpose", "squeeze", "empty_like", "new_empty",
    "empty_strided", "new_empty_strided",
}  # fmt: skip
"""Operations of torch that launch nothing."""


class Launches(TorchDispatchMode):
    """Counts the operations of torch that launch a kernel, but for those of Triton's interpreter."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.__name__.split(".")[0]
        if name not in FREE:
            stack = traceback.extract_stack()
            if not any("/triton/" in frame.filename for frame in stack):
                own = [frame for frame in stack if "/saeflow/" in frame.filename]
                self.lines.append(f"{name} {own[-1].filename}:{own[-1].lineno}" if own else name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of Triton's kernels that are launched from now on, interpreted."""
    from triton.runtime import interpreter

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(native, "is_on", False)
    monkeypatch.setattr(sparse, "is_padded", True)
    names: list[str] = []
    launch = interpreter.GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    return names


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs kernels, no interpreter")
@pytest.mark.parametrize("variant", AT_MOST)
def test_a_sparse_step_launches_few_kernels(
    variant: str, kernels: list[str], tmp_path: Path
) -> None:
    assert gpu.load("rows") is not None
    setting = dataclasses.replace(
        config(variant, batch_size=8, tokens=8 * 200, log_every_steps=50), d_sae=128
    )
    run = Run(Samples(), setting, {**RUNTIME, "precision": "bf16"}, tmp_path)
    run.step = 120  # schedules are at rest
    batches = run.batches(120)
    if isinstance(run.sae, FollowsDensity):
        run.sae.density.fill_(0.01)  # the path of steps with few active latents
    run.take(next(batches), 0.0)
    batch = next(batches)
    kernels.clear()
    run.begin()
    with Launches() as of_torch:
        stepped = run.work(batch)
    assert stepped.fwd.is_sparse
    found = [*of_torch.lines, *kernels]
    assert len(kernels) > 10
    assert len(found) <= AT_MOST[variant], "\n".join(found)
