"""Parts of `benchmarks/gpu.py`: the limits of the card, every variant's step, and the steps of other libraries."""

import gc
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_bench import Bench

HERE = Path(__file__).parent
PEERS = {
    "SAELens": ("sae_lens", ["sae-lens", "transformer-lens"]),
    "dictionary_learning": ("dictionary_learning", ["dictionary-learning"]),
    "sparsify": ("sparsify", ["eai-sparsify", "simple-parsing", "natsort"]),
}
OF_PEERS = {
    "topk": ("SAELens", "dictionary_learning", "sparsify"),
    "batch_topk": ("SAELens", "dictionary_learning"),
    "matryoshka": ("SAELens", "dictionary_learning"),
    "jumprelu": ("SAELens", "dictionary_learning"),
    "relu": ("SAELens", "dictionary_learning"),
    "p_anneal": ("dictionary_learning",),
}
ASKED = {
    "topk": 4.2, "adaptive_k": 4.2, "batch_topk": 5, "matryoshka": 6, "jumprelu": 5, "gated": 5, "relu, few active": 5,
    "relu": 10, "p_anneal": 10, "soft_topk, narrow estimator": 6, "soft_topk": 9, "soft_topk, hot": 16, "sparsemax": 6,
    "sparsemax, mlp": 5,
}  # fmt: skip
"""Encoder products that a step may take at most, on an H200 at the full size."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaGraphLaunch",
)


def limits(bench: Bench) -> list[dict[str, Any]]:
    """Measure what the card can do: products, a copy, readings of the scores."""
    size = bench.size
    x, w = (torch.randn(n, size.d_in, device=bench.device) for n in (size.batch, size.d_sae))
    out = torch.empty(size.batch, size.d_sae, device=bench.device)
    again = torch.empty_like(out)
    x16, w16, out16 = x.bfloat16(), w.bfloat16(), out.bfloat16()
    flops = 2e-9 * size.batch * size.d_in * size.d_sae
    rows = []

    def add(what: str, work: Callable[[], object], amount: float, unit: str) -> float:
        took = bench.ms(work)
        rows.append(
            {"limit": what, "ms": round(took, 3), "rate": round(amount / took, 1), "unit": unit}
        )
        return took

    bench.product_ms = add(
        "product, bf16 (G)", lambda: torch.mm(x16, w16.t(), out=out16), flops, "TFLOP/s"
    )
    add("product, fp32", lambda: torch.mm(x, w.t(), out=out), flops, "TFLOP/s")
    add("copy of fp32 scores", lambda: again.copy_(out), 2e-6 * out.nbytes, "GB/s")
    add("read of bf16 scores", lambda: out16.amax(1), 1e-6 * out16.nbytes, "GB/s")
    if bench.on_gpu:
        host = torch.empty(size.batch, size.d_in, dtype=torch.bfloat16, pin_memory=True)
        add(
            "batch over the bus, bf16",
            lambda: host.to(bench.device, non_blocking=True),
            1e-6 * host.nbytes,
            "GB/s",
        )
    return rows


def steps(bench: Bench) -> list[dict[str, Any]]:
    """Measure the step of every variant."""
    rows = []
    names: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in ASKED]
    names += [
        ("topk, 10 % dead", {}),
        ("topk", {"d_sae": bench.size.wide}),
        ("topk", {"precision": "fp32"}),
    ]
    for name, changes in names:
        rows.append(row(bench, name, bench.case(name, **changes)))
        print(rows[-1], flush=True)
    return rows


def row(bench: Bench, name: str, case: Any) -> dict[str, Any]:
    """Measure one step."""
    from with_saeflow import build

    row = {"step": name, "d_sae": case.d_sae, "precision": case.precision}
    gc.collect()
    if bench.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if bench.on_gpu else 0
    try:
        work = build(case, case.batches())
        began = time.perf_counter()
        settle(work)
        bench.sync()
        first = time.perf_counter() - began
        took = bench.ms(work)
    except (
        Exception
    ) as error:  # the other steps are worth their measurement: a failure is a row that says so
        return row | {"problem": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    product = bench.product_ms * case.d_sae / bench.size.d_sae
    row |= {
        "ms": round(took, 2),
        "G": round(took / product, 2),
        "at most": ASKED.get(name, "")
        if not (case.d_sae != bench.size.d_sae or case.precision != "bf16")
        else "",
        "M rows/s": round(case.batch / took / 1e3, 2),
    }
    if bench.on_gpu:
        peak = torch.cuda.max_memory_allocated() - before
        row |= {"peak GiB": round(peak / 2**30, 2), **profile(bench, name, work)}
        row |= {"graph": "yes" if is_recorded(work) else "no", "first steps, s": round(first, 1)}
    return row


def settle(work: Any) -> None:
    """Take steps until their path and room are decided, kernels compiled and graphs captured."""
    run = work.run
    for _ in range(6):
        before = run.sae.dials()
        for _ in range(4):
            work()
        run.catch_up(is_all=True)
        if not getattr(
            run.sae, "density", 0
        ):  # where a case does not say how many latents are active
            run.sae.settle()
        if run.sae.dials() == before:
            break
    for _ in range(4):
        work()


def is_recorded(work: Any) -> bool:
    """Return whether a step is launched as one CUDA graph."""
    replayed = work.run.replayed
    return replayed is not None and replayed.recorded is not None


def profile(bench: Bench, name: str, work: Callable[[], object]) -> dict[str, Any]:
    """Count launches and waits of a step, and the time in which the GPU was busy; list its kernels if asked."""
    from torch.profiler import ProfilerActivity, profile

    count = 5
    bench.sync()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(count):
            work()
        bench.sync()
    events = seen.key_averages()
    of_device = [
        e
        for e in events
        if e.self_device_time_total and "Optimizer.step" not in e.key and e.self_cpu_time_total == 0
    ]
    calls = {e.key: e.count for e in events}
    if bench.kernels is not None:
        with bench.kernels.open("a") as file:
            print(f"\n== {name}: ms a step, launches a step, kernel", file=file)
            for e in sorted(of_device, key=lambda e: -e.self_device_time_total):
                ms = e.self_device_time_total / count / 1e3
                print(f"{ms:9.4f} {e.count / count:7.1f}  {e.key[:150]}", file=file)
    return {
        "busy ms": round(sum(e.self_device_time_total for e in of_device) / count / 1e3, 2),
        "launches": round(sum(calls.get(key, 0) for key in LAUNCHES) / count),
        "waits": round((sum(calls.get(key, 0) for key in WAITS) - 1) / count),
    }


def peers(bench: Bench) -> list[dict[str, Any]]:
    """Measure the same steps of other libraries, each library in a process of its own."""
    rows, processes = [], {}
    for peer, (module, packages) in PEERS.items():
        if importlib.util.find_spec(module) is None:
            problem = f"not installed: give wheels of {', '.join(packages)}"
            rows.append({"peer": peer, "step": "", "problem": problem})
            continue
        script = HERE / "peers" / f"with_{peer.lower()}.py"
        processes[peer] = subprocess.Popen(  # which import side by side, and wait for what is asked
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=bench.environment(),
        )  # fmt: skip
    for peer, process in processes.items():
        names = [name for name, offered in OF_PEERS.items() if peer in offered]
        asked = [json.dumps(asdict(bench.case(name))) + "\ngo\nend\n" for name in names]
        told, failed = process.communicate("".join(asked))
        answers = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
        for place, name in enumerate(names):
            row = {"peer": peer, "step": name}
            found = answers[2 * place : 2 * place + 2]  # the peak of memory, then the times
            if len(found) == 2:
                took = found[1]["work"] * 1e3
                row |= {"ms": round(took, 2), "G": round(took / bench.product_ms, 2)}
            else:
                row["problem"] = " ".join(failed.strip().splitlines()[-1:])[:300] or "no answer"
            rows.append(row)
            print(row, flush=True)
    return rows
