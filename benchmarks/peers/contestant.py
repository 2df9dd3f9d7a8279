"""One library's side of `benchmarks/steps.py`: serves steps of its SAEs, timed between encoder products.

A contestant runs in the environment of its library and imports nothing else but torch. It is asked
for one case after the other; each is built, run and forgotten in a process of its own (a fork), so that
memory is counted afresh.
"""

import importlib.util
import json
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A step to time."""

    variant: str
    d_in: int
    d_sae: int
    batch: int
    k: int
    density: (
        float  # active latents over d_sae, where the variant does not decide; 0: as initialised
    )
    dead: float  # share of the latents that count as dead
    steps: int  # of a training loop; 0: single steps are timed
    threads: int
    device: str = "cpu"
    precision: str = "fp32"  # bf16: of matrix products
    repeats: int = 1  # steps timed together, without waiting between them

    @property
    def n_dead(self) -> int:
        return round(self.dead * self.d_sae)

    def batches(self) -> Iterator[Tensor]:
        """Rows (batch, d_in) like those of a residual stream: a mean, a power law, mean square 1."""
        generator = torch.Generator().manual_seed(0)
        widths = torch.arange(1, self.d_in + 1) ** -0.5
        turn = torch.linalg.qr(torch.randn(self.d_in, self.d_in, generator=generator)).Q
        mean = torch.randn(self.d_in, generator=generator)
        x = torch.randn(self.batch, self.d_in, generator=generator) * widths @ turn
        x = x / x.square().mean().sqrt() + mean
        x = (x / x.square().mean().sqrt()).to(self.device)
        while True:
            yield x

    def autocast(self) -> Any:
        """The context in which a library runs its step."""
        return torch.autocast(
            torch.device(self.device).type, torch.bfloat16, self.precision == "bf16"
        )

    def wait(self) -> None:
        """Until the device has done all it was asked."""
        if self.device != "cpu":
            torch.cuda.synchronize()


def leave_out(*names: str) -> None:
    """Put empty modules in place of packages that are not installed: what a library imports and no step uses."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            module = types.ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            module.__getattr__ = lambda _name: None  # type: ignore[method-assign]
            sys.modules[name] = module


Work = Callable[[], object]
Build = Callable[[Case, Iterator[Tensor]], Work]


def serve(build: Build) -> None:
    """Answer requests, a JSON line each, until there are no more.

    A case is asked for by its fields; then every "go" times a product, the work and a product, and
    "end" leaves the case.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    requests = os.fdopen(0, "rb", buffering=0)
    while line := requests.readline():
        child = os.fork()
        if child == 0:
            run(build, Case(**json.loads(line)), requests, answers)
            answers.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(1)


def run(build: Build, case: Case, requests: Any, answers: Any) -> None:
    """Build one case and time it as often as asked."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    batches = case.batches()
    x = next(batches)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    sum(x @ x.t() for _ in range(3))  # starts torch's threads, whose memory is not the step's
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory counts from here
    before = memory("VmRSS:")
    work = build(case, batches)
    for _ in range(1 if case.steps else 2 if case.device == "cpu" else 5):
        work()
    print(json.dumps({"peak": memory("VmHWM:") - before}), file=answers, flush=True)
    weights = torch.randn(case.d_sae, case.d_in, device=case.device, dtype=dtype).t()
    out = torch.empty(case.batch, case.d_sae, device=case.device, dtype=dtype)
    rows = x.to(dtype)

    def product() -> object:
        return torch.mm(rows, weights, out=out)

    product()
    while requests.readline().strip() == b"go":
        times = [seconds(each, case) for each in (product, work, product)]
        print(
            json.dumps({"before": times[0], "work": times[1], "after": times[2]}),
            file=answers,
            flush=True,
        )


def seconds(work: Work, case: Case) -> float:
    """Return the mean time of one call over the case's repeats."""
    case.wait()
    began = time.perf_counter()
    for _ in range(case.repeats):
        work()
    case.wait()
    return (time.perf_counter() - began) / case.repeats


def memory(field: str) -> float:
    """MiB of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
