"""SAEs that are trained on the same rows, stored in int8 and in bfloat16: what the rounding costs in FVU, L0 and cross-entropy.

`python benchmarks/stores.py --only saes` makes the table, in twelve minutes of one core.

Rows of the demo's language model; SAEs as in its parameters, of several seeds. The held-out rows are those of the model, in
float32 and rounded to bfloat16, and never int8. Cross-entropy is that of the model with reconstructions in the place of
its activations.
"""

import copy
import functools
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saeflow.config import SAEConfig, load_params
from saeflow.evaluation.in_model.text import NextTokens, write_clean
from saeflow.plan import Plan
from saeflow.saes import load
from saeflow.sources import open_source
from saeflow.stores import Store, finalise, open_store, write_part
from saeflow.stores.dtypes import DTYPES
from saeflow.training import train_group

SOURCE, HOOK_POINT = "smollm2", "blocks.19.resid_post"
COMPARED = ("bfloat16", "int8")
SAES: dict[str, dict[str, int]] = {"topk": {"k": 32}, "soft-topk": {"k": 32}, "sparsemax": {}}
"""Entries of the parameters, and options that take the place of theirs."""
SEEDS = [0, 1, 2, 3, 4]
CONTEXTS = {"train": 256, "evaluation": 32}
CE_CONTEXTS = 24
RUNTIME = {"device": "cpu", "precision": "fp32", "threads": 1, "checkpoint_every_s": 3600}
DIGITS = {"FVU of bfloat16 rows": 5, "FVU of float32 rows": 5, "mean L0": 2, "CE degradation, nats": 4}  # fmt: skip


class FirstContexts:
    """The first contexts of a source, each block of which the model sees once, however many stores are made of it."""

    def __init__(self, source: Any) -> None:
        self.hook_points, self.rows_per_context = source.hook_points, source.rows_per_context
        self.columns, self.d_in = source.columns, source.d_in
        self.block = functools.cache(source.block)

    def n_contexts(self, split: str) -> int:
        return CONTEXTS[split]


def parameters(project: Path) -> dict[str, Any]:
    """The project's parameters with the compared SAEs alone."""
    params = load_params(project / "params.yaml")
    params["sources"][SOURCE]["hook_points"] = [HOOK_POINT]
    chosen = {name: copy.deepcopy(params["saes"][name]) for name in SAES}
    for name, options in SAES.items():
        chosen[name] |= {"seed": SEEDS, "options": chosen[name]["options"] | options}
    return params | {"saes": chosen}


def written(source: Any, params: dict[str, Any], dtype: str, folder: Path) -> Store:
    """A training store of some dtype."""
    layout = params["stores"][SOURCE] | {"dtype": dtype}
    blocks, store = folder / f"{dtype}.blocks", folder / dtype
    blocks.mkdir()
    store.mkdir()
    write_part(source, "train", 0, 1, layout, blocks)
    finalise([blocks], SOURCE, params["sources"][SOURCE], "train", layout, {}, store)
    return open_store(store / f"{HOOK_POINT}.zarr")


def trained(store: Store, configs: list[SAEConfig], folder: Path) -> Iterator[tuple[SAEConfig, Any]]:  # fmt: skip
    """Train SAEs in one pass over a store."""
    wanted = [(config, folder / str(number), None) for number, config in enumerate(configs)]
    for _, one, _ in wanted:
        one.mkdir(parents=True)
    train_group(store, wanted, RUNTIME)
    for config, one, _ in wanted:
        yield config, load(one).eval()


@torch.inference_mode()
def fvu(sae: Any, x: Tensor) -> float:
    """Fraction of the variance of rows (n, d_in) that their reconstructions leave unexplained."""
    x_hat = torch.cat([sae.forward(rows) for rows in x.split(1024)])
    squares = (x_hat.double() - x.double()).square().sum()
    return float(squares / (x.double() - x.double().mean(0)).square().sum())


@torch.inference_mode()
def mean_l0(sae: Any, x: Tensor) -> float:
    """Mean number of active latents of rows (n, d_in)."""
    return sum(int((sae.encode(rows) != 0).sum()) for rows in x.split(1024)) / len(x)


def measured(project: Path, folder: Path) -> pd.DataFrame:
    """Metrics of every SAE: SAE, dtype, seed, and a column each."""
    params = parameters(project)
    place = project / "results" / "sources" / SOURCE
    source = FirstContexts(open_source(params["sources"][SOURCE], place, "cpu"))
    stores = {dtype: written(source, params, dtype, folder) for dtype in COMPARED}
    first, second = (stores[dtype] for dtype in COMPARED)
    for column in ("context", "position"):
        np.testing.assert_array_equal(first.column(column), second.column(column))
    held_out = source.block("evaluation", 0, CONTEXTS["evaluation"]).activations[HOOK_POINT]
    norms = held_out.norm(dim=1)
    x = held_out[norms <= params["evaluation"]["max_norm_multiple"] * norms.median()]
    rounded = DTYPES["bfloat16"].decode(DTYPES["bfloat16"].encode(x)).float()
    clean = folder / "clean"
    clean.mkdir()
    settings = {"ce_contexts": CE_CONTEXTS}
    mean = first.mean.float()
    write_clean(params["sources"][SOURCE], place, HOOK_POINT, mean, settings, {}, "cpu", clean)
    model = NextTokens(clean, place / "model", "cpu")
    configs = list(Plan(params).runs.values())
    rows = []
    for dtype, store in stores.items():
        for config, sae in trained(store, configs, folder / f"saes-{dtype}"):
            in_model = model.metrics(model.sums(sae.forward))
            values = (fvu(sae, rounded), fvu(sae, x), mean_l0(sae, rounded), in_model["ce_degradation"])  # fmt: skip
            rows.append(
                {"SAE": config.entry, "dtype": dtype, "seed": config.seed}
                | dict(zip(DIGITS, values, strict=True))
            )
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def compared(table: pd.DataFrame) -> pd.DataFrame:
    """A row per SAE and metric: the mean over seeds by dtype, and differences at equal and between other seeds."""
    lines = []
    for entry, of_entry in table.groupby("SAE", sort=False):
        for metric, digits in DIGITS.items():
            by_seed = of_entry.pivot(index="seed", columns="dtype", values=metric)
            base, other = (by_seed[dtype] for dtype in COMPARED)
            added = (other - base).tolist()
            lines.append(
                {
                    "SAE": entry,
                    "metric": metric,
                    "bfloat16": f"{base.mean():.{digits}f}",
                    "int8": f"{other.mean():.{digits}f}",
                    "int8 - bfloat16, same seed": f"{statistics.mean(added):+.{digits}f}",
                    "smallest, largest": f"{min(added):+.{digits}f}, {max(added):+.{digits}f}",
                    "largest between two seeds of bfloat16": f"{base.max() - base.min():.{digits}f}",
                }
            )
    return pd.DataFrame(lines)


def sae_costs(project: Path) -> dict[str, pd.DataFrame]:
    """Cost of int8 rows for each SAE, and the sizes of the comparison."""
    (tokens,) = {run.training.tokens for run in Plan(parameters(project)).runs.values()}
    with tempfile.TemporaryDirectory(dir=project / "results") as folder:
        table = compared(measured(project, Path(folder)))
    title = (
        f"SAEs on int8 rows: {HOOK_POINT}, {tokens:,} tokens of {CONTEXTS['train']} contexts, {len(SEEDS)} seeds, "
        f"{CONTEXTS['evaluation']} held-out contexts, {CE_CONTEXTS} in the model"
    )
    return {title: table}
