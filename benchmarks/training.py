"""Training from the store against the same steps on a tensor in memory, and the cost of a step.

    python benchmarks/training.py [PROJECT]

Reads the demo's store (`make demo` first), under results/ of the project. Everything that is compared is
timed in turns in one process. Written to benchmarks/results/training.md and .csv.
"""

import dataclasses
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tables import in_turns, write
from torch import Tensor

from saeflow.config import ROOT, SAEConfig, expand_runs, load_params
from saeflow.saes import SAE, build
from saeflow.stores import open_store
from saeflow.training.checkpoints import delete_checkpoints
from saeflow.training.trainer import Run

STORE = "results/stores/smollm2/train/blocks.19.resid_post.zarr"
THREADS = (1, 2)
REPEATS, STEPS, ROWS = 7, 60, 65536
D_IN, D_SAE, BATCH, K = 768, 12288, 2048, 32
STEP_REPEATS, DEAD_SHARE = 5, 0.1
CONSTANT = {"kind": "constant"}
VARIANTS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "topk": ("topk", {"k": K, "k_schedule": CONSTANT, "auxk_weight": 1 / 32}, True),
    "topk, 10 % dead": ("topk", {"k": K, "k_schedule": CONSTANT, "auxk_weight": 1 / 32}, True),
    "topk, dense path": ("topk", {"k": K, "k_schedule": CONSTANT, "auxk_weight": 1 / 32}, False),
    "batch_topk": (
        "batch_topk",
        {"k": K, "k_schedule": CONSTANT, "auxk_weight": 1 / 32, "threshold_start_step": 0},
        True,
    ),
    "relu": ("relu", {"l1": 1.0, "l1_schedule": CONSTANT}, False),
    "relu, sparse path": ("relu", {"l1": 1.0, "l1_schedule": CONSTANT}, True),
}


class InMemory:
    """The first rows of a store as one float32 tensor, in the order they lie."""

    def __init__(self, path: Path) -> None:
        store = open_store(path)
        self.d_in, self.scale = store.d_in, store.scale
        self.x = store.read(0, min(ROWS, store.rows)).float()

    def batches(self, batch_size: int, seed: int, start_batch: int = 0) -> Iterator[Tensor]:
        for number in itertools.count(start_batch):
            start = number * batch_size % (len(self.x) - batch_size)
            yield self.x[start : start + batch_size]


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def end_to_end(project: Path) -> Iterator[dict[str, object]]:
    """The trainer on the store, with its log, against its bare steps on a tensor in memory."""
    params = load_params(ROOT / "params.yaml")
    every_s = params["runtime"]["checkpoint_every_s"]
    runtime = {"device": "cpu", "precision": "fp32", "checkpoint_every_s": every_s}
    config: SAEConfig = next(run for run in expand_runs(params) if run.entry == "topk")
    budget = dataclasses.replace(config.training, tokens=STEPS * config.training.batch_size)
    config = dataclasses.replace(config, training=budget)
    store, memory = open_store(project / STORE), InMemory(project / STORE)
    shares: list[float] = []

    def from_store(folder: Path) -> float:
        run = Run(store, config, runtime, folder)
        took = seconds(run.train)
        shares.append(seconds(run.checkpoint) / every_s)
        delete_checkpoints(folder)
        return took

    def in_memory(folder: Path) -> float:
        run = Run(memory, config, runtime, folder)

        def bare() -> None:
            for x in itertools.islice(run.batches(), STEPS):
                run.one_step(x)
                run.step += 1

        return seconds(bare)

    for threads in THREADS:
        torch.set_num_threads(threads)
        ratios: list[float] = []
        shares.clear()
        with tempfile.TemporaryDirectory(dir=project / "results") as name:
            folder = Path(name)
            for _ in range(REPEATS):
                before, first = from_store(folder), in_memory(folder)
                second, after = in_memory(folder), from_store(folder)
                ratios.append((first + second) / (before + after))
        shape = f"d_in {store.d_in}, d_sae {config.d_sae}, B {budget.batch_size}"
        what = {"threads": threads, "shape": shape}
        yield {"what": "rate from the store / rate in memory", **what, **spread(ratios)}
        yield {"what": f"time of one checkpoint / {every_s} s", **what, **spread(shares)}


def make_step(name: str, x: Tensor) -> tuple[SAE, Callable[[], None]]:
    """An SAE of about K active latents per row, and one training step of it."""
    variant, options, is_sparse = VARIANTS[name]
    sae = build(variant, x.shape[1], D_SAE, options)
    sae.initialise(x, torch.Generator().manual_seed(0))
    if variant == "relu":
        with torch.no_grad():
            pre_acts = sae.pre_activations(x)
            sae.b_enc.sub_(pre_acts.flatten()[:1_000_000].quantile(1 - K / D_SAE))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-6, fused=True)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    if "dead" in name:
        dead[: int(DEAD_SHARE * D_SAE)] = True

    def step() -> None:
        sae.begin_step(0, 1)
        fwd = sae.run(x, is_sparse=is_sparse)
        loss = torch.stack(list(sae.losses(fwd, dead).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        sae.project_grad()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        sae.project_weights()
        sae.end_step(fwd)
        fwd.fired()

    return sae, step


def step_costs() -> Iterator[dict[str, object]]:
    """Cost of one step in encoder products of its own shape, each between two of them."""
    torch.set_num_threads(max(THREADS))
    x = torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(0))
    out = torch.empty(BATCH, D_SAE)
    for name in VARIANTS:
        sae, step = make_step(name, x)
        weights = sae.W_enc.detach()
        step()

        def product(weights: Tensor = weights) -> Tensor:
            return torch.mm(x, weights, out=out)

        times = in_turns({"before": product, "step": step, "after": product}, STEP_REPEATS)
        ratios = [2 * s / (a + b) for a, s, b in zip(*times.values(), strict=True)]
        yield {"step": name, "d_sae": D_SAE, **spread(ratios)}


def spread(ratios: list[float]) -> dict[str, object]:
    return {
        "median": f"{statistics.median(ratios):.3g}",
        "smallest": f"{min(ratios):.3g}",
        "largest": f"{max(ratios):.3g}",
        "repeats": len(ratios),
    }


def main() -> None:
    project = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    if not (project / STORE).exists():
        raise SystemExit(f"{project / STORE}: no such store. Run `make demo` first.")
    rates = pd.DataFrame(end_to_end(project))
    costs = pd.DataFrame(step_costs())
    write(
        "training",
        {"From the store against in memory": rates, "Cost of a step in encoder products": costs},
        f"From the store: the trainer with its loader and log, {STEPS} steps a turn; in memory: the same "
        f"steps alone; a repeat is store, memory, memory, store. A step: d_in {D_IN}, B {BATCH}, about {K} active latents, {max(THREADS)} threads, "
        "with losses, gradients, projection, clipping, Adam, unit rows and statistics; the product is "
        f"({BATCH}, {D_IN}) times ({D_IN}, {D_SAE}).",
    )


if __name__ == "__main__":
    main()
