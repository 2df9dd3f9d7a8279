"""Trials of tuned SAEs in other tables: the chosen ones alone are summarised and drawn, and a sentence says so."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from saeflow.config import without_trial
from saeflow.tables.runs import setting_of

Place = tuple[str, str, str, str]
"""Source, hook point, entry and setting."""
UNTUNED = "All SAEs that were trained here are untuned: no sweep."


def left_out(sweeps: Iterable[Mapping[Any, Any]]) -> set[Place]:
    """Return the settings of the trials that were not chosen.

    Args:
        sweeps: rows of the table `sweeps`.
    """
    return {_place(row) for row in sweeps if not int(row["is_chosen"])}


def of_chosen(
    rows: Iterable[dict[str, str]], sweeps: Iterable[Mapping[Any, Any]]
) -> list[dict[str, str]]:
    """Return the rows of a table of runs without those of trials that were not chosen."""
    out = left_out(sweeps)
    return [row for row in rows if _place({**row, "setting": setting_of(row["run"])}) not in out]


def sentence(sweeps: Sequence[Mapping[Any, Any]], entries: Iterable[Hashable]) -> str:
    """Say which SAEs are tuned, how their trials were chosen, and how many are left out.

    Args:
        sweeps: rows of the table `sweeps`.
        entries: of all SAEs that were trained here; where there are none, nothing is said.
    """
    if not sweeps:
        return UNTUNED if set(entries) else ""
    first = sweeps[0]
    tuned = {str(row["entry"]) for row in sweeps}
    settings = {(*_place(row)[:3], without_trial(row["setting"])) for row in sweeps}
    missed = sorted(
        f"{row['entry']} ({row['source']}, L0 {float(row['selection_l0']):.3g})"
        for row in sweeps
        if int(row["is_chosen"]) and not int(row["is_within"])
    )
    parts = [
        f"Tuned: of {int(first['trials'])} trials of each of {_count(len(settings), 'setting', 'settings')} the one with "
        f"the lowest FVU among those of mean L0 {float(first['l0_limit']):.3g} at most is shown, and {len(left_out(sweeps))} of "
        f"{len(sweeps)} trials are left out. They were chosen on a part of the held-out documents, images or samples; "
        "numbers include it everywhere but in table_sweep."
    ]
    if missed:
        parts.append(
            f"No trial came down to this L0, and the nearest is shown: {', '.join(missed)}."
        )
    if others := sorted({str(entry) for entry in entries} - tuned):
        parts.append(f"Untuned: {_count(len(others), 'other entry', 'other entries')} of saes.")
    return " ".join(parts)


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def _place(row: Mapping[Any, Any]) -> Place:
    return row["source"], row["hook_point"], row["entry"], row["setting"]
