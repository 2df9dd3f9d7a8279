"""Everything that a GPU decides: limits, steps, the loop, the loader, extraction, a small path and the GPU tests.

    python benchmarks/gpu.py [--wheels FOLDER] [--device cuda]     (or `make bench-gpu WHEELS=FOLDER`)

Runs on a bare machine with torch, Triton and a GPU: no Snakemake, no DVC, no network. A Python package that is
missing is named; what does not need it is measured all the same. Peers are measured where FOLDER holds their
wheels. `--device cpu` runs the same script at toy sizes, to see that it works. At most about four minutes.
Written to benchmarks/results/gpu.md and .csv.
"""

import argparse
import gc
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NEEDED = {
    "numpy": "numpy", "pandas": "pandas", "zarr": "zarr", "numcodecs": "numcodecs", "donfig": "donfig",
    "google_crc32c": "google-crc32c", "safetensors": "safetensors", "yaml": "pyyaml", "jsonschema": "jsonschema",
    "transformers": "transformers", "tqdm": "tqdm", "scipy": "scipy", "sklearn": "scikit-learn", "typer": "typer",
}  # fmt: skip
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


@dataclass(frozen=True)
class Size:
    """The sizes of a run of this script."""

    d_in: int
    d_sae: int
    wide: int
    batch: int
    k: int
    repeats: int
    store_rows: int
    loop_steps: int
    contexts: int
    forward_batch: int


FULL = Size(768, 24_576, 49_152, 8192, 32, 20, 1 << 20, 400, 4096, 256)
TOY = Size(64, 512, 1024, 256, 8, 2, 1 << 13, 20, 16, 8)


def missing(modules: dict[str, str]) -> list[str]:
    """Return the packages whose modules are not installed."""
    return [
        package for module, package in modules.items() if importlib.util.find_spec(module) is None
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--wheels", type=Path, help="folder with wheels: of peers, of what is missing"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="*", help="parts to run: " + ", ".join(PARTS))
    return parser.parse_args()


def install(wheels: Path, target: Path) -> None:
    """Unpack wheels of a folder beside the machine's own packages."""
    found = sorted(str(path) for path in wheels.glob("*.whl"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--target",
        str(target),
    ]
    subprocess.run([*command, *found], check=True)
    sys.path.append(str(target))
    importlib.invalidate_caches()


class Bench:
    """One run of the script.

    Args:
        device: cuda, or cpu at toy sizes.
        scratch: a folder for stores and models.
        extra: folder of unpacked wheels, for processes of peers.
    """

    def __init__(self, device: str, scratch: Path, extra: Path | None) -> None:
        import torch

        self.torch, self.device, self.scratch, self.extra = (
            torch,
            torch.device(device),
            scratch,
            extra,
        )
        self.on_gpu = self.device.type == "cuda"
        self.size = FULL if self.on_gpu else TOY
        self.began = time.monotonic()
        self.product_ms = 0.0

    def sync(self) -> None:
        if self.on_gpu:
            self.torch.cuda.synchronize()

    def ms(self, work: Callable[[], object], repeats: int | None = None) -> float:
        """Return milliseconds of some work, the mean of repetitions that do not wait for one another."""
        count = repeats or self.size.repeats
        for _ in range(3):
            work()
        self.sync()
        began = time.perf_counter()
        for _ in range(count):
            work()
        self.sync()
        return (time.perf_counter() - began) / count * 1e3

    # Parts.

    def limits(self) -> list[dict[str, Any]]:
        """Measure what the card can do: products, a copy, readings of the scores."""
        torch, size = self.torch, self.size
        x, w = (torch.randn(n, size.d_in, device=self.device) for n in (size.batch, size.d_sae))
        out = torch.empty(size.batch, size.d_sae, device=self.device)
        again = torch.empty_like(out)
        x16, w16, out16 = x.bfloat16(), w.bfloat16(), out.bfloat16()
        flops = 2e-9 * size.batch * size.d_in * size.d_sae
        rows = []

        def add(what: str, work: Callable[[], object], amount: float, unit: str) -> float:
            took = self.ms(work)
            rows.append(
                {"limit": what, "ms": round(took, 3), "rate": round(amount / took, 1), "unit": unit}
            )
            return took

        self.product_ms = add(
            "product, bf16 (G)", lambda: torch.mm(x16, w16.t(), out=out16), flops, "TFLOP/s"
        )
        add("product, fp32", lambda: torch.mm(x, w.t(), out=out), flops, "TFLOP/s")
        add("copy of fp32 scores", lambda: again.copy_(out), 2e-6 * out.nbytes, "GB/s")
        add("read of bf16 scores", lambda: out16.amax(1), 1e-6 * out16.nbytes, "GB/s")
        if self.on_gpu:
            host = torch.empty(size.batch, size.d_in, dtype=torch.bfloat16, pin_memory=True)
            add(
                "batch over the bus, bf16",
                lambda: host.to(self.device, non_blocking=True),
                1e-6 * host.nbytes,
                "GB/s",
            )
        return rows

    def case(self, name: str, **changes: Any) -> Any:
        """Return what is asked of each library by a name."""
        from contestant import Case

        few = ("jumprelu", "gated", "relu, few active")
        size = self.size
        plain = Case(
            variant=name.removesuffix(", 10 % dead").removesuffix(", few active"), d_in=size.d_in, d_sae=size.d_sae,
            batch=size.batch, k=size.k, density=size.k / size.d_sae if name in few else 0.0,
            dead=0.1 if "dead" in name else 0.0, steps=0, threads=self.torch.get_num_threads(),
            device=str(self.device), precision="bf16", repeats=size.repeats,
        )  # fmt: skip
        return replace(plain, **changes)

    def steps(self) -> list[dict[str, Any]]:
        """Measure the step of every variant."""
        rows = []
        names: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in ASKED]
        names += [
            ("topk, 10 % dead", {}),
            ("topk", {"d_sae": self.size.wide}),
            ("topk", {"precision": "fp32"}),
        ]
        for name, changes in names:
            rows.append(self.row(name, self.case(name, **changes)))
            print(rows[-1], flush=True)
        return rows

    def row(self, name: str, case: Any) -> dict[str, Any]:
        """Measure one step."""
        from with_saeflow import build

        torch = self.torch
        row = {"step": name, "d_sae": case.d_sae, "precision": case.precision}
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if self.on_gpu else 0
        try:
            work = build(case, case.batches())
            for _ in range(4):  # kernels are compiled, graphs captured
                work()
            took = self.ms(work)
        except (
            Exception
        ) as error:  # the other steps are worth their measurement: a failure is a row that says so
            return row | {
                "problem": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            }
        product = self.product_ms * case.d_sae / self.size.d_sae
        row |= {
            "ms": round(took, 2),
            "G": round(took / product, 2),
            "at most": ASKED.get(name, "")
            if not (case.d_sae != self.size.d_sae or case.precision != "bf16")
            else "",
            "M rows/s": round(case.batch / took / 1e3, 2),
        }
        if self.on_gpu:
            peak = torch.cuda.max_memory_allocated() - before
            row |= {"peak GiB": round(peak / 2**30, 2), **self.profile(work)}
        return row

    def profile(self, work: Callable[[], object]) -> dict[str, Any]:
        """Count launches and waits of a step, and the time in which the GPU was busy."""
        from torch.profiler import ProfilerActivity, profile

        count = 5
        self.sync()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            for _ in range(count):
                work()
            self.sync()
        events = seen.key_averages()
        of_device = [
            e
            for e in events
            if e.self_device_time_total
            and "Optimizer.step" not in e.key
            and e.self_cpu_time_total == 0
        ]
        calls = {e.key: e.count for e in events}
        return {
            "busy ms": round(sum(e.self_device_time_total for e in of_device) / count / 1e3, 2),
            "launches": round(sum(calls.get(key, 0) for key in LAUNCHES) / count),
            "waits": round((sum(calls.get(key, 0) for key in WAITS) - 1) / count),
        }

    def peers(self) -> list[dict[str, Any]]:
        """Measure the same steps of other libraries, each in a process of its own."""
        rows = []
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(self.extra or ""), os.environ.get("PYTHONPATH", "")])
            ),
        }
        for peer, (module, packages) in PEERS.items():
            if importlib.util.find_spec(module) is None:
                rows.append(
                    {
                        "peer": peer,
                        "step": "",
                        "problem": f"not installed: give wheels of {', '.join(packages)}",
                    }
                )
                continue
            for name, offered in OF_PEERS.items():
                if peer not in offered:
                    continue
                script = HERE / "peers" / f"with_{peer.lower()}.py"
                asked = json.dumps(asdict(self.case(name))) + "\ngo\nend\n"
                done = subprocess.run(
                    [sys.executable, script],
                    input=asked,
                    capture_output=True,
                    text=True,
                    env=environment,
                    check=False,
                )
                answers = [
                    json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")
                ]
                if len(answers) < 2:
                    problem = " ".join(
                        (done.stderr.strip().splitlines() or ["no answer"])[-1].split()
                    )[:300]
                    rows.append({"peer": peer, "step": name, "problem": problem})
                else:
                    took = answers[1]["work"] * 1e3
                    rows.append(
                        {
                            "peer": peer,
                            "step": name,
                            "ms": round(took, 2),
                            "G": round(took / self.product_ms, 2),
                        }
                    )
                print(rows[-1], flush=True)
        return rows

    def store(self) -> Any:
        """Return a store of drawn rows on disk, made once."""
        from drawn import Drawn, write_drawn

        from saeflow.stores import open_store

        folder = self.scratch / "drawn"
        if not folder.exists():
            folder.mkdir()
            case = self.case("topk")
            rows = next(iter(replace(case, device="cpu").batches()))
            write_drawn(Drawn(self.size.store_rows, self.size.d_in, iter([rows])), folder)
        return open_store(folder / "store" / "drawn.zarr")

    def loop(self) -> list[dict[str, Any]]:
        """Compare training from a store on disk with the bare step, and the loader alone with both."""
        from with_saeflow import build, make_run

        from saeflow.stores.batches import on_device
        from saeflow.training.trainer import advance

        store, size = self.store(), self.size
        case = self.case("topk")
        work = build(case, case.batches())
        for _ in range(4):
            work()
        bare = self.ms(work, 4 * size.repeats)
        del work
        folder = self.scratch / "loop"
        folder.mkdir()
        run = make_run(self.case("topk", steps=size.loop_steps), store, folder)
        advance([run])
        rates = [row["tokens_per_s"] for row in run.rows[1:]] or [run.rows[-1]["tokens_per_s"]]
        looped = size.batch / statistics.median(rates) * 1e3
        batches = on_device(store.batches(size.batch, 0, pin=self.on_gpu), self.device)
        next(batches)
        count, began = 0, time.perf_counter()
        while count < 10 or (time.perf_counter() - began < 2.0 and count < 2000):
            next(batches)
            count += 1
        self.sync()
        loader = (time.perf_counter() - began) / count * 1e3
        rows = [("bare step", bare), ("loop from the store", looped), ("loader alone", loader)]
        return [
            {"what": what, "ms a batch": round(took, 3), "M rows/s": round(size.batch / took / 1e3, 2),
             "rate / bare step": round(bare / took, 2)} for what, took in rows
        ]  # fmt: skip

    def extraction(self) -> list[dict[str, Any]]:
        """Compare extraction with the bare forward pass of the blocks it needs."""
        import numpy as np
        from transformers import GPT2Config, GPT2LMHeadModel

        from saeflow.sources import open_source
        from saeflow.sources.models import fetch_model
        from saeflow.stores import write_part

        torch, size = self.torch, self.size
        blocks = 8 if self.on_gpu else 1
        wide = {} if self.on_gpu else {"n_embd": 64, "n_layer": 2, "n_head": 2}
        length, hook_point = 128, f"blocks.{blocks - 1}.resid_post"
        saved = self.scratch / "gpt2"
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(**wide)).save_pretrained(saved)
        ids = np.random.default_rng(0).integers(0, 50_000, (size.contexts, length)).astype(np.int32)
        layout = {
            "dtype": "bfloat16", "chunk_rows": 512, "shard_rows": 65536, "codec": "none",
            "block_contexts": size.forward_batch, "seed": 0,
        }  # fmt: skip
        rows = []
        for dtype in ("bfloat16", "float32") if self.on_gpu else ("float32",):
            folder = self.scratch / f"gpt2-{dtype}"
            for name in ("model", "inputs", "out"):
                (folder / name).mkdir(parents=True)
            fetch_model({"folder": str(saved), "dtype": dtype}, [hook_point], folder / "model")
            np.save(folder / "inputs" / "train.npy", ids)
            params = {
                "kind": "text", "hook_points": [hook_point], "context_length": length, "skip_first": False,
                "forward_batch": size.forward_batch, "model": {"folder": str(saved), "dtype": dtype},
            }  # fmt: skip
            source: Any = open_source(params, folder, str(self.device))
            body = source.model.transformer
            kept, body.h = body.h, body.h[:blocks]
            given = torch.from_numpy(ids[: size.forward_batch].astype(np.int64)).to(self.device)
            with torch.inference_mode():
                bare = self.ms(lambda: body(input_ids=given, use_cache=False), 8)  # noqa: B023
            body.h = kept
            writers = min(16, os.cpu_count() or 1)
            blocks_in_all = size.contexts // size.forward_batch
            write_part(
                source, "train", 0, blocks_in_all, layout, folder / "out", writers
            )  # warms up
            began = time.perf_counter()
            write_part(source, "train", 1, 2, layout, folder / "out", writers)
            took = time.perf_counter() - began
            rate, limit = (
                size.contexts // 2 * length / took,
                size.forward_batch * length / bare * 1e3,
            )
            rows.append(
                {
                    "dtype": dtype,
                    "extraction, k tokens/s": round(rate / 1e3),
                    "bare forward": round(limit / 1e3),
                    "ratio": round(rate / limit, 2),
                }
            )
            print(rows[-1], flush=True)
        return rows

    def path(self) -> list[dict[str, Any]]:
        """Train every variant briefly on the device and on the CPU, and measure both: they must agree."""
        from contestant import Case
        from with_saeflow import make_run, options_of

        from saeflow.evaluation.measure import measure_rows
        from saeflow.evaluation.rows import RowSelection, row_statistics
        from saeflow.saes import load
        from saeflow.training.trainer import advance

        selection = RowSelection(positions="all", norm_limit=None)
        store, rows = self.small_store(), []
        for variant in options_of(Case(**{**asdict(self.case("topk")), "k": 8, "d_sae": 512})):
            row: dict[str, Any] = {"variant": variant}
            for device in dict.fromkeys(("cpu", str(self.device))):
                case = Case(
                    variant=variant, d_in=64, d_sae=512, batch=256, k=8, density=0.0, dead=0.0, steps=60,
                    threads=self.torch.get_num_threads(), device=device, precision="fp32", repeats=1,
                )  # fmt: skip
                folder = Path(tempfile.mkdtemp(dir=self.scratch))
                try:
                    run = make_run(case, store, folder, lr=1e-3)
                    advance([run])
                    run.finish()
                    sae = load(folder).to(device)
                    statistics_ = row_statistics(store, selection, 1024, device)
                    found = measure_rows(sae, store, selection, statistics_, 1024, device).metrics
                    row |= {
                        f"FVU {device}": round(found["fvu"], 4),
                        f"L0 {device}": round(found["l0_mean"], 2),
                    }
                except Exception as error:  # the other variants are worth their run: a failure is a row that says so
                    row["problem"] = (
                        f"{device}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                    )
            rows.append(row)
            print(row, flush=True)
        return [self.in_the_loop(), *rows]

    def in_the_loop(self) -> dict[str, Any]:
        """Extract a small model's activations on the device and on the CPU, and splice them back unchanged."""
        import numpy as np
        from transformers import GPT2Config, GPT2LMHeadModel

        from saeflow.evaluation.splice import ModelInTheLoop, write_clean
        from saeflow.sources import open_source

        torch, hook_point, rows = self.torch, "blocks.2.mlp_out", {}
        folder = self.scratch / "tiny"
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=500, n_embd=64, n_layer=4, n_head=4))
        model.save_pretrained(folder / "model")
        (folder / "inputs").mkdir()
        ids = np.random.default_rng(0).integers(0, 500, (32, 64)).astype(np.int32)
        np.save(folder / "inputs" / "evaluation.npy", ids)
        params = {
            "kind": "text", "hook_points": [hook_point], "context_length": 64, "skip_first": True,
            "forward_batch": 8, "model": {"folder": str(folder / "model")},
        }  # fmt: skip
        row: dict[str, Any] = {"variant": "extraction, identity spliced"}
        for device in dict.fromkeys(("cpu", str(self.device))):
            source: Any = open_source(params, folder, device)
            block = source.block("evaluation", 0, 32)
            block.wait()
            rows[device] = block.activations[hook_point]
            clean = folder / f"clean-{device}"
            clean.mkdir()
            write_clean(params, folder, hook_point, rows[device].mean(0), 16, device, clean)
            loop = ModelInTheLoop(clean, folder / "model", device)
            metrics = loop.metrics(loop.sums(lambda x: x))
            row |= {
                f"CE {device}": round(metrics["ce_clean"], 5),
                f"rise {device}": round(metrics["ce_degradation"], 7),
            }
        both = list(rows.values())
        row["largest difference"] = f"{float((both[0] - both[-1]).abs().max()):.1e}"
        return row

    def small_store(self) -> Any:
        """Return a small store of sparse combinations of directions, so that there is something to learn."""
        from drawn import Drawn, write_drawn

        from saeflow.stores import open_store

        torch = self.torch
        generator = torch.Generator().manual_seed(0)
        features = torch.nn.functional.normalize(torch.randn(128, 64, generator=generator), dim=1)
        on = (torch.rand(8192, 128, generator=generator) < 0.05) * torch.rand(
            8192, 128, generator=generator
        )
        folder = self.scratch / "small"
        folder.mkdir()
        return open_store(write_drawn(Drawn(8192, 64, iter([on @ features + 0.1])), folder))

    def tests(self) -> list[dict[str, Any]]:
        """Run the tests that need a GPU."""
        if missing({"pytest": "pytest", "hypothesis": "hypothesis"}):
            return [{"tests": "not run", "result": "pytest or hypothesis is not installed"}]
        root = HERE.parent
        files = [
            path
            for path in sorted((root / "tests").rglob("test_*.py"))
            if "mark.gpu" in path.read_text()
        ]
        rows = []
        for file in files:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "-p", "no:cacheprovider", "--no-header", str(file)],
                cwd=root, capture_output=True, text=True, check=False,
            )  # fmt: skip
            lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
            problems = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
            rows.append(
                {
                    "tests": str(file.relative_to(root)),
                    "result": lines[-1],
                    "problem": "; ".join(problems)[:500],
                }
            )
            print(rows[-1], flush=True)
        return rows


PARTS = ("limits", "steps", "loop", "extraction", "path", "peers", "tests")


def described(bench: Bench) -> str:
    """Return the machine and the versions, for the head of the table."""
    torch = bench.torch
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
        sys.path[:0] = [str(HERE.parent / "src"), str(HERE), str(HERE / "peers")]
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
        bench = Bench(asked.device, scratch, extra)
        tables = {}
        for part in PARTS:
            if part != "limits" and asked.only and part not in asked.only:
                continue
            began = time.monotonic()
            try:
                found = getattr(bench, part)()
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
        if bench.on_gpu and not asked.only:
            from tables import write

            write("gpu", tables, described(bench))


if __name__ == "__main__":
    main()
