"""Evaluating several SAEs of one source: one pass of the model for all of them, and memory as the split grows.

    python benchmarks/evaluation.py

A language model of random weights is read from, and spliced into, at half of its depth. Written to
benchmarks/results/evaluation.md and .csv.
"""

import dataclasses
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from drawn import Drawn, write_drawn
from tables import in_turns, peak_memory, ratio, write
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import LlamaConfig, LlamaForCausalLM

from saeflow.batch import Batch
from saeflow.evaluation.evaluate import measure
from saeflow.evaluation.in_model import text
from saeflow.evaluation.in_model.text import NextTokens, write_clean
from saeflow.evaluation.interpret import _read
from saeflow.evaluation.setup import Folders, Setup
from saeflow.files import file_digest
from saeflow.saes import build
from saeflow.sources.hook_points import splice as spliced
from saeflow.sources.models import load_model

LAYERS, WIDTH, VOCABULARY = 12, 256, 16_384
HOOK_POINT, BELOW = "blocks.5.resid_post", 6  # blocks whose output the replacement does not change
CONTEXTS, LENGTH, BATCH = 4, 128, 2
SAES = (1, 2, 4, 8)
SHARED, APART = "one clean side", "each on its own"
TURNS = 4
SOURCE = {"skip_first": False, "forward_batch": BATCH}

BASELINE, MEASURED = 8192, (65_536, 262_144, 1_048_576)
NARROW = 64  # width of the rows whose number grows
READ = 6000  # rows that probes and scorers see
EVALUATION = {
    "batch_size": 1024, "skip_first": True, "max_norm_multiple": 10, "dimension": None, "contexts_listed": 300,
    "bootstrap": {"resamples": 1000, "seed": 0},
}  # fmt: skip

JOB_ROWS, JOB_SAE, JOB_CONTEXTS = 10_240, 1536, 12  # as of the demo's language model
SMOLLM2 = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
JOB_HOOK_POINT = "blocks.19.resid_post"


def language_model(shape: Mapping[str, Any], contexts: int, folder: Path) -> None:
    """The folder of a source: a Llama of random weights, and tokens for it."""
    torch.manual_seed(0)
    (folder / "inputs").mkdir(parents=True)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    random = np.random.default_rng(0)
    tokens = random.integers(0, shape["vocab_size"], (contexts, LENGTH)).astype(np.int32)
    np.save(folder / "inputs" / "evaluation.npy", tokens)


def adaptive(d_in: int, d_sae: int, seed: int = 0) -> Any:
    """A SoftSAE, whose k differs by row, as it is initialised."""
    options = {
        "k": 32, "k_schedule": {"kind": "constant"}, "k_max": 64.0, "estimator_width": 64, "alpha": 0.1,
        "alpha_schedule": {"kind": "constant"}, "budget_weight": 1.0, "hard_fraction": 0.1,
        "hard_phase": "full", "auxk_weight": 0.0,
    }  # fmt: skip
    sae = build("soft_topk", d_in, d_sae, options)
    generator = torch.Generator().manual_seed(seed)
    sae.initialise(Batch.of(torch.randn(512, d_in, generator=generator)), generator)
    return sae.eval()


# One pass of the model.


@torch.inference_mode()
def on_its_own(model: Any, tokens: Tensor, mean: Tensor, sae: Any) -> dict[str, float]:
    """An SAE's metrics from four whole forward passes: clean, mean, zero, and with the SAE."""
    replacements: dict[str, Callable[[Tensor], Tensor] | None] = {
        "clean": None, "mean": lambda x: mean.expand_as(x), "zero": torch.zeros_like, "spliced": sae.forward,
    }  # fmt: skip
    sums = dict.fromkeys((*replacements, "kl"), 0.0)
    for batch in tokens.split(BATCH):
        scores = {}
        for name, replace in replacements.items():
            if replace is None:
                found = model(batch, use_cache=False).logits
            else:
                with spliced(model, HOOK_POINT, replace):
                    found = model(batch, use_cache=False).logits
            found = log_softmax(found[:, :-1].flatten(0, 1), dim=1)
            sums[name] += float(cross_entropy(found, batch[:, 1:].flatten(), reduction="sum"))
            if name in ("clean", "spliced"):
                scores[name] = found
        divergence = kl_div(scores["spliced"], scores["clean"], reduction="sum", log_target=True)
        sums["kl"] += float(divergence)
    mean_of = {name: total / (len(tokens) * (LENGTH - 1)) for name, total in sums.items()}
    return {f"ce_{name}": value for name, value in mean_of.items() if name != "kl"} | {
        "kl": mean_of["kl"]
    }


@contextmanager
def counting(model: Any) -> Iterator[list[int]]:
    """Count the calls of each block; one that is skipped does not call its MLP."""
    runs = [0] * LAYERS

    def count(block: int, *_: Any) -> None:
        runs[block] += 1

    handles = [
        block.mlp.register_forward_hook(partial(count, number))
        for number, block in enumerate(model.model.layers)
    ]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


def one_pass(root: Path) -> dict[str, pd.DataFrame]:
    """Measure n SAEs in whole forward passes, and count the runs of each block."""
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": LAYERS, "num_attention_heads": 8, "initializer_range": 0.06,
    }  # fmt: skip
    folder = root / "model"
    language_model(shape, CONTEXTS, folder)
    model = load_model(folder / "model", "cpu")
    text.load_model = lambda *_: model  # loading is measured by itself
    tokens = torch.from_numpy(np.load(folder / "inputs" / "evaluation.npy")).long()
    mean = torch.full((WIDTH,), 0.01)
    saes = [adaptive(WIDTH, 8 * WIDTH, seed) for seed in range(max(SAES))]
    runs: dict[tuple[str, int], list[int]] = {}
    metrics: dict[str, dict[str, float]] = {}

    @torch.inference_mode()
    def forward() -> None:
        for batch in tokens.split(BATCH):
            model(batch, use_cache=False)

    def shared(count: int) -> None:
        with counting(model) as ran, tempfile.TemporaryDirectory(dir=root) as out:
            write_clean(
                SOURCE, folder, HOOK_POINT, mean, {"ce_contexts": CONTEXTS}, {}, "cpu", Path(out)
            )
            loop = NextTokens(Path(out), folder / "model", "cpu")
            for sae in saes[:count]:
                metrics[SHARED] = loop.metrics(loop.sums(sae.forward))
        runs[SHARED, count] = ran

    def apart(count: int) -> None:
        with counting(model) as ran:
            for sae in saes[:count]:
                metrics[APART] = on_its_own(model, tokens, mean, sae)
        runs[APART, count] = ran

    works: dict[Any, Callable[[], None]] = {"forward": forward}
    for way, work in ((SHARED, shared), (APART, apart)):
        works |= {(way, n): partial(work, n) for n in SAES}
        work(1)
    check(metrics)
    times = in_turns(works, TURNS, time.process_time)  # one thread: others' work changes it little
    check(metrics)
    unit, most = times["forward"], max(SAES)
    lines = []
    for n in SAES:
        line: dict[str, Any] = {"SAEs": n}
        for way in (SHARED, APART):
            line[f"{way}, forwards"] = f"{ratio(times[way, n], unit):.1f}"
        line["times as fast"] = f"{ratio(times[APART, n], times[SHARED, n]):.1f}"
        lines.append(line)
    more = {"SAEs": "each further one"}
    for way in (SHARED, APART):
        further = [
            (last - first) / (most - 1)
            for last, first in zip(times[way, most], times[way, 1], strict=True)
        ]
        more[f"{way}, forwards"] = f"{ratio(further, unit):.1f}"
    lines.append(more | {"times as fast": ""})
    counts = [
        {
            "way": way,
            "SAEs": n,
            f"runs of each of blocks 0 to {BELOW - 1}": spread(runs[way, n][:BELOW]),
            f"of each of blocks {BELOW} to {LAYERS - 1}": spread(runs[way, n][BELOW:]),
        }
        for way in (SHARED, APART)
        for n in SAES
    ]
    return {"Time": pd.DataFrame(lines), "Runs of the model's blocks": pd.DataFrame(counts)}


def check(metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Both ways measure the same."""
    for name, value in metrics[APART].items():
        np.testing.assert_allclose(metrics[SHARED][name], value, rtol=1e-4, err_msg=name)


def spread(runs: list[int]) -> str:
    """Return the runs of each block per context, one number where all agree."""
    each = sorted({number * BATCH // CONTEXTS for number in runs})
    return " to ".join(str(number) for number in dict.fromkeys((each[0], each[-1])))


# Memory.


def setup_of(rows: int, d_in: int, results: Path) -> Setup:
    """A setup whose training split is its evaluation split, of drawn rows."""
    place = results / "stores" / "drawn"
    place.mkdir(parents=True)
    write_drawn(Drawn(rows, d_in), results)
    (results / "store").rename(place / "evaluation")
    (place / "train").symlink_to(place / "evaluation")
    folders = Folders(train=place / "train", held_out=place / "evaluation")
    return Setup(folders, "drawn", "drawn", EVALUATION, "cpu")


def peaks(rows: int) -> tuple[float, float]:
    """MiB by which a whole measurement of an SAE, and reading rows for probes, raise the memory at most."""
    torch.set_num_threads(1)
    sae = adaptive(NARROW, 4 * NARROW)
    with tempfile.TemporaryDirectory() as root, torch.inference_mode():
        small = setup_of(BASELINE, NARROW, Path(root) / "small")
        setup = setup_of(rows, NARROW, Path(root) / "large")
        _read(sae, small.rows, {}, EVALUATION["batch_size"])  # loads, compiles
        reading = peak_memory(lambda: _read(sae, setup.rows, {}, READ))
        measure(small, sae, is_trained=True)
        measuring = peak_memory(lambda: measure(setup, sae, is_trained=True))
    return measuring, reading


def memory() -> pd.DataFrame:
    """Peaks by number of rows, each in a fresh process."""
    lines = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for rows in MEASURED:
            measuring, reading = pool.apply(peaks, (rows,))
            lines.append(
                {
                    "rows": rows,
                    "store, MiB": round(rows * NARROW * 2 / 2**20),
                    "measuring an SAE, peak MiB": f"{measuring:.0f}",
                    f"reading {READ} rows for probes, peak MiB": f"{reading:.0f}",
                }
            )
    return pd.DataFrame(lines)


# A job.


def job(root: Path) -> pd.DataFrame:
    """Time one evaluation job by part; all parts but the last two are the same for another SAE."""
    folder = root / "smollm2"
    language_model(SMOLLM2, JOB_CONTEXTS, folder)
    setup = setup_of(JOB_ROWS, SMOLLM2["hidden_size"], root / "rows")
    sae = adaptive(SMOLLM2["hidden_size"], JOB_SAE)
    model = load_model(folder / "model", "cpu")
    clean = folder / "clean"
    clean.mkdir()
    text.load_model = lambda *_: model
    mean = torch.zeros(SMOLLM2["hidden_size"])
    write_clean(
        SOURCE, folder, JOB_HOOK_POINT, mean, {"ce_contexts": JOB_CONTEXTS}, {}, "cpu", clean
    )
    loop = NextTokens(clean, folder / "model", "cpu")
    weights = folder / "model" / "model.safetensors"
    imports = "import saeflow.cli, saeflow.evaluation, saeflow.saes, transformers; transformers.LlamaForCausalLM"
    works = {
        "starting Python, importing": partial(subprocess.run, [sys.executable, "-c", imports], check=True),
        "checking the model's SHA-256": partial(file_digest, weights),
        "loading the model": partial(load_model, folder / "model", "cpu"),
        "mean of the rows": lambda: dataclasses.replace(setup.rows).statistics,  # a copy has read nothing yet
        "this SAE: its activations": partial(measure, setup, sae, is_trained=True),
        "this SAE: the model in the loop": partial(loop.sums, sae.forward),
    }  # fmt: skip
    works["this SAE: its activations"]()
    times = in_turns(works, TURNS)
    whole = [sum(turn) for turn in zip(*times.values(), strict=True)]
    lines = [
        {
            "part": name,
            "s": f"{statistics.median(seconds):.1f}",
            "share of the job": f"{ratio(seconds, whole):.2f}",
        }
        for name, seconds in times.items()
    ]
    return pd.DataFrame(lines)


def main() -> None:
    rows = memory()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        passes = one_pass(Path(name))
        parts = job(Path(name))
    notes = (
        f"Time: cross-entropy and KL of SAEs of {8 * WIDTH} latents, spliced in after block {BELOW - 1} of a Llama of "
        f"{LAYERS} blocks, width {WIDTH}, {VOCABULARY} tokens and random weights; {CONTEXTS} contexts of {LENGTH} tokens. "
        f"One clean side: `write_clean` (clean, mean, zero) and what each SAE adds. Each on its own: four whole "
        f"passes an SAE, with equal results. The unit is a whole clean forward of the same contexts with its logits, "
        f"in one thread's processor time, medians of {TURNS} turns. Runs are counted on the blocks' MLPs, for each context. Memory: "
        f"all metrics of activations of an adaptive SAE with intervals and controls, on drawn rows of width {NARROW}, each size "
        f"in a fresh process after {BASELINE} rows. Job: a model of SmolLM2's shape, random weights, an adaptive SAE of {JOB_SAE} "
        f"latents, {JOB_ROWS} rows and {JOB_CONTEXTS} contexts, as in the demo."
    )
    tables = {**passes, "Memory of measuring": rows, "One job, by part": parts}
    write("evaluation", tables, notes)


if __name__ == "__main__":
    main()
