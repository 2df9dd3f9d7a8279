"""Every variant on data whose truth is known: does it find the dictionary, does its k follow the truth?

    python benchmarks/truth.py
    python benchmarks/truth.py --saes soft_topk-paper adaptive_k-paper --seeds 0 1 --laws varying --name papers

Synthetic worlds of equal mean number of active features: constant in one and varying in another, where the norm of a
row grows with its number; varying at norms that tell nothing of it on average (balanced) or at all (equal); and constant at norms
that vary (rescaled). Every SAE is trained at several settings of its sparsity, with several seeds; the table shows the
setting whose mean L0 is nearest to the true mean. `oracle` is TopK told each row's true number, in
training and in use; `NAME-paper` has the weights of its paper, in the units of its paper; `topk-all` is HierarchicalTopK
and `batch_topk-pool` Sampled-SAE; `batch_topk-aligned`, `-underused` and `-orthogonal` are BatchTopK with aligned
training, AuxK of underused latents (aux_zipf), and OrtSAE's penalty; `shuffled k`, `k by norm` and `mean k` are the
trained SAE with its own k permuted over the rows, handed out by the rank of their norms, or replaced by its mean.
Runs are computed in as many processes as there are cores. Each is kept in benchmarks/results/truth_runs.jsonl by a
key of its settings when it ends, and is computed again only with --again; after Ctrl-C the same command goes on
from there. The tables are of all kept runs of today's settings that are asked for, and say when and by which commit
each was made. A run of earlier code is not thrown away by itself. Written to benchmarks/results/truth.md and .csv, the
figures truth and truth_calibration, or under another name.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from processes import in_processes, time_left
from tables import RESULTS, write
from truth_figures import draw_calibration, draw_differences
from truth_runs import commit, keep, key_of, read
from truth_sae import run
from truth_settings import (
    D_IN,
    D_SAE,
    ENTRIES,
    LAWS,
    MEAN_L0,
    MOST,
    N_FEATURES,
    ORACLE,
    ROWS,
    SEEDS,
    TRAINING,
    Task,
    options_of,
    tasks_of,
)
from truth_verdicts import answers, comparisons, verdicts

METRICS = [
    "l0_mean", "fvu", "matched_feature_cosine", "support_f1", "spearman_l0_true", "spearman_k_hat_true",
    "spearman_norm_true", "partial_l0_true", "partial_k_hat_true",
]  # fmt: skip


def nearest(rows: pd.DataFrame) -> pd.DataFrame:
    """Choose, for each SAE and law, the setting whose mean L0 is nearest to the true mean."""
    own = rows[rows.control == ""].groupby(["law", "sae", "setting"]).l0_mean.mean()
    distance = (own - MEAN_L0).abs()
    best = {key[:2]: key[2] for key in distance.groupby(["law", "sae"]).idxmin()}
    kept = [best[law, name] == n for law, name, n in rows[["law", "sae", "setting"]].values]
    return rows[kept]


def summary(rows: pd.DataFrame, law: str) -> pd.DataFrame:
    """Means over the seeds, with the spread from the least to the largest."""
    lines = []
    for (name, control), group in rows[rows.law == law].groupby(["sae", "control"], sort=False):
        line: dict[str, Any] = {
            "SAE": f"{name}, {control}" if control else name,
            "setting": ", ".join(sorted(set(group.stated))) or "–",
        }
        for metric in METRICS:
            values = group[metric].dropna() if metric in group else pd.Series(dtype=float)
            half = (values.max() - values.min()) / 2 if len(values) else 0.0
            line[metric] = f"{values.mean():.3f} ± {half:.3f}" if len(values) else "–"
        line["made"] = ", ".join(sorted(set(group.made)))
        lines.append(line)
    return pd.DataFrame(lines)


def compute(tasks: Sequence[Task], workers: int) -> None:
    """Run tasks, keep each when it ends, and say how many are done."""
    commit()
    began = time.monotonic()
    for done, (task, rows) in enumerate(in_processes(run, tasks, workers), 1):
        keep(key_of(task.settings), rows)
        left = time_left(done, len(tasks), time.monotonic() - began)
        print(f"{left}: {task.law} {task.sae} {task.setting} {task.seed}", flush=True)


def kept_rows(tasks: Sequence[Task], kept: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Return the measurements of the tasks that are kept, with their setting and when they were made."""
    rows = []
    for task in tasks:
        if found := kept.get(key_of(task.settings)):
            made = f"{found['date']} {found['commit']}"
            more = {"setting": task.setting, "stated": stated(task.sae, task.setting), "made": made}
            rows += [{**row, **more} for row in found["rows"]]
    return pd.DataFrame(rows)


def asked_for() -> argparse.Namespace:
    known = [ORACLE, *ENTRIES]
    parser = argparse.ArgumentParser(description="SAEs on data whose truth is known.")
    parser.add_argument("--saes", nargs="+", choices=known, default=known, metavar="SAE")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="SEED")
    parser.add_argument("--laws", nargs="+", choices=list(LAWS), default=list(LAWS), metavar="LAW")
    parser.add_argument("--name", default="truth", help="of the files in benchmarks/results")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--again", action="store_true", help="compute runs that are kept already")
    which.add_argument("--kept", action="store_true", help="tables of kept runs; compute none")
    return parser.parse_args()


def main() -> None:
    asked = asked_for()
    tasks = tasks_of(asked.laws, asked.saes, asked.seeds)
    kept = {} if asked.again else read()
    if not asked.kept:
        compute([task for task in tasks if key_of(task.settings) not in kept], asked.workers)
    every = kept_rows(tasks, read())
    if every.empty:
        raise SystemExit("truth.py: none of these runs is kept. Leave out --kept.")
    torch.set_num_threads(1)  # as the runs, which the tables say
    report(every, asked.name, len(tasks))


def report(every: pd.DataFrame, name: str, asked: int) -> None:
    """Write tables and figure of kept runs, of so many that were asked for."""
    rows = nearest(every)
    RESULTS.mkdir(exist_ok=True)
    found = comparisons(rows, every)
    draw_differences(found, RESULTS / name)
    draw_calibration(rows, RESULTS / f"{name}_calibration")
    tables = {"Answers": answers(found)}
    for law in rows.law.unique():
        tables[f"World: {law}. Verdicts"] = verdicts(found, rows, law)
        tables[f"World: {law}"] = summary(rows, law)
    runs = len(every.drop_duplicates(["law", "sae", "setting", "seed"]))
    write(
        name,
        {title: table for title, table in tables.items() if len(table)},
        f"{runs} of {asked} runs. {N_FEATURES} features in {D_IN} dimensions, {MEAN_L0} active in the mean (constant and rescaled: in every "
        f"row; varying, balanced and equal: uniform in 1..{MOST}), d_sae {D_SAE}, {TRAINING.tokens} rows of training, {ROWS['evaluation']} held out, "
        f"{every.seed.nunique()} seeds (± half of their range). Of several settings of an SAE the one whose mean L0 is nearest to the true mean; "
        "no other choice was made from results, and every setting that was tried is in truth_settings.py. A verdict is of the difference in FVU, "
        "paired by seed, with a 95 % interval by Student's t over the seeds: against BatchTopK at the same L0 (linear between BatchTopK's own settings, "
        "which is at most too large, since FVU is convex in L0) "
        "and against the SAE with its own k's shuffled, handed out by norm, or replaced by their mean; below 0 is better. Answers count these verdicts "
        "over worlds, for the rivals of BatchTopK. `made`: day and commit of the code. Features are active by a power law of their rank, the law by which feature_choice divides its budget: these worlds "
        f"suit it.\n\n![Difference in FVU from BatchTopK at equal L0, filled where its interval is clear of 0]({name}.svg)\n\n"
        f"![Mean L0 against the true count, varying]({name}_calibration.svg)",
        command=" ".join(["truth.py", *sys.argv[1:]]),
    )


def stated(name: str, number: int) -> str:
    """Return the options of a setting by which it differs from the SAE's first one, or where it has one setting ''."""
    settings = options_of(name)
    differing = [key for key in settings[0] if any(s[key] != settings[0][key] for s in settings)]
    return " ".join(f"{key} {settings[number][key]}" for key in differing)


if __name__ == "__main__":
    main()
