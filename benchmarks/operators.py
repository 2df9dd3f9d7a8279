"""Operators in reads of the scores, against torch's own and those of the package entmax.

    python benchmarks/operators.py

Every operator is timed between two reads of the same (B, n) scores (their largest value), so that its cost is
the number of times it could have read them. Written to benchmarks/results/operators.md and .csv.
"""

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import entmax as peer
import pandas as pd
import torch
from tables import in_turns, write
from torch import Tensor

from saeflow.operators import (
    SparseLatents,
    batch_topk,
    batch_topk_sparse,
    entmax,
    keep_topk,
    soft_topk,
    sparsemax,
    topk_sparse,
)
from saeflow.operators.entmax import entmax_sparse
from saeflow.operators.sparsemax import sparsemax_sparse
from saeflow.training.memory import keep_freed_memory

THREADS, ROWS, K = 2, 2048, 32
WIDTHS = (12288, 49152)
REPEATS, LONG_S = 7, 2.0
PEER_ROWS = 256
"""Rows that slow peers are timed on, against a read of as many."""

Operator = Callable[[Tensor], object]
OURS: dict[str, Operator] = {
    f"keep_topk, k {K}": lambda x: keep_topk(x, K),
    f"topk_sparse, k {K}": lambda x: topk_sparse(x, K),
    f"batch_topk, k {K}": lambda x: batch_topk(x, K),
    f"batch_topk_sparse, k {K}": lambda x: batch_topk_sparse(x, K),
    "entries above a threshold": lambda x: SparseLatents.from_above(x, 2.8),
    "sparsemax": sparsemax,
    "sparsemax_sparse": sparsemax_sparse,
    "entmax, alpha 1.5": lambda x: entmax(x, 1.5),
    "entmax_sparse, alpha 1.5": lambda x: entmax_sparse(x, 1.5),
    f"soft_topk, k {K}, alpha 0.1": lambda x: soft_topk(x, torch.full((len(x),), float(K)), 0.1),
}
PEERS: dict[str, Operator] = {
    "torch.topk": lambda x: x.topk(K),
    "torch.topk of the flattened batch": lambda x: x.flatten().topk(K * len(x)),
    "entmax.sparsemax": lambda x: peer.sparsemax(x, dim=-1),
    "entmax.sparsemax, k 256": lambda x: peer.sparsemax(x, dim=-1, k=256),
    "entmax.entmax15": lambda x: peer.entmax15(x, dim=-1),
    "entmax.entmax_bisect, alpha 1.5": lambda x: peer.entmax_bisect(x, alpha=1.5, dim=-1),
}
WITH_GRADIENT = {
    "sparsemax": sparsemax,
    "entmax, alpha 1.5": lambda x: entmax(x, 1.5),
    f"soft_topk, k {K}, alpha 0.1": OURS[f"soft_topk, k {K}, alpha 0.1"],
}


def reads(operator: Operator, x: Tensor) -> list[float]:
    """Times of the operator over those of the reads around it."""
    operator(x)
    first = in_turns({"operator": lambda: operator(x)}, 1)["operator"][0]
    turns = REPEATS if first < LONG_S else 3
    works = {"before": x.amax, "operator": lambda: operator(x), "after": x.amax}
    times = in_turns(works, turns)
    return [2 * t / (a + b) for a, t, b in zip(*times.values(), strict=True)]


def row(name: str, n: int, ratios: list[float]) -> dict[str, Any]:
    return {
        "operator": name,
        "n": n,
        "reads": f"{statistics.median(ratios):.3g}",
        "smallest": f"{min(ratios):.3g}",
        "largest": f"{max(ratios):.3g}",
    }


def with_gradient(operator: Operator) -> Operator:
    """The operator and its backward pass, for a gradient of its result."""

    def both(x: Tensor) -> object:
        x = x.detach().requires_grad_()
        out: Any = operator(x)
        return torch.autograd.grad(out, x, torch.ones_like(out))

    return both


def measured() -> Iterator[tuple[str, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(0)
    for n in WIDTHS:
        x = torch.randn(ROWS, n, generator=generator)
        for name, operator in OURS.items():
            yield "saeflow", row(name, n, reads(operator, x))
        for name, operator in WITH_GRADIENT.items():
            yield "Forward and backward", row(name, n, reads(with_gradient(operator), x))
        few = x[:PEER_ROWS].contiguous()
        for name, operator in PEERS.items():
            is_fast = name.startswith("torch")
            found = row(name, n, reads(operator, x if is_fast else few))
            yield "Peers", found | {"rows": ROWS if is_fast else PEER_ROWS}


def main() -> None:
    torch.set_num_threads(THREADS)
    keep_freed_memory()
    tables: dict[str, list[dict[str, Any]]] = {
        "saeflow": [],
        "Forward and backward": [],
        "Peers": [],
    }
    for table, found in measured():
        print(found, flush=True)
        tables[table].append(found)
    write(
        "operators",
        {name: pd.DataFrame(rows) for name, rows in tables.items()},
        f"({ROWS}, n) standard normal scores in float32, {THREADS} threads; memory that is freed is kept, as the "
        "trainer does. Peers that sort run on fewer rows, against a read of as many, which a cache makes "
        "faster than one of all.",
    )


if __name__ == "__main__":
    main()
