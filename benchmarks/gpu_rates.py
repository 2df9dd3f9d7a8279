"""Parts of `benchmarks/gpu.py`: rows a second of training from a store, and of extraction."""

import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_bench import Bench


def store_of(bench: Bench) -> Any:
    """Return a store of drawn rows on disk, made once."""
    from drawn import Drawn, write_drawn

    from saeflow.stores import open_store

    folder = bench.scratch / "drawn"
    if not folder.exists():
        folder.mkdir()
        case = bench.case("topk")
        rows = next(iter(replace(case, device="cpu").batches()))
        write_drawn(Drawn(bench.size.store_rows, bench.size.d_in, iter([rows])), folder)
    return open_store(folder / "store" / "drawn.zarr")


def loop(bench: Bench) -> list[dict[str, Any]]:
    """Compare training from a store on disk with the bare step, and the loader alone with both."""
    from with_saeflow import build, make_run

    from saeflow.stores.batches import on_device
    from saeflow.training.trainer import advance

    store, size = store_of(bench), bench.size
    case = bench.case("topk")
    work = build(case, case.batches())
    for _ in range(4):
        work()
    bare = bench.ms(work, 4 * size.repeats)
    del work
    folder = bench.scratch / "loop"
    folder.mkdir()
    run = make_run(bench.case("topk", steps=size.loop_steps), store, folder)
    advance([run])
    rates = [row["tokens_per_s"] for row in run.rows[1:]] or [run.rows[-1]["tokens_per_s"]]
    looped = size.batch / statistics.median(rates) * 1e3
    batches = on_device(store.batches(size.batch, 0, pin=bench.on_gpu), bench.device)
    next(batches)
    count, began = 0, time.perf_counter()
    while count < 10 or (time.perf_counter() - began < 2.0 and count < 2000):
        next(batches)
        count += 1
    bench.sync()
    loader = (time.perf_counter() - began) / count * 1e3
    rows = [("bare step", bare), ("loop from the store", looped), ("loader alone", loader)]
    return [
        {"what": what, "ms a batch": round(took, 3), "M rows/s": round(size.batch / took / 1e3, 2),
         "rate / bare step": round(bare / took, 2)} for what, took in rows
    ]  # fmt: skip


def groups(bench: Bench) -> list[dict[str, Any]]:
    """Compare a sweep of eight TopK SAEs of different k, one after the other, with one group of them."""
    from with_saeflow import make_run

    from saeflow.training.trainer import advance

    store, size = store_of(bench), bench.size
    ks = [max(1, size.k * step // 8) for step in range(4, 12)]
    d_sae = max(size.d_sae // 6, 8 * size.k)  # 4096 at the full size

    def runs() -> list[Any]:
        case = bench.case("topk", d_sae=d_sae, steps=size.loop_steps)
        folders = [Path(tempfile.mkdtemp(dir=bench.scratch)) for _ in ks]
        pairs = zip(ks, folders, strict=True)
        return [make_run(replace(case, k=k), store, folder) for k, folder in pairs]

    def seconds(parts: list[list[Any]]) -> float:
        bench.sync()
        began = time.perf_counter()
        for part in parts:
            advance(part)
        bench.sync()
        return time.perf_counter() - began

    advance(runs()[:1])  # warms up
    alone, together = seconds([[run] for run in runs()]), seconds([runs()])
    rows = {"eight runs": alone, "one group": together}
    steps = size.loop_steps
    return [
        {"what": f"{what}, d_sae {d_sae}, k {ks[0]}..{ks[-1]}", "s": round(took, 2),
         "ms a step of one SAE": round(took / steps / 8 * 1e3, 3), "/ eight runs": round(took / alone, 2)}
        for what, took in rows.items()
    ]  # fmt: skip


def disk_rate(folder: Path, writers: int) -> float:
    """Return the bytes a second that so many threads write to files, until they are on the disk."""
    block = os.urandom(1 << 25)

    def write(number: int) -> None:
        with (folder / f"plain-{number}").open("wb") as file:
            file.write(block)
            os.fsync(file.fileno())

    began = time.perf_counter()
    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(write, range(2 * writers)))
    return 2 * writers * len(block) / (time.perf_counter() - began)


def extraction(bench: Bench) -> list[dict[str, Any]]:
    """Compare extraction with the bare forward pass of the blocks it needs."""
    import numpy as np
    from transformers import GPT2Config, GPT2LMHeadModel

    from saeflow.sources import open_source
    from saeflow.sources.models import fetch_model
    from saeflow.stores import write_part

    size = bench.size
    blocks = 8 if bench.on_gpu else 1
    wide = {} if bench.on_gpu else {"n_embd": 64, "n_layer": 2, "n_head": 2}
    length, hook_point = 128, f"blocks.{blocks - 1}.resid_post"
    saved = bench.scratch / "gpt2"
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**wide)).save_pretrained(saved)
    ids = np.random.default_rng(0).integers(0, 50_000, (size.contexts, length)).astype(np.int32)
    layout = {
        "dtype": "bfloat16", "chunk_rows": 512, "shard_rows": 65536, "codec": "none",
        "block_contexts": size.forward_batch, "seed": 0,
    }  # fmt: skip
    rows = []
    for dtype in ("bfloat16", "float32") if bench.on_gpu else ("float32",):
        folder = bench.scratch / f"gpt2-{dtype}"
        for name in ("model", "inputs", "out"):
            (folder / name).mkdir(parents=True)
        fetch_model({"folder": str(saved), "dtype": dtype}, [hook_point], folder / "model")
        np.save(folder / "inputs" / "train.npy", ids)
        params = {
            "kind": "text", "hook_points": [hook_point], "context_length": length, "skip_first": False,
            "forward_batch": size.forward_batch, "model": {"folder": str(saved), "dtype": dtype},
        }  # fmt: skip
        source: Any = open_source(params, folder, str(bench.device))
        body = source.model.transformer
        kept, body.h = body.h, body.h[:blocks]
        given = torch.from_numpy(ids[: size.forward_batch].astype(np.int64)).to(bench.device)
        with torch.inference_mode():
            bare = bench.ms(lambda: body(input_ids=given, use_cache=False), 8)  # noqa: B023
        body.h = kept
        writers = min(16, os.cpu_count() or 1)
        write_part(source, "train", 0, 8, layout, folder / "out", writers)  # warms up
        began = time.perf_counter()
        write_part(source, "train", 1, 2, layout, folder / "out", writers)
        took = time.perf_counter() - began
        tokens = size.contexts // 2 * length
        began = time.perf_counter()
        for start in range(0, size.contexts // 2, size.forward_batch):
            source.block("train", start, start + size.forward_batch).wait()
        copied = tokens / (time.perf_counter() - began)
        rate, limit = tokens / took, size.forward_batch * length / bare * 1e3
        rows.append(
            {
                "dtype": dtype,
                "extraction, k tokens/s": round(rate / 1e3),
                "without writing": round(copied / 1e3),
                "bare forward": round(limit / 1e3),
                "ratio": round(rate / limit, 2),
                "GB/s written": round(rate * 2e-9 * source.model.config.n_embd, 2),
                "disk alone": round(disk_rate(folder, writers) / 1e9, 2),
            }
        )
        print(rows[-1], flush=True)
    return rows
