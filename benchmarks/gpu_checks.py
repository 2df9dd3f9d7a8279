"""Parts of `benchmarks/gpu.py`: whether a small path and the tests give on the GPU what they give on a CPU."""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_bench import Bench
from gpu_needs import missing

ROOT = Path(__file__).parents[1]


def path(bench: Bench) -> list[dict[str, Any]]:
    """Train every variant briefly on the device and on the CPU, and measure both: they must agree."""
    from contestant import Case
    from with_saeflow import make_run, options_of

    from saeflow.evaluation.measure import measure_rows
    from saeflow.evaluation.rows import EvaluatedRows, RowSelection
    from saeflow.saes import load
    from saeflow.training.trainer import advance

    torch.set_num_threads(
        1
    )  # of small products; on a CPU with many cores more only wait for each other
    if bench.runs_tests:
        start_tests(bench)  # both are checks, not timings, and wait for compilers
    selection = RowSelection(positions="all", norm_limit=None)
    store, rows = small_store(bench), []
    for variant in options_of(Case(**{**asdict(bench.case("topk")), "k": 8, "d_sae": 512})):
        row: dict[str, Any] = {"variant": variant}
        for device in dict.fromkeys(("cpu", str(bench.device))):
            case = Case(
                variant=variant, d_in=64, d_sae=512, batch=256, k=8, density=0.0, dead=0.0, steps=60,
                threads=1, device=device, precision="fp32", repeats=1,
            )  # fmt: skip
            folder = Path(tempfile.mkdtemp(dir=bench.scratch))
            try:
                run = make_run(case, store, folder, lr=1e-3)
                advance([run])
                run.finish()
                sae = load(folder).to(device)
                evaluated = EvaluatedRows(store, selection, 1024, device)
                found = measure_rows(sae, evaluated).metrics
                row |= {
                    f"FVU {device}": round(found["fvu"], 4),
                    f"L0 {device}": round(found["l0_mean"], 2),
                }
            except (
                Exception
            ) as error:  # the other variants are worth their run: a failure is a row that says so
                row["problem"] = (
                    f"{device}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                )
        rows.append(row)
        print(row, flush=True)
    return [in_the_loop(bench), *rows]


def in_the_loop(bench: Bench) -> dict[str, Any]:
    """Extract a small model's activations on the device and on the CPU, and splice them back unchanged."""
    import numpy as np
    from transformers import GPT2Config, GPT2LMHeadModel

    from saeflow.evaluation.in_model.text import NextTokens, write_clean
    from saeflow.sources import open_source

    hook_point, rows = "blocks.2.mlp_out", {}
    folder = bench.scratch / "tiny"
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=500, n_embd=64, n_layer=4, n_head=4))
    model.save_pretrained(folder / "model")
    (folder / "inputs").mkdir()
    ids = np.random.default_rng(0).integers(0, 500, (32, 64)).astype(np.int32)
    np.save(folder / "inputs" / "evaluation.npy", ids)
    np.save(folder / "inputs" / "evaluation_documents.npy", np.arange(len(ids), dtype=np.int32))
    params = {
        "kind": "text", "hook_points": [hook_point], "context_length": 64, "skip_first": True,
        "forward_batch": 8, "model": {"folder": str(folder / "model")},
    }  # fmt: skip
    row: dict[str, Any] = {"variant": "extraction, identity spliced"}
    for device in dict.fromkeys(("cpu", str(bench.device))):
        source: Any = open_source(params, folder, device)
        block = source.block("evaluation", 0, 32)
        block.wait()
        rows[device] = block.activations[hook_point]
        clean = folder / f"clean-{device}"
        clean.mkdir()
        mean = rows[device].mean(0)
        write_clean(params, folder, hook_point, mean, {"ce_contexts": 16}, {}, device, clean)
        loop = NextTokens(clean, folder / "model", device)
        metrics = loop.metrics(loop.sums(lambda x: x))
        row |= {
            f"CE {device}": round(metrics["ce_clean"], 5),
            f"rise {device}": round(metrics["ce_degradation"], 7),
        }
    both = list(rows.values())
    row["largest difference"] = f"{float((both[0] - both[-1]).abs().max()):.1e}"
    return row


def small_store(bench: Bench) -> Any:
    """Return a small store of sparse combinations of directions, so that there is something to learn."""
    from drawn import Drawn, write_drawn

    from saeflow.stores import open_store

    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(128, 64, generator=generator), dim=1)
    on = (torch.rand(8192, 128, generator=generator) < 0.05) * torch.rand(
        8192, 128, generator=generator
    )
    folder = bench.scratch / "small"
    folder.mkdir()
    return open_store(write_drawn(Drawn(8192, 64, iter([on @ features + 0.1])), folder))


def tests(bench: Bench) -> list[dict[str, Any]]:
    """Run the tests that need a GPU."""
    if missing({"pytest": "pytest", "hypothesis": "hypothesis"}):
        return [{"tests": "not run", "result": "pytest or hypothesis is not installed"}]
    start_tests(bench)
    return [test.result() for test in bench.tests]


def start_tests(bench: Bench) -> None:
    """Begin to run each file of tests in a process of its own, some at a time, unless that was done."""
    if bench.tests or missing({"pytest": "pytest", "hypothesis": "hypothesis"}):
        return
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    on_gpu = [f for f in files if "mark.gpu" in f.read_text() or f.parent.name == "gpu"]
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    bench.tests = [pool.submit(run_tests, bench, file) for file in on_gpu]


def run_tests(bench: Bench, file: Path) -> dict[str, Any]:
    """Run the tests of a file that need a GPU."""
    environment = bench.environment()
    environment["PYTHONPATH"] += os.pathsep + str(ROOT / "src")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--maxfail=5", "-m", "gpu", "-p", "no:cacheprovider", "--no-header", str(file)],
        cwd=ROOT, capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    problems = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
    row = {
        "tests": str(file.relative_to(ROOT)),
        "result": lines[-1],
        "problem": "; ".join(problems)[:500],
    }
    print(row, flush=True)
    return row
