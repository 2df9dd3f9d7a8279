"""The report's tables of results: one per panel, SAEs first, then baselines."""

import re
from collections.abc import Sequence
from typing import Any

from saeflow.figures import style
from saeflow.tables.compare import Panel, panel_title
from saeflow.tables.files import Row
from saeflow.tables.metrics import METRICS
from saeflow.tables.numbers import natural
from saeflow.tables.render import mean_and_deviation, note, panels, shown
from saeflow.tables.runs import is_baseline
from saeflow.tables.schema import label


def sections(summary: Sequence[Row]) -> list[dict[str, Any]]:
    """Return what the page shows of each panel.

    Args:
        summary: lines of the table `summary`.
    """
    found = []
    for panel, lines in panels(summary).items():
        names = shown(lines)
        saes = [line for line in lines if not is_baseline(line)]
        found.append(
            {
                "title": panel_title(Panel(*panel)),
                "has_sizes": len({line["d_sae"] for line in saes}) > 1,
                "has_schedules": any(line["schedule"] != "constant" for line in saes),
                "columns": [{"name": label(name), "unit": METRICS[name].unit} for name in names],
                "lines": [_line(line, names) for line in sorted(lines, key=_order)],
                "note": note(lines),
            }
        )
    return found


def _order(line: Row) -> tuple[Any, ...]:
    return (
        is_baseline(line),
        style.rank(line["variant"], line["entry"]),
        natural(line["entry"]),
        natural(line["setting"]),
    )


def _line(line: Row, metrics: Sequence[str]) -> dict[str, Any]:
    look = style.look(line["variant"], line["entry"])
    baseline = is_baseline(line)
    cells = [mean_and_deviation(line, metric) for metric in metrics]
    return {
        "color": look.color,
        "entry": look.label if baseline else line["entry"],
        "setting": "" if line["variant"] in ("identity", "mean") else _setting(line["setting"]),
        "d_sae": "" if baseline else f"{int(line['d_sae']):,}",
        "schedule": "" if baseline else line["schedule"],
        "seeds": "" if baseline else line["seeds"],
        "is_baseline": baseline,
        "cells": [{"mean": mean, "sd": spread} for mean, spread in cells],
    }


def _setting(setting: str) -> str:
    """A setting without its number of latents: k = 8; l1 = 0.5."""
    rest = re.sub(r"^d\d+-?", "", setting)
    return re.sub(r"(^|-)(k|l1)(?=[\d.])", r"\1\2 = ", rest)
