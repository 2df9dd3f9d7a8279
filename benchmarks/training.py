"""Training from the store against the same steps on a tensor in memory, and the cost of a step.

    python benchmarks/training.py

Reads the demo's store (`make demo` first). Everything is timed in turns in one process, and only ratios of
the same run are reported: the median over repeats, with the smallest and largest. Written to
benchmarks/results/training.md and .csv.
"""

import dataclasses
import datetime
import importlib.metadata
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from saeflow.config import ROOT, SAEConfig, expand_runs, load_params
from saeflow.saes import build
from saeflow.stores import open_store
from saeflow.training.trainer import Run

STORE = ROOT / "results/stores/smollm2/train/blocks.19.resid_post.zarr"
RESULTS = Path(__file__).parent / "results"
REPEATS, STEPS = 7, 60
D_IN, BATCH, K = 768, 2048, 32
STEP_REPEATS = 5
VARIANTS = {
    "topk": {"k": K, "k_schedule": {"kind": "constant"}, "auxk_weight": 1 / 32},
    "batch_topk": {"k": K, "k_schedule": {"kind": "constant"}, "auxk_weight": 1 / 32},
    "relu": {"l1": 1.0, "l1_schedule": {"kind": "constant"}},
}


class InMemory:
    """The first rows of a store as one float32 tensor, in the order they lie."""

    def __init__(self, path: Path, rows: int) -> None:
        store = open_store(path)
        self.d_in, self.scale = store.d_in, store.scale
        self.x = store.read(0, min(rows, store.rows)).float()

    def batches(self, batch_size: int, seed: int, start_batch: int = 0) -> Iterator[Tensor]:
        for number in itertools.count(start_batch):
            start = number * batch_size % (len(self.x) - batch_size)
            yield self.x[start : start + batch_size]


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def end_to_end() -> dict[str, object]:
    """Rate of `train` from the store over its rate on a tensor in memory, the same run otherwise."""
    runs = expand_runs(load_params(ROOT / "params.yaml"))
    config: SAEConfig = next(
        run for run in runs if run.variant == "topk" and run.source == "smollm2"
    )
    budget = dataclasses.replace(config.training, tokens=STEPS * config.training.batch_size)
    config = dataclasses.replace(config, training=budget)
    runtime = {"device": "cpu", "precision": "fp32", "checkpoint_every_s": 60}
    stores = {"store": open_store(STORE), "memory": InMemory(STORE, 65536)}
    times: dict[str, list[float]] = {name: [] for name in stores}
    for _ in range(REPEATS):
        for name, store in stores.items():
            with tempfile.TemporaryDirectory() as folder:
                run = Run(store, config, runtime, Path(folder))
                times[name].append(seconds(run.train))
    ratios = [memory / store for store, memory in zip(times["store"], times["memory"], strict=True)]
    return row(
        "end to end / in memory (rate)",
        ratios,
        f"d_sae {config.d_sae}, B {config.training.batch_size}, k {config.options['k']}",
    )


def step_costs(d_sae: int) -> Iterator[dict[str, object]]:
    """Cost of one step in encoder products of its own shape, timed in turns."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, D_IN, generator=generator)
    product = torch.empty(BATCH, d_sae)
    for variant, options in VARIANTS.items():
        sae = build(variant, D_IN, d_sae, options)
        sae.initialise(x, generator)
        if variant == "relu":  # about as many active latents as the others
            with torch.no_grad():
                pre_acts = sae.pre_activations(x)
                sae.b_enc.sub_(pre_acts.flatten()[:1_000_000].quantile(1 - K / d_sae))
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)
        dead = torch.zeros(d_sae, dtype=torch.bool)

        def step(sae=sae, optimizer=optimizer, dead=dead) -> None:
            sae.begin_step(0, 1)
            fwd = sae.run(x)
            loss = torch.stack(list(sae.losses(fwd, dead).values())).sum()
            optimizer.zero_grad()
            loss.backward()
            sae.project_grad()
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            optimizer.step()
            sae.project_weights()
            sae.end_step(fwd)
            fwd.fired()

        step()
        ratios = []
        for _ in range(STEP_REPEATS):
            unit = seconds(lambda: torch.mm(x, sae.W_enc.detach(), out=product))  # noqa: B023
            took = seconds(step)
            unit = (unit + seconds(lambda: torch.mm(x, sae.W_enc.detach(), out=product))) / 2  # noqa: B023
            ratios.append(took / unit)
        yield row(
            f"{variant} step / encoder product (time)",
            ratios,
            f"d_in {D_IN}, d_sae {d_sae}, B {BATCH}, k {K}",
        )


def row(what: str, ratios: list[float], shape: str) -> dict[str, object]:
    return {
        "ratio": what,
        "shape": shape,
        "median": round(statistics.median(ratios), 3),
        "smallest": round(min(ratios), 3),
        "largest": round(max(ratios), 3),
        "repeats": len(ratios),
    }


def main() -> None:
    if not STORE.exists():
        raise SystemExit(f"{STORE}: no such store. Run `make demo` first.")
    table = pd.DataFrame([end_to_end(), *step_costs(3072), *step_costs(12288)])
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy", "zarr")
    )
    about = (
        f"{datetime.date.today()}, {os.cpu_count()} cores ({platform.machine()}), "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}, {versions}. "
        "By `python benchmarks/training.py`."
    )
    RESULTS.mkdir(exist_ok=True)
    table.to_csv(RESULTS / "training.csv", index=False)
    lines = [
        "# Training",
        "",
        about,
        "",
        "| " + " | ".join(table.columns) + " |",
        "|---" * len(table.columns) + "|",
    ]
    lines += ["| " + " | ".join(map(str, values)) + " |" for values in table.to_numpy()]
    (RESULTS / "training.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
