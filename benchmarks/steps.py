"""Training steps against those of SAELens, dictionary_learning and sparsify, in encoder products.

    python benchmarks/steps.py [CASE ...]

Every library runs in an environment of its own, which is made at first (benchmarks/peers/.venv-*), and takes
turns with the others on the same rows. Each step is timed between two products of its own shape, (B, d_in)
times (d_in, d_sae), in the same process; what is compared is the ratio. With names of cases only those are
run, and nothing is written. Otherwise to benchmarks/results/steps.md, .csv, .svg, .pdf and .png.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tables import RESULTS, in_turns, write

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "peers"))
from contestant import Case  # noqa: E402
from environments import LIBRARIES, environment  # noqa: E402

from saeflow.figures.style import TEXT_WIDTH, context, log_axis, look, new_figure, save  # noqa: E402

THREADS = 2
D_IN, BATCH, K = 768, 2048, 32
SMALL, MIDDLE, LARGE = 3072, 12288, 24576
DEAD = 0.1
LOOP_STEPS = 6
ENOUGH_S = 15.0  # a case gets fewer turns, at least 3, where they take longer than this
REPEATS = 5

OURS = "saeflow"
EVERYONE = (OURS, *LIBRARIES)
TWO = ("SAELens", "dictionary_learning")
OFFERS = {
    "topk": EVERYONE,
    "topk, 10 % dead": EVERYONE,
    "topk, sparse option": ("SAELens",),
    "batch_topk": (OURS, *TWO),
    "matryoshka": (OURS, *TWO),
    "jumprelu": (OURS, *TWO),
    "gated": (OURS, *TWO),
    "relu": (OURS, *TWO),
    "p_anneal": (OURS, "dictionary_learning"),
}
OURS_ALONE = (
    "adaptive_k", "relu, few active", "soft_topk", "soft_topk, narrow estimator", "soft_topk, hot",
    "sparsemax", "sparsemax, mlp",
)  # fmt: skip
FEW_ACTIVE = ("jumprelu", "gated", "relu, few active")
COLORS = {
    OURS: "#D1495B", "SAELens": "#3B6FB6", "dictionary_learning": "#5B8C5A", "sparsify": "#E0A030"
}  # fmt: skip
MARKERS = {OURS: "o", "SAELens": "s", "dictionary_learning": "^", "sparsify": "D"}


def case(name: str, d_sae: int = MIDDLE, batch: int = BATCH, k: int = K, steps: int = 0) -> Case:
    """One case that every library is asked to run, by its name in the tables."""
    return Case(
        variant=name.removesuffix(", 10 % dead").removesuffix(", few active"),
        d_in=D_IN,
        d_sae=d_sae,
        batch=batch,
        k=k,
        density=k / d_sae if name in FEW_ACTIVE else 0.0,
        dead=DEAD if "dead" in name else 0.0,
        steps=steps,
        threads=THREADS,
    )


class Contestant:
    """One library in a process of its own environment."""

    def __init__(self, name: str, python: Path) -> None:
        script = HERE / "peers" / f"with_{name.lower()}.py"
        self.name, self.log = name, HERE / "peers" / f".venv-{name}.log"
        self.process = subprocess.Popen(
            [python, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            bufsize=1,
        )

    def ask(self, line: str) -> dict[str, float]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(line + "\n")
        answer = self.process.stdout.readline()
        while answer and not answer.startswith("{"):  # what a library prints when it is imported
            answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name}: ended at {line}; see {self.log}")
        return json.loads(answer)

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("end\n")


@contextmanager
def contestants() -> Iterator[dict[str, Contestant]]:
    python = {OURS: Path(sys.executable)} | {name: environment(name) for name in LIBRARIES}
    found = {name: Contestant(name, python[name]) for name in EVERYONE}
    try:
        yield found
    finally:
        for contestant in found.values():
            contestant.process.kill()


def compare(name: str, asked: Case, libraries: Sequence[Contestant]) -> Iterator[dict[str, Any]]:
    """Time one case in every library, in turns; a row for each."""
    peaks = {each.name: each.ask(json.dumps(asdict(asked)))["peak"] for each in libraries}
    ratios: dict[str, list[float]] = {each.name: [] for each in libraries}
    rates: dict[str, list[float]] = {each.name: [] for each in libraries}
    steps, spent, turn = asked.steps or 1, 0.0, 0
    while turn < REPEATS and (turn < 3 or spent < ENOUGH_S):
        for each in libraries if turn % 2 == 0 else libraries[::-1]:
            times = each.ask("go")
            product = (times["before"] + times["after"]) / 2
            ratios[each.name].append(times["work"] / product / steps)
            rates[each.name].append(asked.batch * steps / times["work"])
            spent += sum(times.values())
        turn += 1
    for each in libraries:
        each.end()
        row = {
            "case": name,
            "d_sae": asked.d_sae,
            "B": asked.batch,
            "k": asked.k,
            "library": each.name,
            "encoder products": round(statistics.median(ratios[each.name]), 2),
            "smallest": round(min(ratios[each.name]), 2),
            "largest": round(max(ratios[each.name]), 2),
            "times ours": "",
            "tokens/s": round(statistics.median(rates[each.name])),
            "peak MiB": round(peaks[each.name]),
            "turns": turn,
        }
        if OURS in ratios and each.name != OURS:
            pairs = zip(ratios[each.name], ratios[OURS], strict=True)
            row["times ours"] = round(statistics.median(a / b for a, b in pairs), 2)
        print(row, flush=True)
        yield row


def limits() -> pd.DataFrame:
    """Measure the machine's limits: products of the steps' shapes, a copy and a read of the scores."""
    torch.set_num_threads(THREADS)
    rows = []
    x = torch.randn(BATCH, D_IN)
    for d_sae in (SMALL, MIDDLE, LARGE):
        weights, scores = torch.randn(d_sae, D_IN).t(), torch.empty(BATCH, d_sae)
        again = torch.empty_like(scores)
        works = {
            "product": lambda: torch.mm(x, weights, out=scores),  # noqa: B023
            "copy": lambda: again.copy_(scores),  # noqa: B023
            "read": lambda: scores.amax(),  # noqa: B023
        }
        times = {name: statistics.median(took) for name, took in in_turns(works, 7).items()}
        size = scores.nbytes / 1e9
        rows.append(
            {
                "d_sae": d_sae,
                "product GFLOP/s": round(2e-9 * BATCH * D_IN * d_sae / times["product"]),
                "copy GB/s (read + write)": round(2 * size / times["copy"], 1),
                "read GB/s": round(size / times["read"], 1),
                "product / read of its result": round(times["product"] / times["read"], 1),
            }
        )
    return pd.DataFrame(rows)


def draw(steps: pd.DataFrame, growth: pd.DataFrame) -> None:
    """Cost per variant and library, and TopK's as the dictionary, the batch and k grow."""
    with context():
        figure = new_figure(TEXT_WIDTH, 5.0)
        grid = figure.add_gridspec(2, 3, height_ratios=(1.5, 1))
        ax = figure.add_subplot(grid[0, :])
        shown = steps[(steps["d_sae"] == MIDDLE) & (steps["B"] == BATCH) & (steps["k"] == K)]
        names = list(dict.fromkeys(shown["case"]))[::-1]
        for library, of in shown.groupby("library", sort=False):
            low, high = (
                of["encoder products"] - of["smallest"],
                of["largest"] - of["encoder products"],
            )
            ax.errorbar(
                of["encoder products"], [names.index(name) for name in of["case"]], xerr=[low, high],
                fmt=MARKERS[library], color=COLORS[library], label=library, elinewidth=0.7,
            )  # fmt: skip
        ax.set_yticks(range(len(names)), map(label_of, names))
        ax.set_xlabel(
            "time of a training step, in encoder products of its shape; lines span all turns"
        )
        log_axis(ax, "x", 1, 1.05 * shown["largest"].max())
        ax.grid(axis="x")
        ax.legend(loc="lower right", ncols=2)
        ax.set_title(f"d_in {D_IN}, d_sae {MIDDLE}, B {BATCH}, k {K}, float32, {THREADS} threads")
        labels = {"d_sae": "d_sae", "B": "batch size B", "k": "k"}
        for column, (axis, label) in enumerate(labels.items()):
            ax = figure.add_subplot(grid[1, column])
            others = {"d_sae": MIDDLE, "B": BATCH, "k": K}
            others.pop(axis)
            fixed = growth[(growth[list(others)] == pd.Series(others)).all(axis=1)]
            for library, of in fixed.sort_values(axis).groupby("library", sort=False):
                style = {"color": COLORS[library], "marker": MARKERS[library]}
                ax.plot(of[axis], of["encoder products"], **style)
            ticks = sorted(set(fixed[axis]))
            ax.set_xscale("log")
            ax.set_xticks(ticks, map(str, ticks))
            ax.minorticks_off()
            ax.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.2)
            ax.set_ylim(0)
            ax.set_xlabel(label)
            ax.set_ylabel("a TopK step, in products" if column == 0 else "")
            ax.grid()
        save(figure, RESULTS / "steps")


def label_of(name: str) -> str:
    """A case's name, its variant spelled as in the figures of results."""
    variant, *rest = name.split(", ", 1)
    return ", ".join([look(variant).label, *rest])


def asked_for() -> Iterator[tuple[str, str, Case, Iterable[str]]]:
    """(table, name, case, libraries) of everything that is timed."""
    for name, libraries in OFFERS.items():
        for d_sae in (SMALL, MIDDLE):
            yield "steps", name, case(name, d_sae), libraries
    for name in OURS_ALONE:
        for d_sae in (SMALL, MIDDLE):
            yield "steps", name, case(name, d_sae), [OURS]
    yield "steps", "topk", case("topk", LARGE), EVERYONE
    for name in (*OFFERS, *OURS_ALONE):
        if OURS in (OFFERS.get(name) or [OURS]) and name != "topk":
            yield "steps", name, case(name, LARGE), [OURS]
    for size in (512, 8192):
        yield "growth", "topk", case("topk", batch=size), (OURS, "sparsify")
    for k in (8, 128):
        yield "growth", "topk", case("topk", k=k), (OURS, "sparsify")
    yield "loop", f"topk, {LOOP_STEPS} steps", case("topk", steps=LOOP_STEPS), EVERYONE


def main() -> None:
    chosen = set(sys.argv[1:])
    found: dict[str, list[dict[str, Any]]] = {"steps": [], "growth": [], "loop": []}
    with contestants() as libraries:
        for table, name, asked, names in asked_for():
            if not chosen or name in chosen:
                found[table] += compare(name, asked, [libraries[each] for each in names])
    if chosen:
        return
    steps, growth, loop = (pd.DataFrame(found[table]) for table in ("steps", "growth", "loop"))
    topk = steps[(steps["case"] == "topk") & steps["library"].isin(growth["library"])]
    growth = pd.concat([topk, growth], ignore_index=True)
    draw(steps, growth)
    write(
        "steps",
        {
            "Limits of the machine": limits(),
            "Steps": steps,
            "TopK as the dictionary, the batch and k grow": growth,
            "Training loops": loop,
        },
        f"{THREADS} threads, float32, d_in {D_IN}, rows with a mean and a power law. A step has its library's "
        "own losses, gradients, projection, clipping, Adam, unit rows and statistics (sparsify with Adam, not "
        "its default signum; it does not clip). Penalised variants: ReLU and P-anneal as initialised, where "
        f"half of the latents are active, the others with about {K} active; the peers' dense steps cost the same "
        "at any. `times ours`: the median of the turns' ratios. `peak MiB`: what building an SAE and two steps add "
        f"to the process at most. Loops: {LOOP_STEPS} steps with everything around them; ours reads a store on "
        "disk and logs, SAELens runs `fit` and dictionary_learning `trainSAE` on the same rows in memory, "
        "sparsify the steps of its own, whose trainer takes activations from a model only. "
        + ", ".join(LIBRARIES.values())
        + ".",
    )


if __name__ == "__main__":
    main()
