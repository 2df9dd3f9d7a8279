"""Needs as tables for a terminal."""

from saeflow.needs.steps import Need, Needs
from saeflow.needs.ways import not_streamed, ways


def as_text(*needs: Needs, free: float | None = None) -> str:
    """A table of the steps and their sum, and one of the ways to hold the stores, for a terminal.

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
    notes = []
    for one in needs:
        assumed = ", ".join(one.rates.arithmetic)
        notes.append(
            f"At the rates of: {one.rates.machine}."
            + (f" Arithmetic, not measured: {assumed}." if assumed else "")
        )
    return "\n".join([*_table(lines, left=2), "", *_of_ways(needs, times, free), "", *notes])


def _of_ways(needs: tuple[Needs, ...], times: list[str], free: float | None) -> list[str]:
    """Lines on the disk at the peak and the time of each way to hold the stores."""
    peaks, hours = {}, {}
    lines = [("stores", "disk at the peak", *times)]
    own = needs[0].peak()
    lines.append(("of these parameters", _bytes(own), *(_time(one.hours()) for one in needs)))
    for each in zip(*map(ways, needs), strict=True):
        way = each[0]
        peaks[way.name], hours[way.name] = way.needs.peak(), way.needs.hours()
        row = (_bytes(peaks[way.name]), *(_time(one.needs.hours()) for one in each))
        lines.append((way.label, *row))
    notes = [
        f"{source} cannot be streamed: {reader} reads rows when training is over."
        for source, reader in not_streamed(needs[0]).items()
    ]
    if free is not None:
        fitting = sorted((hours[name], name) for name in peaks if peaks[name] <= free)
        verdict = "enough" if own <= free else "too little"
        cheapest = f"The cheapest way that fits: {fitting[0][1]}." if fitting else "None fits."
        notes.append(f"Free disk here: {_bytes(free)}, {verdict} for these parameters. {cheapest}")
    return [*_table(lines, left=1), *notes]


def _table(lines: list[tuple[str, ...]], left: int) -> list[str]:
    """Lines of cells as text; so many columns from the left begin at the left."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


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
