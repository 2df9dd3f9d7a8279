"""Shared by the parts of `benchmarks/gpu.py`: sizes, the device, timing, cases."""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from contestant import Case


@dataclass(frozen=True)
class Size:
    """The sizes of a run of this script."""

    d_in: int
    d_sae: int
    wide: int
    batch: int
    k: int
    repeats: int
    store_rows: int
    loop_steps: int
    contexts: int
    forward_batch: int


FULL = Size(768, 24_576, 49_152, 8192, 32, 20, 1 << 20, 400, 16_384, 256)
TOY = Size(64, 512, 1024, 256, 8, 2, 1 << 13, 20, 64, 8)


class Bench:
    """One run of the script.

    Args:
        device: cuda, or cpu at toy sizes.
        scratch: a folder for stores and models.
        extra: folder of unpacked wheels, for processes of peers and tests.
        kernels: file that the kernels of every step are listed in, with their times.
    """

    def __init__(
        self, device: str, scratch: Path, extra: Path | None, kernels: Path | None = None
    ) -> None:
        self.device, self.scratch, self.extra = torch.device(device), scratch, extra
        self.kernels = kernels
        self.on_gpu = self.device.type == "cuda"
        self.size = FULL if self.on_gpu else TOY
        self.began = time.monotonic()
        self.product_ms = 0.0
        self.runs_tests = True
        self.tests: list[Future[dict[str, Any]]] = []  # that run beside another part

    def environment(self) -> dict[str, str]:
        """The environment of another process that is to see the unpacked wheels."""
        paths = [str(self.extra or ""), os.environ.get("PYTHONPATH", "")]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def sync(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def ms(self, work: Callable[[], object], repeats: int | None = None) -> float:
        """Return milliseconds of some work, the mean of repetitions that do not wait for one another."""
        count = repeats or self.size.repeats
        for _ in range(3):
            work()
        self.sync()
        began = time.perf_counter()
        for _ in range(count):
            work()
        self.sync()
        return (time.perf_counter() - began) / count * 1e3

    def case(self, name: str, **changes: Any) -> Any:
        """Return what is asked of each library by a name."""
        few = ("jumprelu", "gated", "relu, few active")
        size = self.size
        plain = Case(
            variant=name.removesuffix(", 10 % dead").removesuffix(", few active"), d_in=size.d_in, d_sae=size.d_sae,
            batch=size.batch, k=size.k, density=size.k / size.d_sae if name in few else 0.0,
            dead=0.1 if "dead" in name else 0.0, steps=0, threads=torch.get_num_threads(),
            device=str(self.device), precision="bf16", repeats=size.repeats,
        )  # fmt: skip
        return replace(plain, **changes)
