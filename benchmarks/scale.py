"""A store that is kept, cut into windows, or streamed: the disk's peak, the rate, and whether the SAEs are the same.

    python benchmarks/scale.py                     # 5 M rows in ten windows
    python benchmarks/scale.py --rows 500000 --out FOLDER

Each way is the whole workflow up to trained SAEs, in a folder of its own, on synthetic activations. A store of one window is
shuffled as a whole, so that its SAEs are others.
"""

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from tables import RESULTS, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "workflow"))

from conftest import SYNTHETIC, Project, Watch, on_disk

WINDOWS = 10
WINDOWED = "ten windows, kept (keep_windows: all)"
WAYS: dict[str, dict[str, Any]] = {
    "one window": {},
    WINDOWED: {"window_rows": True, "keep_windows": "all"},
    "ten windows, streamed (keep_windows: 2)": {"window_rows": True, "keep_windows": 2},
}


def parameters(rows: int, way: Mapping[str, Any]) -> dict[str, Any]:
    """Two SAEs that are trained on all rows once."""
    params = copy.deepcopy(SYNTHETIC)
    store: dict[str, Any] = {
        "train_rows": rows, "evaluation_rows": 4096, "chunk_rows": 4096, "shard_rows": 1 << 20, "block_contexts": 256,
    }  # fmt: skip
    if "window_rows" in way:
        store["window_rows"] = -(-rows // WINDOWS)
    if "keep_windows" in way:
        store["keep_windows"] = way["keep_windows"]
    params["stores"]["synthetic"] |= store
    params["complexity"] = {}
    params["training"] |= {"tokens": rows, "batch_size": 4096, "log_every_steps": 100}
    saes = params["saes"]
    params["saes"] = {"topk": saes["topk"] | {"options": {"k": 8}}, "relu": saes["relu"]}
    params["figures"]["names"] = ["fvu_l0"]
    params["runtime"] |= {"extraction_jobs": 1, "saes_per_job": 8, "checkpoint_every_s": 300}
    return params


def measure(folder: Path, rows: int, way: Mapping[str, Any]) -> dict[str, Any]:
    """Run the workflow up to trained SAEs."""
    project = Project(folder, parameters(rows, way), cold=True)  # as a user runs it
    project.timeout_s = 3600
    project.snakemake("inputs")
    (folder / "results/stores").mkdir(parents=True)
    watch = Watch(folder / "results/stores")
    watch.start()
    began = time.monotonic()
    project.snakemake("train")
    seconds = time.monotonic() - began
    peak = watch.end()
    contents = project.contents()
    saes = {name: content for name, content in contents.items() if name.startswith("results/saes/")}
    return {
        "peak": peak,
        "left": on_disk(folder / "results/stores"),
        "seconds": seconds,
        "saes": {name: content["weights"] for name, content in saes.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Disk and time of stores that are kept or streamed."
    )
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table")
    chosen = parser.parse_args()
    found = {}
    for name, way in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measure(Path(folder), chosen.rows, way)
        print(name, found[name], flush=True)
    whole, expected = found[WINDOWED]["left"], found[WINDOWED]["saes"]
    rows = [
        {
            "store": name,
            "disk at the peak, MB": round(one["peak"] / 1e6),
            "over the kept store": round(one["peak"] / whole, 2),
            "left, MB": round(one["left"] / 1e6),
            "extraction and training, s": round(one["seconds"]),
            "rows/s": round(chosen.rows / one["seconds"]),
            "SAEs of windows in order": "equal" if one["saes"] == expected else "others",
        }
        for name, one in found.items()
    ]
    write(
        "scale",
        {f"{chosen.rows:,} rows, two SAEs": pd.DataFrame(rows)},
        "Synthetic rows of width 32 in float32 with their columns (188 bytes a row); the disk is that of results/stores. Two SAEs "
        "of 128 latents in one pass. Every job of the workflow starts Python, which is most of the time of small windows.",
        chosen.out,
        f"scale.py --rows {chosen.rows}",
    )


if __name__ == "__main__":
    main()
