"""Figures and the report, from the tables alone: no model is loaded, no metric computed."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from saeflow.errors import UserError
from saeflow.figures import style
from saeflow.figures.figure import Drawing, TableFigure
from saeflow.figures.needs import Asked
from saeflow.figures.registry import FIGURES, TABLES, find
from saeflow.files import atomic_file
from saeflow.tables.files import write_text
from saeflow.tables.load import Tables, load_tables

__all__ = ["FIGURES", "TABLES", "Drawing", "Tables", "check_figures", "draw", "load_tables"]


def check_figures(params: Mapping[str, Any], runs: Iterable[Any]) -> None:
    """Refuse a figure that would find no data.

    Args:
        params: valid parameters.
        runs: their `SAEConfig`s.

    Raises:
        UserError: `figures.names` has some, a line each.
    """
    asked = Asked(params, runs)
    found = []
    for name in params["figures"]["names"]:
        needs = find(name).needs
        if needs is not None and not needs.is_there(asked):
            found.append(
                f"figures.names: {name} needs {needs.what}; these parameters have none. Add it, or take {name} out."
            )
    if found:
        raise UserError(*found)


def draw(name: str, tables: Path, options: Mapping[str, Any], folder: Path) -> None:
    """Draw one figure, or write one table, with its data.

    Args:
        name: a key of FIGURES or TABLES.
        tables: folder with the tables that `collect` wrote.
        options: `figures` of the parameters without the names; `mark`, where it is there, is printed across a
            figure and at the head of its caption.
        folder: written: NAME.csv (the numbers), caption.md, and of a figure .svg, .pdf, .png (300 dpi), the
            same of its pages of details as NAME-details-N, of a table .md and .tex.

    Raises:
        UserError: an unknown figure, a table that is missing or damaged, a figure that no run of the
            tables belongs in, or one whose runs differ in budget.
    """
    figure, mark = find(name), options.get("mark", "")
    known = load_tables(tables)
    texts = {}
    if isinstance(figure, TableFigure):
        table = figure.draw(known, options)
        table = replace(table, caption=_captioned(table.caption, known, mark))
        data, texts["caption.md"] = table.data, table.caption + "\n"
        printed = figure.printed(table)
        texts[f"{name}.md"] = f"{printed.markdown()}\n\n{table.caption}\n"
        texts[f"{name}.tex"] = printed.latex()
        folder.mkdir(parents=True, exist_ok=True)
    else:
        with style.context():
            drawing = figure.draw(known, options)
            folder.mkdir(parents=True, exist_ok=True)
            style.save(drawing.figure, folder / name, mark)
            for number, page in enumerate(drawing.details, start=1):
                style.save(page, folder / f"{name}-details-{number}", mark)
        data, texts["caption.md"] = drawing.data, _captioned(drawing.caption, known, mark) + "\n"
    with atomic_file(folder / f"{name}.csv") as staged:
        data.to_csv(staged, index=False, lineterminator="\n", float_format="%.12g")
    for file, text in texts.items():
        write_text(folder / file, text)


def _captioned(caption: str, tables: Tables, mark: str) -> str:
    """Return a figure's caption with what all of them say: how SAEs were tuned, and the mark."""
    return style.marked(f"{caption} {tables.tuning}".rstrip(), mark)
