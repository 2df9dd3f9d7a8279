"""Runs of `truth.py` that are kept: each is computed once for its settings, and says when and by which code."""

import datetime
import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import t as student
from tables import RESULTS

FILE = RESULTS / "truth_runs.jsonl"
REFERENCE = "batch_topk"
"""The SAE with one threshold, against which every other one is compared at equal L0."""


def key_of(settings: Mapping[str, Any]) -> str:
    """Return the key of a run: a digest of all that its settings say."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(file: Path = FILE) -> dict[str, dict[str, Any]]:
    """Return the runs that are kept, by key; of a key that was run twice, the later."""
    if not file.exists():
        return {}
    lines = file.read_text(encoding="utf-8").splitlines()
    return {run["key"]: run for run in map(json.loads, lines)}


def keep(key: str, rows: Sequence[Mapping[str, Any]], file: Path = FILE) -> dict[str, Any]:
    """Append a run: its measurements, one row a control, with the day and the commit of the code."""
    run = {"key": key, "date": str(datetime.date.today()), "commit": commit(), "rows": list(rows)}
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as opened:
        opened.write(json.dumps(run, sort_keys=True) + "\n")
    return run


def commit() -> str:
    """Return the short name of the commit that the code is of, with a + where files of src/ differ from it."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    head, changed = (
        subprocess.run([*git, *arguments], capture_output=True, text=True, check=False)
        for arguments in (("rev-parse", "--short=7", "HEAD"), ("status", "--porcelain", "src"))
    )
    if head.returncode or changed.returncode:
        return "no commit"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of paired differences over seeds, by Student's t; NaN bounds for a single seed."""
    values = pd.Series(differences, dtype=float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    half = float(student.ppf(0.975, len(values) - 1) * values.sem())
    return mean, mean - half, mean + half


def at_l0(reference: pd.DataFrame, l0: float, metric: str) -> float | None:
    """A metric of the reference at another L0: linear in L0 between its nearest settings on either side.

    Args:
        reference: rows of one seed, with l0_mean and the metric, one a setting.

    Returns:
        None where the L0 lies outside those of the settings.
    """
    ordered = reference.sort_values("l0_mean")
    found, values = ordered.l0_mean.to_numpy(), ordered[metric].to_numpy()
    for low in range(len(found) - 1):
        if found[low] <= l0 <= found[low + 1]:
            share = (l0 - found[low]) / (found[low + 1] - found[low])
            return float(values[low] + share * (values[low + 1] - values[low]))
    return None


def verdicts(chosen: pd.DataFrame, every: pd.DataFrame, law: str) -> pd.DataFrame:
    """Differences in FVU against BatchTopK at equal L0 and against each control of an SAE's own k, paired by seed.

    Args:
        chosen: rows of each SAE's chosen setting.
        every: rows of all settings, of which those of BatchTopK are read.
        law: the world.
    """
    of_law, reference = chosen[chosen.law == law], every[(every.law == law) & (every.control == "")]
    reference = reference[reference.sae == REFERENCE]
    lines = []
    for name, group in of_law.groupby("sae", sort=False):
        if name == REFERENCE:
            continue
        own = group[group.control == ""].set_index("seed")
        differences = []
        for seed, row in own.iterrows():
            there = at_l0(reference[reference.seed == seed], float(row.l0_mean), "fvu")
            if there is not None:
                differences.append(float(row.fvu) - there)
        is_whole = len(differences) == len(own)
        line = {
            "SAE": name,
            "l0_mean": f"{own.l0_mean.mean():.2f}",
            "fvu": f"{own.fvu.mean():.3f}",
            "fvu - BatchTopK's": shown(differences) if is_whole else "L0 out of range",
            "verdict": verdict(differences) if is_whole else "–",
        }
        for control in ("shuffled k", "k by norm", "mean k"):
            there = group[group.control == control].set_index("seed")
            line[f"fvu - with {control}"] = (
                shown((own.fvu - there.fvu).dropna().tolist()) if len(there) else "–"
            )
        lines.append(line)
    return pd.DataFrame(lines)


def shown(differences: Sequence[float]) -> str:
    """Return a mean difference with its interval, as a cell."""
    mean, low, high = interval(differences)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" if low == low else f"{mean:+.3f} (one seed)"


def verdict(differences: Sequence[float]) -> str:
    """Return the word for a difference whose interval lies below, above or around 0."""
    _, low, high = interval(differences)
    return "better" if high < 0 else "worse" if low > 0 else "undecided"
