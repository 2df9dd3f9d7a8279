"""Extraction against the bare truncated forward pass, and its memory against the size of the store.

    python benchmarks/extraction.py [PROJECT]

Reads the demo's language model (`make demo` first), under results/ of the project. Bare pass and extraction
run in turns over the same contexts, in one process. Written to benchmarks/results/extraction.md and .csv.
"""

import copy
import multiprocessing
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from drawn import PARAMS, STORE, Drawn
from tables import in_turns, peak_memory, project_of, ratio, write
from torch import nn

from saeflow.config import load_params
from saeflow.sources import open_source
from saeflow.sources.hook_points import HookPoint
from saeflow.stores import finalise, write_part

SOURCE = "smollm2"
TURNS = 8
BLOCK_CONTEXTS = 16
MEMORY_ROWS = (1 << 17, 1 << 19, 1 << 21)
D_IN = 128


def truncated(model: nn.Module, blocks: int) -> nn.Module:
    """The decoder of a Llama-like model with its first blocks only, sharing the weights."""
    decoder: Any = copy.copy(model.get_submodule("model"))
    decoder._modules = dict(decoder._modules)
    decoder.layers = decoder.layers[:blocks]
    decoder.norm = nn.Identity()
    return decoder


def speed(project: Path) -> pd.DataFrame:
    """Rate of `write_part`, all it does included, over that of the model alone."""
    params = load_params(project / "params.yaml")
    source: Any = open_source(
        params["sources"][SOURCE], project / "results" / "sources" / SOURCE, "cpu"
    )
    store = {**params["stores"][SOURCE], "block_contexts": BLOCK_CONTEXTS}
    last = max(HookPoint.parse(name).block for name in source.hook_points)
    bare = truncated(source.model, last + 1)
    parts = -(-source.n_contexts("train") // BLOCK_CONTEXTS)
    tokens = torch.from_numpy(source.inputs("train").astype(np.int64))
    blocks = iter(range(TURNS + 1))

    @torch.inference_mode()
    def forward(block: int) -> None:
        contexts = tokens[block * BLOCK_CONTEXTS : (block + 1) * BLOCK_CONTEXTS]
        for ids in contexts.split(source.forward_batch):
            bare(input_ids=ids, use_cache=False)

    times: dict[str, list[float]] = {"forward": [], "extract": []}
    with tempfile.TemporaryDirectory(dir=project / "results") as folder:
        forward(next(blocks))
        for block in blocks:
            works = {
                "forward": partial(forward, block),
                "extract": partial(write_part, source, "train", block, parts, store, Path(folder)),
            }
            for name in sorted(works, reverse=block % 2 == 0):
                times[name] += in_turns({name: works[name]}, 1)[name]
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    tokens_per_block = BLOCK_CONTEXTS * tokens.shape[1]
    ratios = [a / b for a, b in zip(times["forward"], times["extract"], strict=True)]
    return pd.DataFrame(
        [
            {
                "measure": "extraction / bare truncated forward (rate)",
                "median": round(ratio(times["forward"], times["extract"]), 3),
                "smallest": round(min(ratios), 3),
                "largest": round(max(ratios), 3),
                "turns": len(ratios),
            },
            {
                "measure": "tokens/s of the extraction",
                "median": round(tokens_per_block / statistics.median(times["extract"])),
                "smallest": round(tokens_per_block / max(times["extract"])),
                "largest": round(tokens_per_block / min(times["extract"])),
                "turns": len(ratios),
            },
            {
                "measure": "MB written per turn",
                "median": round(size / len(ratios) / 1e6, 1),
                "smallest": "",
                "largest": "",
                "turns": len(ratios),
            },
        ]
    )


def extract(rows: int, folder: Path) -> tuple[float, float, float, float]:
    """Seconds and MiB at the peak of write_part and of finalise, in a fresh process."""
    torch.set_num_threads(1)
    for name in ("part", "store"):
        (folder / name).mkdir()
    began = time.perf_counter()
    write_mib = peak_memory(
        lambda: write_part(Drawn(rows, D_IN), "train", 0, 1, STORE, folder / "part")
    )
    written = time.perf_counter()
    merge_mib = peak_memory(
        lambda: finalise([folder / "part"], "drawn", PARAMS, "train", STORE, {}, folder / "store")
    )
    return written - began, time.perf_counter() - written, write_mib, merge_mib


def memory(project: Path) -> pd.DataFrame:
    """Peak memory of extracting and merging stores of several sizes."""
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for count in MEMORY_ROWS:
            with tempfile.TemporaryDirectory(dir=project / "results") as folder:
                write_s, merge_s, write_mib, merge_mib = pool.apply(extract, (count, Path(folder)))
            rows.append(
                {
                    "rows": count,
                    "store MiB": round(count * D_IN * 2 / 2**20),
                    "write_part peak MiB": round(write_mib, 1),
                    "finalise peak MiB": round(merge_mib, 1),
                    "write_part rows/s": round(count / write_s),
                    "finalise rows/s": round(count / merge_s),
                }
            )
    return pd.DataFrame(rows)


def main() -> None:
    project = project_of(Path(sys.argv[1]) if len(sys.argv) > 1 else None, SOURCE)
    sizes = memory(project)
    rates = speed(project)
    write(
        "extraction",
        {"Speed": rates, "Memory": sizes},
        f"Speed: {SOURCE}, {BLOCK_CONTEXTS} contexts a turn, the medians of single turns' ratios. Memory: "
        f"random rows of width {D_IN}, bfloat16, blocks of 8192 rows, each size in a fresh process.",
    )


if __name__ == "__main__":
    main()
