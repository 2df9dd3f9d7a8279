"""Tuning: the values that entries of `saes` with `ranges` draw for their trials, each a pure function of its name."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from saeflow.config.explain import as_list, explained, listed, validator
from saeflow.config.options import options_schema
from saeflow.config.schema import params_schema
from saeflow.config.variants import variants
from saeflow.files import json_digest

BUDGET = ("tokens", "batch_size", "log_every_steps")
"""Keys of `training` that no trial draws: all trials of a file have one budget."""
_LARGEST = 1e30
"""Largest end of a range."""
_DIGITS = 13
"""Hexadecimal digits of a digest that make a number: the 52 bits of a float's fraction."""
_TRIAL = re.compile(r"-trial(\d+)(?=(-seed\d+)?$)")


def trial_of(name: str) -> int | None:
    """The number of the trial that a run or a setting is; None where its entry is not tuned."""
    found = _TRIAL.search(name)
    return int(found[1]) if found else None


def without_trial(setting: str) -> str:
    """A setting without its trial: trials that are chosen among have one name."""
    return _TRIAL.sub("", setting)


def share_of(*parts: int | str) -> float:
    """A number in 0..1, below 1, that looks random and depends on all parts and on nothing else."""
    share: float = int(json_digest(list(parts))[:_DIGITS], 16) / 16.0**_DIGITS
    return share


def trials(
    sweep: Mapping[str, Any] | None, entry: str, values: Mapping[str, Any]
) -> list[tuple[int | None, dict[str, Any]]]:
    """Number and drawn values of each trial of an entry; trial 0 draws none and has the entry's own values.

    Args:
        sweep: `sweep` of valid parameters.
        entry: the entry's name.
        values: the entry.

    Returns:
        One trial, without a number, where the entry has no `ranges`.
    """
    if sweep is None or "ranges" not in values:
        return [(None, {})]
    known = tunable(values["variant"])
    found: list[tuple[int | None, dict[str, Any]]] = [(0, {})]
    for number in range(1, sweep["trials"]):
        drawn = {}
        for key, (low, high) in values["ranges"].items():
            share = share_of(sweep["seed"], entry, number, key)
            drawn[key] = between(share, low, high, is_whole=known[key])
        found.append((number, drawn))
    return found


def between(share: float, low: float, high: float, *, is_whole: bool) -> float | int:
    """The value at a share of a range: on a logarithmic scale, or a linear one where the range begins at 0.

    Args:
        share: in 0..1.
        low, high: ends, 0 <= low < high.
        is_whole: rounded to a whole number; else to four significant digits, as far as that stays in the range.
    """
    if low == 0:
        value = share * high
    else:
        value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    rounded = round(value) if is_whole else float(f"{value:.4g}")
    return min(max(rounded, low), high)


def tunable(variant: str) -> dict[str, bool]:
    """Keys that an entry of a variant may give a range: whether their numbers are whole."""
    found = {}
    for key, about in _schemas(variant).items():
        kinds = _kinds(about)
        if key not in BUDGET and kinds & {"integer", "number"}:
            found[key] = "number" not in kinds
    return found


def _schemas(variant: str) -> dict[str, Any]:
    """The JSON schema of each key of the training and each option of a variant."""
    training = params_schema()["properties"]["training"]["properties"]
    return {**training, **options_schema(variants()[variant])["properties"]}


def _kinds(schema: Mapping[str, Any]) -> set[str]:
    """The types that a schema takes, those of its alternatives too."""
    kind = schema.get("type", [])
    parts = [_kinds(part) for part in schema.get("anyOf", ())]
    return set([kind] if isinstance(kind, str) else kind).union(*parts)


def problems(params: Mapping[str, Any]) -> Iterator[str]:
    """Say of `sweep` and of each entry's `ranges` what a schema cannot."""
    sweep = params["sweep"]
    tuned = {name: entry for name, entry in params["saes"].items() if "ranges" in entry}
    if tuned and sweep is None:
        yield (
            f"saes.{min(tuned)}.ranges: expected the section sweep, which says how many trials there are, found none. "
            "Add it, or take the ranges out."
        )
        return
    if sweep is None:
        return
    if not tuned:
        yield "sweep: expected an entry of saes with ranges, found none. Add ranges to one, or take sweep out."
    if params["evaluation"]["bootstrap"] is None:
        yield (
            "evaluation.bootstrap: expected resamples and a seed, as sweep chooses trials by the sums of documents, images "
            "or samples, which are kept with them, found null. Give them, or take sweep out."
        )
    for name, entry in tuned.items():
        yield from _of_ranges(name, entry)
    for name, entry in params["saes"].items():
        for k in as_list(entry.get("options", {}).get("k")):
            guide = k.get("mean_l0_of", "") if isinstance(k, Mapping) else ""
            if trial_of(guide) is not None:
                yield (
                    f"saes.{name}.options.k.mean_l0_of: expected a run of an entry without ranges, as trials are chosen "
                    f"when all are trained, found {guide}. Name another, or take its ranges out."
                )


def _of_ranges(name: str, entry: Mapping[str, Any]) -> Iterator[str]:
    """Say what is wrong with the ranges of one entry."""
    schemas, known = _schemas(entry["variant"]), tunable(entry["variant"])
    for key, (low, high) in entry["ranges"].items():
        where = f"saes.{name}.ranges.{key}"
        stated = entry["options"].get(key, entry.get(key))
        if key in BUDGET:
            yield f"{where}: expected a key that leaves the budget as it is, found {key}. Take it out."
        elif key not in known and key in schemas:
            yield f"{where}: expected a key with numbers ({listed(known)}), found {key}. Take it out."
        elif key not in known:
            yield f"{where}: unknown key {key}. Known keys: {listed(known)}."
        elif isinstance(stated, list | Mapping):
            yield (
                f"{where}: expected one number for {key} in the entry, which trial 0 takes, found {stated}. Give one, or take "
                "the range out."
            )
        elif not 0 <= low < high <= _LARGEST:
            yield f"{where}: expected [low, high] with 0 <= low < high <= {_LARGEST:g}, found {[low, high]}. Fix it."
        else:
            yield from itertools.islice(_of_ends(name, entry, key, schemas[key]), 1)


def _of_ends(
    name: str, entry: Mapping[str, Any], key: str, schema: Mapping[str, Any]
) -> Iterator[str]:
    """Say of the ends of a range what the key does not take, by itself or beside the entry's other values."""
    check, options = validator({"properties": {key: schema}}), variants()[entry["variant"]]
    stated = {option: as_list(value)[0] for option, value in entry["options"].items()}
    for end in entry["ranges"][key]:
        for line in explained(check.iter_errors({key: end})):
            yield f"saes.{name}.ranges.{line}"
        if key in stated:
            for d_sae in as_list(entry["d_sae"]):
                known = set(options.of(stated).problems(d_sae))
                for line in options.of({**stated, key: end}).problems(d_sae):
                    if line not in known:
                        yield f"saes.{name}.ranges.{line}"
