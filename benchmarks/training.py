"""Training from the store against the same steps on a tensor in memory; several SAEs in one pass.

    python benchmarks/training.py [PROJECT]

Reads the demo's store of its language model, under results/ of the project. Everything that is compared takes
turns. Written to benchmarks/results/training.md and .csv.
"""

import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch
from tables import write

from saeflow.batch import Batch
from saeflow.config import ROOT, SAEConfig, expand_runs, load_params
from saeflow.stores import open_store
from saeflow.training.checkpoints import delete_checkpoints
from saeflow.training.memory import keep_freed_memory
from saeflow.training.run import Run
from saeflow.training.trainer import advance

STORES = "results/stores/smollm2/train"
STORE = f"{STORES}/blocks.19.resid_post.zarr"
THREADS = 2
SHAPES = ((1536, 1024, 117), (12288, 2048, 12))
"""d_sae, batch size, steps: the demo's, and a usual one."""
REPEATS, ROWS = 3, 65536
GROUP = 8
GROUP_REPEATS = 2


class InMemory:
    """The first rows of a store as one float32 tensor, in the order they lie."""

    def __init__(self, path: Path) -> None:
        store = open_store(path)
        self.d_in, self.model, self.positions = store.d_in, store.model, store.positions
        self.scale, self.mean, self.targets = store.scale, store.mean, None
        self.x = store.read(0, min(ROWS, store.rows)).float()

    def batches(self, batch_size: int, seed: int, start_batch: int = 0) -> Iterator[Batch]:
        for number in itertools.count(start_batch):
            start = number * batch_size % (len(self.x) - batch_size)
            yield Batch.of(self.x[start : start + batch_size])

    def last_rows(self) -> "InMemory":
        return self


def seconds(work: Callable[..., object], *arguments: object) -> float:
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


def topk(d_sae: int, batch_size: int, steps: int) -> SAEConfig:
    """The demo's first TopK, of another shape and budget."""
    config: SAEConfig = next(
        run for run in expand_runs(load_params(ROOT / "params.yaml")) if run.entry == "topk"
    )
    budget = dataclasses.replace(config.training, batch_size=batch_size, tokens=steps * batch_size)
    return dataclasses.replace(config, d_sae=d_sae, training=budget)


def runtime() -> dict[str, object]:
    return load_params(ROOT / "params.yaml")["runtime"]


def end_to_end(project: Path) -> Iterator[dict[str, object]]:
    """The trainer on the store, with its log, against its bare steps on a tensor in memory."""
    store, memory = open_store(project / STORE), InMemory(project / STORE)
    every_s = float(str(runtime()["checkpoint_every_s"]))
    for d_sae, batch_size, steps in SHAPES:
        config = topk(d_sae, batch_size, steps)
        ratios: list[float] = []
        shares: list[float] = []

        def from_store(
            folder: Path, config: SAEConfig = config, shares: list[float] = shares
        ) -> float:
            run = Run(store, config, runtime(), folder)
            took = seconds(advance, [run])
            shares.append(seconds(run.checkpoint) / every_s)
            delete_checkpoints(folder)
            return took

        def in_memory(folder: Path, config: SAEConfig = config, steps: int = steps) -> float:
            run = Run(memory, config, runtime(), folder)

            def bare() -> None:
                for batch in itertools.islice(run.raw_batches(), steps):
                    run.take(batch, 0.0)

            return seconds(bare)

        with tempfile.TemporaryDirectory(dir=project / "results") as name:
            folder = Path(name)
            in_memory(folder)
            for _ in range(REPEATS):
                before, first = from_store(folder), in_memory(folder)
                second, after = in_memory(folder), from_store(folder)
                ratios.append((first + second) / (before + after))
        shape = f"d_in {store.d_in}, d_sae {d_sae}, B {batch_size}"
        yield {"what": "rate from the store / rate in memory", "shape": shape, **spread(ratios)}
        yield {"what": f"time of one checkpoint / {every_s:g} s", "shape": shape, **spread(shares)}


def group_configs(d_sae: int, batch_size: int, steps: int) -> list[SAEConfig]:
    """Eight TopK SAEs of one seed: a sweep over k."""
    config = topk(d_sae, batch_size, steps)
    ks = [4, 8, 16, 24, 32, 64, 96, 128]
    assert len(ks) == GROUP
    return [
        dataclasses.replace(config, name=f"group/k{k}", options={**config.options, "k": k})
        for k in ks
    ]


def command(project: Path, configs: Sequence[SAEConfig], folder: Path) -> None:
    """`saeflow train`, of one run or of several in one pass."""
    shared = {"params": {"precision": "fp32"}, "reads": {"train": str(project / STORES)}}
    runs = [
        {
            "out": str(folder / config.name), "key": "", "reads": {},
            "params": {"run": dataclasses.asdict(config)},
        }
        for config in configs
    ]  # fmt: skip
    tasks = json.dumps({"shared": shared, "jobs": runs})
    subprocess.run(
        [sys.executable, "-m", "saeflow", "train", tasks, f"--threads={THREADS}"],
        env=os.environ | {"SAEFLOW_RUNTIME": json.dumps(runtime())}, check=True, capture_output=True,
    )  # fmt: skip


def groups(project: Path) -> Iterator[dict[str, object]]:
    """Time of eight SAEs in one pass over that of eight runs, as commands and within one process."""
    store = open_store(project / STORE)
    for d_sae, batch_size, steps in SHAPES:
        configs = group_configs(d_sae, batch_size, steps)

        def trained(chosen: Sequence[Sequence[SAEConfig]], name: str) -> float:
            """Seconds of some passes in this process, checkpoints apart."""
            spent = 0.0
            for of_pass in chosen:
                folders = [Path(name) / config.name for config in of_pass]
                for folder in folders:
                    folder.mkdir(parents=True, exist_ok=True)
                runs = [
                    Run(store, config, runtime(), folder)
                    for config, folder in zip(of_pass, folders, strict=True)
                ]
                spent += seconds(advance, runs)
                for folder in folders:
                    delete_checkpoints(folder)
            return spent

        one_by_one = [[config] for config in configs]
        commands: list[float] = []
        steps_alone: list[float] = []
        with tempfile.TemporaryDirectory(dir=project / "results") as name:
            folder = Path(name)
            for _ in range(GROUP_REPEATS):
                if d_sae == SHAPES[0][0]:
                    separate = sum(seconds(command, project, run, folder) for run in one_by_one)
                    commands.append(seconds(command, project, configs, folder) / separate)
                steps_alone.append(trained([configs], name) / trained(one_by_one, name))
        shape = f"d_in {store.d_in}, d_sae {d_sae}, B {batch_size}, {steps} steps"
        if commands:
            yield {"what": f"one command / {GROUP} commands", "shape": shape, **spread(commands)}
        yield {"what": "their steps alone, in one process", "shape": shape, **spread(steps_alone)}


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
        raise SystemExit(
            f"{project / STORE}: no such store. Run `make bench`, or `make demo` first."
        )
    torch.set_num_threads(THREADS)
    keep_freed_memory()
    write(
        "training",
        {
            "From the store against in memory": pd.DataFrame(end_to_end(project)),
            f"{GROUP} TopK SAEs in one pass against {GROUP} runs": pd.DataFrame(groups(project)),
        },
        "From the store: the trainer with its loader and log; in memory: the same steps alone; a repeat is "
        "store, memory, memory, store. In one pass: k from 4 to 128, one seed, the batches of each step read once; "
        "a command starts Python, opens and checks the store, trains and writes the results.",
    )


if __name__ == "__main__":
    main()
