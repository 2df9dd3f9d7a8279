"""The page of latent cards at 24 576 latents: time to collect, lens, write; size; time to open in a browser.

    python benchmarks/latents.py

Written to benchmarks/results/latents.md and .csv.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from drawn import Drawn, write_drawn
from tables import in_turns, write
from transformers import LlamaConfig, LlamaForCausalLM

from saeflow.batch import Batch
from saeflow.config import ROOT
from saeflow.evaluation.latents import BINS, LOWEST, logit_lens, write_latents
from saeflow.evaluation.rows import EvaluatedRows, RowSelection
from saeflow.figures.latents import write_page
from saeflow.saes import build
from saeflow.sources.heads import final_norm
from saeflow.stores import open_store

sys.path.insert(0, str(ROOT / "tests"))
from browser import FLAGS, chromium

D_SAE, D_IN, K, ROWS, VOCABULARY = 24_576, 576, 32, 131_072, 49_152
SETTINGS = {"examples": 6, "before": 9, "after": 4, "neighbours": 5}
ALL = RowSelection(positions="all", norm_limit=None)
LOOKS = 5


def topk(d_in: int, d_sae: int) -> torch.nn.Module:
    """A TopK SAE as it is initialised."""
    options = {"k": K, "k_schedule": {"kind": "constant"}, "auxk_weight": 0.0}
    sae = build("topk", d_in, d_sae, options)
    generator = torch.Generator().manual_seed(0)
    sae.initialise(Batch.of(torch.randn(512, d_in, generator=generator)), generator)
    return sae.eval()


def head() -> torch.nn.Module:
    """A model whose lm head is as large as SmolLM2's; nothing else of it is used."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=D_IN, intermediate_size=D_IN, num_hidden_layers=1,
        num_attention_heads=9,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def page(folder: Path) -> tuple[pd.DataFrame, Path]:
    """Seconds of each part of a page."""
    store = open_store(write_drawn(Drawn(ROWS, D_IN), folder))
    sae, model = topk(D_IN, D_SAE), head()
    tokens = np.random.default_rng(0).zipf(1.3, (ROWS // 128, 128)) % VOCABULARY
    seconds = {}
    began = time.perf_counter()
    lens = logit_lens(model, final_norm(model), sae.directions(), 6)
    seconds["logit lens"] = time.perf_counter() - began
    began = time.perf_counter()
    found = write_latents(
        sae, EvaluatedRows(store, ALL, 1024, "cpu"), tokens, SETTINGS, folder, lens
    )
    seconds["two passes over the rows, neighbours"] = time.perf_counter() - began
    began = time.perf_counter()
    out = folder / "latents.html"
    facts = {
        "run": "benchmark", "d_sae": D_SAE, "unit": "tokens", "bins": BINS, "lowest": LOWEST,
        "before": SETTINGS["before"], "strings": lambda token: f" token{token}",
    }  # fmt: skip
    write_page(found, facts, out)
    seconds["page"] = time.perf_counter() - began
    with torch.inference_mode():
        began = time.perf_counter()
        for _, x in store.in_order(1024):
            sae.encode(x.float())
        encode = time.perf_counter() - began
    seconds["(all rows encoded once, alone)"] = encode
    lines = [
        {"part": part, "seconds": f"{taken:.1f}", "times one encoding": f"{taken / encode:.2f}"}
        for part, taken in seconds.items()
    ]
    return pd.DataFrame(lines), out


def opening(path: Path, folder: Path) -> pd.DataFrame:
    """Seconds until the first cards are there, as the browser's own clock and as a whole run of it."""
    empty = folder / "empty.html"
    empty.write_text("<!DOCTYPE html><title>empty</title>")

    def look(at: Path, held: list[str]) -> None:
        done = subprocess.run(
            [chromium(), *FLAGS, f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000",
             "--dump-dom", at.as_uri()],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        held.append(done.stdout)

    seen: list[str] = []
    times = in_turns({"page": lambda: look(path, seen), "empty": lambda: look(empty, [])}, LOOKS)
    assert all(text.count("<article") >= 24 for text in seen)
    took = statistics.median(a - b for a, b in zip(times["page"], times["empty"], strict=True))
    return pd.DataFrame([
        {"what": "size of the page", "value": f"{path.stat().st_size / 2**20:.1f} MiB"},
        {"what": "start of Chromium with an empty page", "value": f"{statistics.median(times['empty']):.2f} s"},
        {"what": "more with the page, until its first cards are there", "value": f"{took:.2f} s"},
    ])  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts, out = page(folder)
        looks = opening(out, folder)
    notes = f"A TopK SAE of {D_SAE} latents, k {K}, on {ROWS} drawn rows of width {D_IN}, {VOCABULARY} tokens."
    write(
        "latents",
        {"Writing a page": parts, "Opening it": looks},
        notes,
    )


if __name__ == "__main__":
    main()
