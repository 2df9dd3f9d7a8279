"""Rates of this machine for `saeflow plan`, from the results of the other benchmarks.

    python benchmarks/rates.py

Last of `make bench`; writes benchmarks/results/rates.yaml.
"""

import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch
import yaml
from tables import RESULTS

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from contestant import Case
from with_saeflow import build

from saeflow.config import ROOT, load_params
from saeflow.needs import one_pass
from saeflow.saes import VARIANTS
from saeflow.sources import english
from saeflow.sources.models import load_tokenizer

SOURCE = "smollm2"


def table(name: str, title: str) -> pd.DataFrame:
    """One table of a benchmark's results."""
    every = pd.read_csv(RESULTS / f"{name}.csv")
    return every[every["table"] == title].dropna(axis=1, how="all")


def forward_gflops() -> float:
    """Return the rate of the language model's extraction."""
    source = load_params(ROOT / "params.yaml")["sources"][SOURCE]
    one = one_pass(source, SOURCE, ROOT / "results")
    speed = table("extraction", "Speed").set_index("measure")["median"]
    return float(speed["tokens/s of the extraction"]) * one.flops / source["context_length"] / 1e9


def images_s() -> float:
    """Images decoded in a second, by `benchmarks/vision.py`."""
    each = table("vision", "Extraction").set_index("measure")["median"]
    (ms,) = each[each.index.str.contains("decoding to the model's size")]
    return 1000 / float(ms)


def tokens_s() -> float:
    """Tokens made of text in a second, by the language model's tokenizer, as sources are prepared."""
    tokenizer = load_tokenizer(ROOT / "results/sources" / SOURCE / "model")
    documents = english.documents("python")[:300]
    rates = []
    for _ in range(3):
        began = time.perf_counter()
        ids = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
        rates.append(sum(map(len, ids)) / (time.perf_counter() - began))
    return statistics.median(rates)


def job_s() -> float:
    """Seconds of a job that has nothing to do but to start."""
    command = [sys.executable, "-c", "import torch, transformers, saeflow.stores, saeflow.saes"]
    times = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run(command, check=True)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def step_s() -> float:
    """Seconds of a step of a TopK SAE so small that its products take next to no time, of a run from a store."""
    small = Case(
        variant="topk", d_in=16, d_sae=64, batch=64, k=4, density=0.0, dead=0.0, steps=2000, threads=1
    )  # fmt: skip
    torch.set_num_threads(small.threads)
    loop = build(small, small.batches())
    loop()  # kernels are compiled
    began = time.perf_counter()
    loop()
    return (time.perf_counter() - began) / small.steps


def steps() -> dict[str, dict[str, float]]:
    """By variant and d_sae: encoder products that our step costs."""
    every = table("steps", "Steps")
    ours = every[every["library"] == "saeflow"]
    return {
        variant: {str(int(row.d_sae)): float(row["encoder products"]) for _, row in rows.iterrows()}
        for variant, rows in ours.groupby("case")
        if variant in VARIANTS
    }


def main() -> None:
    limits = table("steps", "Limits of the machine")
    reads = table("stores", "Shuffled batches against a sequential read").set_index("read")["GB/s"]
    writes = pd.read_csv(RESULTS / "stores.csv")["write GB/s"].dropna()
    rates = {
        "machine": f"{os.cpu_count()} cores ({platform.machine()}), {datetime.date.today()}",
        "product_gflops": round(float(limits["product GFLOP/s"].median())),
        "forward_gflops": round(forward_gflops()),
        "images_s": round(images_s()),
        "tokens_s": float(f"{tokens_s():.2g}"),
        "store_read_gb_s": round(float(reads[reads.index.str.contains("first epoch")].iloc[0]), 2),
        "store_write_gb_s": round(float(writes.iloc[0]), 2),
        "job_s": round(job_s(), 1),
        "step_s": float(f"{step_s():.2g}"),
        "steps": steps(),
    }
    text = "# What `saeflow plan` counts with; by `python benchmarks/rates.py`.\n"
    text += yaml.safe_dump(rates, sort_keys=False)
    (RESULTS / "rates.yaml").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
