"""Trials of tuned SAEs: chosen on one part of the held-out documents, images or samples, reported on the other.

The division is a hash of each unit's number and of the sweep's seed, so it is the same for all trials and settings of a
source, whatever else is evaluated. Values are means over the seeds of a setting.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saeflow.config import share_of
from saeflow.errors import UserError
from saeflow.evaluation.evaluate import ROWS, SUMS
from saeflow.evaluation.intervals import UNIT, Sums, bounds, ratios, resample, total
from saeflow.evaluation.measure import Lines
from saeflow.evaluation.rivals import sums_of

_REPORTED = {"fvu": "fvu", "l0_mean": "l0"}
"""Metrics, with the names of their columns."""


def trial_lines(
    setting: Mapping[str, Any],
    folders: Mapping[str, Path],
    sweep: Mapping[str, Any],
    bootstrap: Mapping[str, int],
) -> Lines:
    """Lines of the table `sweeps` of one setting, one for each trial.

    Args:
        setting: of `Plan.sweeps`: its id columns, and under `trials` number, setting, drawn values and runs of each.
        folders: the evaluation of each run.
        sweep: `sweep` of the parameters, without the number of trials.
        bootstrap: resamples and seed.

    Raises:
        UserError: the runs were not evaluated on the same units, or a part has none.
    """
    trials = setting["trials"]
    each = [[sums_of(folders[run] / SUMS, ROWS) for run in one["runs"]] for one in trials]
    chosen_on = _chosen_on(each, folders[trials[0]["runs"][0]], sweep)
    selection = [[_of_units(one, chosen_on) for one in runs] for runs in each]
    report = [[_of_units(one, ~chosen_on) for one in runs] for runs in each]
    of_selection = [_means([ratios(total(one)) for one in runs]) for runs in selection]
    points = [(found["fvu"], found["l0_mean"]) for found in of_selection]
    limit = (1 + sweep["tolerance"]) * sweep["l0"]
    chosen = choose(points, sweep["l0"], limit)
    values = [_means([ratios(total(one)) for one in runs]) for runs in report]
    drawn = [_means([ratios(resample(one, bootstrap)) for one in runs]) for runs in report]
    units = int((~chosen_on).sum())
    ids = {name: value for name, value in setting.items() if name != "trials"}
    lines = []
    for number, (one, (fvu, l0)) in enumerate(zip(trials, points, strict=True)):
        line = {
            **ids, "setting": one["setting"], "trial": one["trial"], "trials": len(trials), "drawn": one["drawn"],
            "selection_fvu": float(fvu), "selection_l0": float(l0), "l0_limit": limit, "is_within": int(l0 <= limit),
            "is_chosen": int(number == chosen),
        }  # fmt: skip
        for metric, name in _REPORTED.items():
            line[name] = float(values[number][metric])
            line[f"{name}_low"], line[f"{name}_high"] = bounds(drawn[number][metric], units)
        line["difference"] = float(values[number]["fvu"] - values[0]["fvu"])
        line["low"], line["high"] = bounds(drawn[number]["fvu"] - drawn[0]["fvu"], units)
        counts = {"selection_units": int(chosen_on.sum()), "units": units}
        lines.append(line | {"seeds": len(one["runs"])} | counts)
    return lines


def choose(points: Sequence[tuple[float, float]], l0: float, limit: float) -> int:
    """Return the number of the chosen trial; the first of several alike.

    Args:
        points: FVU and mean L0 of each trial.
        l0: target of the mean L0.
        limit: largest mean L0 among which the lowest FVU is chosen; where none is within it, the nearest to `l0` is.
    """
    within = [number for number, (_, found) in enumerate(points) if found <= limit]
    if within:
        return min(within, key=lambda number: points[number][0])
    return min(range(len(points)), key=lambda number: abs(points[number][1] - l0))


def in_selection(units: np.ndarray, sweep: Mapping[str, Any]) -> np.ndarray:
    """Return which units (n,), given by their numbers, trials are chosen on; (n,) bool."""
    shares = [share_of(sweep["seed"], int(unit)) for unit in units]
    held: np.ndarray = np.array(shares) < sweep["selection_share"]
    return held


def _chosen_on(
    each: Sequence[Sequence[Sums]], folder: Path, sweep: Mapping[str, Any]
) -> np.ndarray:
    """Return which units of all runs trials are chosen on."""
    first, *others = [one[UNIT] for runs in each for one in runs]
    if not all(np.array_equal(first, other) for other in others):
        raise UserError(
            f"{folder}: expected the same documents, images or samples as of the other trials. Delete all and evaluate them "
            "again."
        )
    found = in_selection(first, sweep)
    if found.all() or not found.any():
        raise UserError(
            f"{folder}: expected held-out documents, images or samples to choose trials on and others to report on, found "
            f"{found.sum()} and {(~found).sum()}. Raise evaluation_rows of the store, or change sweep.selection_share."
        )
    return found


def _of_units(sums: Sums, held: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[held] for name, values in sums.items() if name != UNIT}


def _means(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds of each metric, a number or (resamples,)."""
    return {name: np.mean([found[name] for found in seeds], axis=0) for name in seeds[0]}
