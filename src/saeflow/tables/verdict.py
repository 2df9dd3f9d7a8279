"""Verdicts: SAEs that find their own number of latents against rivals at equal L0 and against their own controls.

A difference counts only where its interval over documents, images or samples is clear of 0, and where it is larger
than the noise of seeds and what the remaining difference in L0 may explain.
"""

import itertools
import math
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from saeflow.tables.load import Tables
from saeflow.tables.runs import variant_label

BETTER, WORSE, EQUAL, ONE_SEED, ONE_UNIT = (
    "better", "worse", "no difference seen", "one seed: not ranked", "one document: not ranked",
)  # fmt: skip
RIVALS = ("topk", "batch_topk")
CONTROLS = {
    "shuffled_k": "the k of another input", "k_by_norm": "the k of its norm's rank", "mean_k": "the mean k",
    "batch_threshold": "one threshold",
}  # fmt: skip
"""Controls of an SAE that chooses k, as a sentence names what they put in the place of its own k."""
ERRORS = ("fvu", "ce_degradation")
_SHARE = 0.95
_APART = 0.1
"""Least difference of ln L0 between two runs from which a slope is taken."""


def judged(tables: Tables, metrics: Iterable[str] = ERRORS) -> pd.DataFrame:
    """Lines of the table `rivals` of some errors, with the L0 of both sides and a verdict.

    Added columns:
        l0, rival_l0: mean L0 of both.
        seed_noise: half the 95 % interval of the mean difference over seeds (Student's t); NaN for one seed.
        l0_effect: what the difference in L0 may explain: the error times the relative difference times the slope of
            ln error by ln L0, the steepest among the rival's variant in the tables, at least 1.
        verdict: BETTER if the error is smaller than the rival's, WORSE, EQUAL, or why there is none.
    """
    from scipy.stats import t  # a second, which a plan of jobs need not wait for

    rows = tables.rivals
    keys = [
        "source",
        "hook_point",
        "entry",
        "setting",
        "rival_entry",
        "rival_variant",
        "rival_setting",
    ]
    l0 = rows[rows["metric"] == "l0_mean"].set_index(keys)[["value", "rival"]]
    l0.columns = pd.Index(["l0", "rival_l0"])
    found = rows[rows["metric"].isin(list(metrics))].join(l0, on=keys).reset_index(drop=True)
    lines = []
    for row in found.to_dict("records"):
        several = row["seeds"] > 1
        scale = float(t.ppf((1 + _SHARE) / 2, row["seeds"] - 1)) if several else math.nan
        noise = scale * row["seed_sd"] / math.sqrt(row["seeds"])
        apart = abs(math.log(row["l0"] / row["rival_l0"])) if row["l0"] and row["rival_l0"] else 0.0
        effect = apart * _slope(tables.wide, row) * abs(row["rival"])
        lines.append(
            {"seed_noise": noise, "l0_effect": effect, "verdict": _verdict(row, noise, effect)}
        )
    added = pd.DataFrame(lines, columns=["seed_noise", "l0_effect", "verdict"])
    return pd.concat([found, added], axis=1)


def _verdict(row: Mapping[Hashable, Any], noise: float, effect: float) -> str:
    if math.isnan(row["low"]):
        return ONE_UNIT
    if math.isnan(noise):
        return ONE_SEED
    clear = row["low"] > 0 or row["high"] < 0
    if not clear or abs(row["difference"]) <= noise + effect:
        return EQUAL
    return WORSE if row["difference"] > 0 else BETTER


def _slope(wide: pd.DataFrame, row: Mapping[Hashable, Any]) -> float:
    """The steepest -d ln error / d ln L0 between neighbours among the rival's variant of that size and store."""
    if row["metric"] not in wide:
        return 1.0
    held = wide[
        (wide["source"] == row["source"]) & (wide["hook_point"] == row["hook_point"])
        & (wide["evaluated_on"] == row["source"]) & (wide["variant"] == row["rival_variant"])
        & (wide["d_sae"] == row["d_sae"]) & (wide[row["metric"]] > 0) & (wide["l0_mean"] > 0)
        & ~wide["entry"].str.contains("random-decoder", regex=False)
    ]  # fmt: skip
    points = np.log(held[["l0_mean", row["metric"]]].to_numpy(dtype=float))
    points = points[np.argsort(points[:, 0])]
    slopes = [
        (low[1] - high[1]) / (high[0] - low[0])
        for low, high in itertools.pairwise(points)
        if high[0] - low[0] > _APART
    ]
    result: float = max([1.0, *slopes])
    return result


def uninformed(tables: Tables) -> set[tuple[str, str, str]]:
    """(source, hook point, entry) of the SAEs whose k comes from a probe that does not read its score.

    Its R² on held-out documents has a 95 % interval that is not above 0.
    """
    chosen = tables.options[tables.options["option"] == "complexity"]
    probes = tables.probes[tables.probes["split"] == "evaluation"]
    read = {
        (row["source"], row["hook_point"], row["complexity"])
        for row in probes.to_dict("records")
        if row["r2_low"] > 0
    }
    return {
        (row["source"], row["hook_point"], row["entry"])
        for row in chosen.to_dict("records")
        if (row["source"], row["hook_point"], row["chosen"]) not in read
    }


def sentences(tables: Tables) -> list[str]:
    """Say in words what the comparisons of FVU show, a sentence each; empty without any."""
    rows = judged(tables, ["fvu"])
    if rows.empty:
        return []
    parts = []
    for rival in RIVALS:
        held = rows[rows["rival_variant"] == rival]
        if len(held):
            parts.append(
                f"Against {variant_label(rival)} trained at the same L0, {_counted(held)}."
            )
    for control, what in CONTROLS.items():
        held = rows[rows["rival_variant"] == control]
        if len(held):
            parts.append(f"Against themselves with {what}, {_counted(held)}.")
    return list(filter(None, [*parts, uninformed_sentence(tables)]))


def unranked_sentence(tables: Tables, metric: str) -> str:
    """Warn of the comparisons at equal L0 whose order says nothing; empty where there are none."""
    rows = judged(tables, [metric])
    rows = rows[rows["rival_variant"].isin(RIVALS)]
    equal = rows[~rows["verdict"].isin([BETTER, WORSE])]
    if equal.empty:
        return ""
    names = [
        variant_label(variant, entry)
        for variant, entry in zip(equal["variant"], equal["entry"], strict=True)
    ]
    return (
        f"{len(equal)} of {len(rows)} comparisons with a rival at equal L0 lie below their interval, the noise of seeds and the rest "
        f"of L0, or have one seed: the order of {', '.join(dict.fromkeys(names))} and these rivals says nothing."
    )


def uninformed_sentence(tables: Tables) -> str:
    """Name in a sentence the SAEs of `uninformed`; empty where there are none."""
    known = sorted({f"{entry} on {source}" for source, _, entry in uninformed(tables)})
    if not known:
        return ""
    return f"The k of {', '.join(known)} carries no information: its probe does not read its score."


def _counted(rows: pd.DataFrame) -> str:
    """Say how many of some comparisons end in which way, and which are clear."""
    total = len(rows)
    said = []
    for verdict, what in ((BETTER, "reconstruct better"), (WORSE, "reconstruct worse")):
        held = rows[rows["verdict"] == verdict]
        if len(held):
            names = sorted(
                {
                    f"{variant_label(v, e)} on {s}"
                    for v, e, s in zip(held["variant"], held["entry"], held["source"], strict=True)
                }
            )
            said.append(f"{len(held)} of {total} {what} ({', '.join(names)})")
    equal = int((rows["verdict"] == EQUAL).sum())
    if equal:
        said.append(
            f"{equal} of {total} show no difference beyond seeds, samples and the rest of L0"
        )
    if unranked := total - equal - int(rows["verdict"].isin([BETTER, WORSE]).sum()):
        said.append(f"{unranked} of {total} cannot be ranked (one seed, or one document)")
    return "; ".join(said)
