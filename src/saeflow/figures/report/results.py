"""The report's tables of results: one per panel, SAEs first, then baselines."""

import math
from collections.abc import Sequence
from typing import Any

from saeflow.figures import style
from saeflow.tables.compare import Panel, panel_title
from saeflow.tables.files import Row
from saeflow.tables.metrics import METRICS
from saeflow.tables.numbers import natural
from saeflow.tables.render import best, mean_and_deviation, note, panels, shown
from saeflow.tables.runs import is_baseline, setting_words
from saeflow.tables.schema import label

_MOST_COLUMNS = 13
"""Metrics of one table: a laptop's window and a printed page are as wide."""


def sections(
    summary: Sequence[Row], unmeasured: Sequence[Row], tuning: str = ""
) -> list[dict[str, Any]]:
    """Return what the page shows of each panel.

    Args:
        summary: lines of the table `summary`.
        unmeasured: rows of the table of that name.
        tuning: the sentence on tuning.
    """
    sections = []
    for panel, lines in panels(summary).items():
        names = shown(lines)
        saes = [line for line in lines if not is_baseline(line)]
        ordered = sorted(lines, key=_order)
        strong = [best(ordered, name) for name in names]
        sections.append(
            {
                "title": panel_title(Panel(*panel)),
                "has_sizes": len({line["d_sae"] for line in saes}) > 1,
                "has_schedules": any(line["schedule"] != "constant" for line in saes),
                "columns": [{"name": label(name), "unit": METRICS[name].unit} for name in names],
                "parts": _parts(len(names)),
                "lines": [
                    _line(line, names, [number in found for found in strong])
                    for number, line in enumerate(ordered)
                ],
                "note": note(lines, unmeasured, tuning),
            }
        )
    return sections


def _parts(columns: int) -> list[slice]:
    """Divide the metrics of a panel into tables of about equally many columns."""
    tables = max(1, math.ceil(columns / _MOST_COLUMNS))
    size = max(1, math.ceil(columns / tables))
    return [slice(start, start + size) for start in range(0, columns, size)] or [slice(0, 0)]


def _order(line: Row) -> tuple[Any, ...]:
    return (
        is_baseline(line),
        style.rank(line["variant"], line["entry"]),
        natural(line["entry"]),
        natural(line["setting"]),
    )


def _line(line: Row, metrics: Sequence[str], strong: Sequence[bool]) -> dict[str, Any]:
    look = style.look(line["variant"], line["entry"])
    baseline = is_baseline(line)
    cells = [mean_and_deviation(line, metric) for metric in metrics]
    return {
        "color": look.color,
        "entry": look.label if baseline else line["entry"],
        "setting": ""
        if line["variant"] in ("identity", "mean")
        else setting_words(line["setting"]),
        "d_sae": "" if baseline else f"{int(line['d_sae']):,}",
        "schedule": "" if baseline else line["schedule"],
        "seeds": "" if baseline else line["seeds"],
        "is_baseline": baseline,
        "cells": [
            {"mean": mean, "sd": spread, "best": is_best}
            for (mean, spread), is_best in zip(cells, strong, strict=True)
        ],
    }
