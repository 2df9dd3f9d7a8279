"""Verdicts of `truth.py`: differences in FVU against BatchTopK at equal L0, and against controls of an SAE's own k."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from scipy.stats import t as student

REFERENCE = "batch_topk"
"""The SAE with one threshold, against which every other one is compared at equal L0."""
AT_L0 = "BatchTopK at equal L0"
CONTROLS = ("shuffled k", "k by norm", "mean k")
RIVALS = (
    "soft_topk", "soft_topk-paper", "adaptive_k", "adaptive_k-paper", "sparsemax", "entmax", "top_afa",
    "matching_pursuit", "jumprelu", "gated", "feature_choice", "feature_choice-uniform", "batch_topk-aligned",
    "batch_topk-underused", "batch_topk-orthogonal", "batch_topk-pool", "topk-all", "abs_topk",
)  # fmt: skip
"""SAEs that choose how many latents each row has, and options that are to be better than BatchTopK without them."""
VERDICTS = ("better", "worse", "undecided")


@dataclass(frozen=True)
class Comparison:
    """Differences in FVU of an SAE in a world, below 0 where it is better.

    Attributes:
        against: AT_L0, or one of CONTROLS.
        values: one a seed; None where BatchTopK has no settings on either side of the L0.
    """

    law: str
    sae: str
    against: str
    values: list[float] | None

    @property
    def verdict(self) -> str:
        """The word for an interval that lies below, above or around 0."""
        if self.values is None:
            return "L0 out of range"
        _, low, high = interval(self.values)
        return "better" if high < 0 else "worse" if low > 0 else "undecided"

    @property
    def cell(self) -> str:
        """The mean difference with its interval."""
        if self.values is None:
            return "–"
        mean, low, high = interval(self.values)
        return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" if low == low else f"{mean:+.3f} (one seed)"


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


def comparisons(chosen: pd.DataFrame, every: pd.DataFrame) -> list[Comparison]:
    """Differences of every SAE in every world, paired by seed; of a seed that both sides have.

    Args:
        chosen: rows of each SAE's chosen setting.
        every: rows of all settings, of which those of BatchTopK are read.
    """
    reference = every[(every.sae == REFERENCE) & (every.control == "")]
    found = []
    for (law, sae), group in chosen.groupby(["law", "sae"], sort=False):
        own = group[group.control == ""].set_index("seed")
        held = reference[(reference.law == law) & reference.seed.isin(own.index)]
        if sae != REFERENCE and len(held):
            there = {
                seed: at_l0(rows, own.l0_mean[seed], "fvu") for seed, rows in held.groupby("seed")
            }
            values = [own.fvu[seed] - fvu for seed, fvu in there.items() if fvu is not None]
            whole = len(values) == len(there)
            found.append(Comparison(law, sae, AT_L0, values if whole else None))
        for control in CONTROLS:
            fvu = group[group.control == control].set_index("seed").fvu
            if len(fvu):
                values = (own.fvu - fvu).dropna().tolist()
                found.append(Comparison(law, sae, control, values))
    return found


def verdicts(found: Sequence[Comparison], chosen: pd.DataFrame, law: str) -> pd.DataFrame:
    """Return a world's table of differences: a line an SAE, with the verdict against BatchTopK.

    Args:
        found: comparisons.
        chosen: rows of each SAE's chosen setting.
        law: the world.
    """
    lines = []
    own = chosen[(chosen.law == law) & (chosen.control == "")]
    for sae, group in own.groupby("sae", sort=False):
        mine = {one.against: one for one in found if (one.law, one.sae) == (law, sae)}
        if mine:
            line = {
                "SAE": sae,
                "l0_mean": f"{group.l0_mean.mean():.2f}",
                "fvu": f"{group.fvu.mean():.3f}",
            }
            at_equal = mine.get(AT_L0)
            line["fvu - BatchTopK's"] = at_equal.cell if at_equal else "–"
            line["verdict"] = at_equal.verdict if at_equal else "–"
            for control in CONTROLS:
                line[f"fvu - with {control}"] = mine[control].cell if control in mine else "–"
            lines.append(line)
    return pd.DataFrame(lines)


def answers(found: Sequence[Comparison]) -> pd.DataFrame:
    """Count and name, for each rival of BatchTopK, the worlds in which it is better, worse or undecided."""
    lines = []
    for sae in RIVALS:
        for against in (AT_L0, *CONTROLS):
            mine = [one for one in found if (one.sae, one.against) == (sae, against)]
            if mine:
                line: dict[str, Any] = {"SAE": sae, "against": against}
                for verdict in (*VERDICTS, "L0 out of range"):
                    worlds = [one.law for one in mine if one.verdict == verdict]
                    line[verdict] = f"{len(worlds)} ({', '.join(worlds)})" if worlds else "0"
                lines.append(line)
    return pd.DataFrame(lines)
