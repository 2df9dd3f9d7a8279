"""Needs as a table for a terminal."""

from saeflow.needs.steps import Need, Needs

MANY_WINDOWS = 10
"""Windows of a store, beside which one window more is little."""


def as_text(*needs: Needs, free: float | None = None) -> str:
    """A table of the steps and their sum, for a terminal.

    Args:
        needs: of the same parameters, on one machine or several.
        free: bytes that are free where results are written, if that is known.
    """
    machines = [list(one.steps()) for one in needs]
    sums = []
    for steps in machines:
        jobs, disk = sum(s.jobs for s in steps), sum(s.disk for s in steps)
        memory, hours = max(s.memory for s in steps), sum(s.hours for s in steps)
        sums.append(Need("sum", "one job after the other", jobs, disk, memory, hours))
    times = (
        ["time of one device"]
        if len(needs) == 1
        else [f"time, {one.rates.device}" for one in needs]
    )
    lines = [("step", "of what", "jobs", "disk", "memory of a process", *times)]
    for alike in [*zip(*machines, strict=True), sums]:
        need = alike[0]
        row = (need.step, need.what, f"{need.jobs:,}", _bytes(need.disk), _bytes(need.memory))
        lines.append((*row, *(_time(one.hours) for one in alike)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    first = needs[0]
    peaks = [first.disk + first.merging_disk(count) for count in (None, 1, MANY_WINDOWS)]
    ways = [
        f"{_bytes(peaks[0])} with the windows of these parameters",
        f"{_bytes(peaks[1])} with stores of one window",
        f"{_bytes(peaks[2])} with {MANY_WINDOWS} windows of each (stores.NAME.window_rows)",
    ]
    is_windowed = first.merging_disk() != first.merging_disk(1)
    notes = [f"Disk at the peak: {'; '.join(ways[not is_windowed :])}."]
    if free is not None:
        fits = peaks[0] <= free
        hint = (
            ""
            if fits
            else f" {MANY_WINDOWS} windows {'fit' if peaks[2] <= free else 'do not fit either'}."
        )
        notes.append(
            f"Free disk here: {_bytes(free)}, which is {'enough' if fits else 'too little'} for these parameters.{hint}"
        )
    for one in needs:
        assumed = ", ".join(one.rates.arithmetic)
        notes.append(
            f"At the rates of: {one.rates.machine}."
            + (f" Arithmetic, not measured: {assumed}." if assumed else "")
        )
    return "\n".join([*table, "", *notes])


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            return (
                f"{number:,.{0 if unit == 'B' or number >= 10 else 1}f} {unit}" if number else "-"
            )
        number /= 1000
    raise AssertionError


def _time(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:,.0f} h"
