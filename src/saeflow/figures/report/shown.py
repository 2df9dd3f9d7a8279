"""Figures, tables and schedules as the report's page shows them."""

import base64
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from saeflow.errors import UserError
from saeflow.figures import style
from saeflow.figures.figure import PaperTable, TableFigure
from saeflow.figures.registry import find
from saeflow.figures.report.records import values_of
from saeflow.figures.series import each_setting, series_of
from saeflow.tables import compare
from saeflow.tables.numbers import natural

_SPARK = (150.0, 34.0)  # pixels


@dataclass(frozen=True)
class Line:
    """One polyline of a small drawing."""

    points: str
    color: str


def shown_figure(folder: Path, root: Path) -> dict[str, Any]:
    """A figure or a table as the page shows it.

    Raises:
        UserError: one of its files is missing.
    """
    name = folder.name
    figure = find(name)
    kinds = (
        ("csv", "md", "tex") if isinstance(figure, TableFigure) else ("svg", "pdf", "png", "csv")
    )
    files = {kind: folder / f"{name}.{kind}" for kind in kinds}
    for path in (*files.values(), folder / "caption.md"):
        if not path.exists():
            raise UserError(
                f"{path}: no such file. Draw the figure again (snakemake {folder}/provenance.json)."
            )
    caption = (folder / "caption.md").read_text(encoding="utf-8").strip()
    shown: dict[str, Any]
    if isinstance(figure, TableFigure):
        table = figure.printed(PaperTable(pd.read_csv(files["csv"]), caption))
        shown = {"head": table.head, "words": table.words, "body": table.body, "details": []}
    else:
        details = sorted(folder.glob(f"{name}-details-*.svg"), key=lambda path: natural(path.name))
        shown = _picture(files["svg"]) | {
            "details": [
                _picture(path)
                | {"links": [{"kind": "PDF", "href": href(path.with_suffix(".pdf"), root)}]}
                for path in details
            ]
        }
    return {
        "name": name,
        "title": figure.title,
        **shown,
        "caption": caption,
        "alt": caption.partition(". ")[0],
        "links": [{"kind": kind.upper(), "href": href(path, root)} for kind, path in files.items()],
    }


def numbered(figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return figures and tables with their names in the report, counted apart: Figure 1, Table 1."""
    counts = {"Figure": 0, "Table": 0}
    named = []
    for figure in figures:
        kind = "Figure" if "data" in figure else "Table"
        counts[kind] += 1
        named.append(figure | {"number": f"{kind} {counts[kind]}"})
    return named


def _picture(svg: Path) -> dict[str, Any]:
    """Return a picture as the page holds it."""
    content = svg.read_bytes()
    width = re.search(rb'<svg[^>]* width="([\d.]+)pt"', content)
    return {
        "data": base64.b64encode(content).decode(),
        "width": round(float(width.group(1)) * 1.75) if width else 600,
    }


def href(path: Path, root: Path) -> str:
    return quote(Path(os.path.relpath(path, root)).as_posix())


def schedules(steps: pd.DataFrame) -> list[dict[str, Any]]:
    """Show every series' k (or penalty weight) over training in a small drawing."""
    from matplotlib.colors import to_hex

    found = []
    for panel in compare.panels_of(steps):
        for series in series_of(compare.one_panel(steps, panel)):
            column = _scheduled(series.rows)
            if column is None:
                continue
            settings = [held for _, held in each_setting(series.rows)]
            runs = [held[held["run"] == held["run"].iloc[0]] for held in settings]
            colors = [to_hex(shade) for shade in style.shades(series.look.color, len(runs))]
            found.append(
                {
                    "panel": compare.panel_title(panel),
                    "label": series.label,
                    "what": column.replace("_", " "),
                    "schedule": series.rows["schedule"].iloc[0],
                    "starts": values_of(float(run[column].iloc[0]) for run in runs),
                    "ends": values_of(float(run[column].iloc[-1]) for run in runs),
                    "lines": _spark(runs, column, colors),
                }
            )
    return found


def _scheduled(steps: pd.DataFrame) -> str | None:
    """The logged column that a schedule drives, k before weights before the others; else the first that there is."""
    weights = [str(column) for column in steps.columns if str(column).endswith("_weight")]
    found = [
        column
        for column in ("k", *weights, "p", "alpha", "temperature")
        if column in steps and steps[column].notna().all()
    ]
    moving = [c for c in found if (steps.groupby("run")[c].nunique() > 1).any()]
    return next(iter([*moving, *found]), None)


def _spark(runs: Sequence[pd.DataFrame], column: str, colors: Sequence[str]) -> list[Line]:
    """Polylines of a logarithmic drawing of _SPARK pixels."""
    width, height = _SPARK
    values = np.concatenate([run[column].to_numpy(dtype=float) for run in runs])
    positive = values[values > 0]
    if not len(positive):
        return []
    low, high = np.log(positive.min()), np.log(positive.max())
    last = max(float(run["tokens_seen"].max()) for run in runs)
    lines = []
    for run, color in zip(runs, colors, strict=True):
        x = width * run["tokens_seen"].to_numpy(dtype=float) / last
        level = np.log(np.maximum(run[column].to_numpy(dtype=float), positive.min()))
        share = (level - low) / (high - low) if high > low else np.full(len(level), 0.5)
        y = 2 + (height - 4) * (1 - share)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        lines.append(Line(points, color))
    return lines
