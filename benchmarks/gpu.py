"""Everything that a GPU decides: limits, steps, the loop, the loader, extraction, a small path and the GPU tests.

    python benchmarks/gpu.py [--wheels FOLDER] [--device cuda] [--kernels FILE]     (or `make bench-gpu WHEELS=FOLDER`)

Runs on a bare machine with torch, Triton and a GPU: no Snakemake, no DVC, no network. A Python package that is
missing is named; what does not need it is measured all the same. Peers are measured where FOLDER holds their
wheels. `--device cpu` runs the same script at toy sizes, to see that it works. At most about four minutes.
Written to benchmarks/results/gpu.md and .csv.
"""

import argparse
import importlib
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE), str(HERE / "peers")]
from gpu_needs import NEEDED, install, missing  # noqa: E402

if TYPE_CHECKING:
    from gpu_bench import Bench

PARTS = {
    "limits": "gpu_steps", "steps": "gpu_steps", "peers": "gpu_steps", "loop": "gpu_rates", "groups": "gpu_rates",
    "extraction": "gpu_rates", "path": "gpu_checks", "tests": "gpu_checks",
}  # fmt: skip
"""In this order, each a function of its name in a module beside this one."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--wheels", type=Path, help="folder with wheels: of peers, of what is missing"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--kernels", type=Path, help="file to list every step's kernels in, with their times"
    )
    parser.add_argument("--only", nargs="*", help="parts to run: " + ", ".join(PARTS))
    return parser.parse_args()


def described(bench: "Bench") -> str:
    """Return the machine and the versions, for the head of the table."""
    import torch

    card = torch.cuda.get_device_name() if bench.on_gpu else "no GPU, toy sizes"
    triton = importlib.util.find_spec("triton")
    version = __import__("triton").__version__ if triton else "none"
    size = bench.size
    return (
        f"{card}, {os.cpu_count()} cores, triton {version}; d_in {size.d_in}, d_sae {size.d_sae}, B {size.batch}, k {size.k}, "
        f"bf16 unless said; G is one encoder product of the step's shape in bf16; {time.monotonic() - bench.began:.0f} s in all."
    )


def main() -> None:
    asked = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        scratch, extra = Path(temporary), None
        if asked.wheels is not None:
            extra = scratch / "packages"
            install(asked.wheels, extra)
        if lacking := missing({"torch": "torch", **NEEDED}):
            sys.exit(
                f"error: not installed: {', '.join(lacking)}. Install them, or give their wheels with --wheels FOLDER."
            )
        import pandas as pd
        import torch

        if asked.device.startswith("cuda") and not torch.cuda.is_available():
            sys.exit(
                "error: torch sees no GPU. Run this where there is one, or with --device cpu to try the script."
            )
        from gpu_bench import Bench

        bench = Bench(asked.device, scratch, extra, asked.kernels)
        bench.runs_tests = not asked.only or "tests" in asked.only
        tables = {}
        for part, module in PARTS.items():
            if part != "limits" and asked.only and part not in asked.only:
                continue
            began = time.monotonic()
            try:
                found = getattr(importlib.import_module(module), part)(bench)
            except (
                Exception
            ) as error:  # the other parts are worth their run: a failure is a table that says so
                found = [
                    {"problem": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
                ]
            tables[part.capitalize()] = pd.DataFrame(found).astype(object).fillna("")
            print(
                f"{part}: {time.monotonic() - began:.0f} s\n{tables[part.capitalize()].to_string(index=False)}\n",
                flush=True,
            )
            if (
                bench.on_gpu and not asked.only
            ):  # after each part: a run that is cut off has told something
                from tables import write

                write("gpu", tables, described(bench))


if __name__ == "__main__":
    main()
