"""Rivals: an SAE that finds its own number of latents against SAEs trained at the L0 that it found.

Every seed of the one is paired with the same seed of the other. Differences are paired by unit (document, image,
sample): a resample draws the same units for both, takes each seed's difference and averages over seeds.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from saeflow.errors import UserError
from saeflow.evaluation.controls import CONTROLS
from saeflow.evaluation.evaluate import CONTROL, IN_MODEL, ROWS, SUMS
from saeflow.evaluation.intervals import UNIT, Sums, bounds, count, ratios, resample, total
from saeflow.evaluation.measure import Lines


def rival_lines(
    comparison: Mapping[str, Any], folders: Mapping[str, Path], settings: Mapping[str, int]
) -> Lines:
    """Lines of the table `rivals` of one comparison, one for each metric.

    Args:
        comparison: of `Plan.rivals`: what is compared, and under `pairs` (own run, rival run) of each seed.
        folders: the evaluation of each run.
        settings: resamples and seed.

    Raises:
        UserError: the runs were not evaluated on the same documents, images or samples.
    """
    lines = []
    for part in (ROWS, IN_MODEL):
        pairs = [
            [sums_of(folders[run] / SUMS, part) for run in pair] for pair in comparison["pairs"]
        ]
        if not all(own and rival for own, rival in pairs):
            continue
        for own, rival in pairs:
            if not np.array_equal(own[UNIT], rival[UNIT]):
                raise UserError(
                    f"{folders[comparison['pairs'][0][0]]}: expected the same documents, images or samples as of its "
                    "rival. Delete both and evaluate them again."
                )
        lines += _named(comparison, _compared(pairs, settings), len(pairs))
    return lines


def control_lines(
    comparison: Mapping[str, Any], folders: Mapping[str, Path], settings: Mapping[str, int]
) -> Lines:
    """Lines of the table `rivals` of an SAE against its own controls (`saeflow.evaluation.controls`), if it has any.

    Args:
        comparison, folders, settings: as of `rival_lines`; the rival is not used.
    """
    lines = []
    runs = [own for own, _ in comparison["pairs"]]
    for control in CONTROLS:
        pairs = [
            [sums_of(folders[run] / SUMS, part) for part in (ROWS, f"{CONTROL}{control}.")]
            for run in runs
        ]
        if all(held for _, held in pairs):
            itself = {"rival_entry": "", "rival_variant": control, "rival_setting": ""}
            found = _compared(pairs, settings)
            lines += _named({**comparison, **itself}, found, len(pairs))
    return lines


def _named(comparison: Mapping[str, Any], lines: Lines, seeds: int) -> Lines:
    """Return lines with what is compared."""
    ids = {name: value for name, value in comparison.items() if name != "pairs"}
    return [{**ids, "seeds": seeds, **line} for line in lines]


def sums_of(path: Path, part: str) -> dict[str, np.ndarray]:
    """The sums by unit that an evaluation kept in SUMS, of one part: ROWS, IN_MODEL or a control; none where it has none."""
    return {
        name.removeprefix(part): values
        for name, values in load_file(path).items()
        if name.startswith(part)
    }


def _compared(pairs: Sequence[Sequence[Sums]], settings: Mapping[str, int]) -> Lines:
    """Lines without the columns that say what is compared."""
    plain = [[{k: v for k, v in one.items() if k != UNIT} for one in pair] for pair in pairs]
    drawn = [[ratios(resample(one, settings)) for one in pair] for pair in plain]
    values = [[ratios(total(one)) for one in pair] for pair in plain]
    units = count(plain[0][0])
    lines = []
    for metric in (name for name in values[0][0] if name in values[0][1]):
        of_seeds = [float(own[metric] - rival[metric]) for own, rival in values]
        together = np.mean([own[metric] - rival[metric] for own, rival in drawn], axis=0)
        low, high = bounds(together, units)
        lines.append(
            {
                "metric": metric,
                "units": units,
                "value": statistics.fmean(float(own[metric]) for own, _ in values),
                "rival": statistics.fmean(float(rival[metric]) for _, rival in values),
                "difference": statistics.fmean(of_seeds),
                "low": low,
                "high": high,
                "seed_sd": statistics.stdev(of_seeds) if len(of_seeds) > 1 else None,
            }
        )
    return lines
