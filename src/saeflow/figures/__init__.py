"""Figures and the report, from the tables alone: no model is loaded, no metric computed."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from saeflow.errors import UserError
from saeflow.figures import style
from saeflow.figures.adaptivity import adaptivity
from saeflow.figures.classification import top_concepts
from saeflow.figures.complexity import complexity
from saeflow.figures.concepts import concepts, simple_to_complex
from saeflow.figures.controls import controls
from saeflow.figures.curves import training
from saeflow.figures.distributions import firing_rates, l0_histograms
from saeflow.figures.drawing import Drawing
from saeflow.figures.follows import k_complexity, k_dimension
from saeflow.figures.formulas import ev_formulas
from saeflow.figures.fronts import ce_l0, fvu_l0, recovery
from saeflow.figures.paper_tables import TABLES
from saeflow.figures.probe_layers import probe_layers
from saeflow.figures.probing import probing
from saeflow.figures.schedules import schedules
from saeflow.figures.sizes import dictionary_size
from saeflow.figures.stability import stability
from saeflow.figures.tables import Tables, load_tables
from saeflow.files import atomic_file

__all__ = ["FIGURES", "TABLES", "Drawing", "Tables", "draw", "load_tables"]

FIGURES: dict[str, Callable[[Tables, Mapping[str, Any]], Drawing]] = {
    "fvu_l0": fvu_l0,
    "ce_l0": ce_l0,
    "training": training,
    "schedules": schedules,
    "l0_histograms": l0_histograms,
    "firing_rates": firing_rates,
    "recovery": recovery,
    "complexity": complexity,
    "top_concepts": top_concepts,
    "concepts": concepts,
    "simple_to_complex": simple_to_complex,
    "adaptivity": adaptivity,
    "controls": controls,
    "ev_formulas": ev_formulas,
    "stability": stability,
    "dictionary_size": dictionary_size,
    "k_complexity": k_complexity,
    "k_dimension": k_dimension,
    "probe_layers": probe_layers,
    "probing": probing,
}


def draw(figure: str, tables: Path, options: Mapping[str, Any], folder: Path) -> None:
    """Draw one figure, or write one table, with its data.

    Args:
        figure: a key of FIGURES or TABLES.
        tables: folder with the tables that `collect` wrote.
        options: `figures` of the parameters without the names; `mark`, where it is there, is printed across a
            figure and at the head of its caption.
        folder: written: FIGURE.csv (the numbers), caption.md, and of a figure .svg, .pdf, .png (300 dpi), of
            a table .md and .tex.

    Raises:
        UserError: an unknown figure, a table that is missing or damaged, a figure that no run of the
            tables belongs in, or one whose runs differ in budget.
    """
    known = load_tables(tables) if figure in FIGURES or figure in TABLES else None
    if known is None:
        raise UserError(
            f"figures.names: unknown figure {figure!r}. Known: {', '.join([*FIGURES, *TABLES])}. Fix params.yaml."
        )
    texts, mark = {}, options.get("mark", "")
    if figure in TABLES:
        table = TABLES[figure](known, options)
        table = replace(table, caption=style.marked(table.caption, mark))
        data, texts["caption.md"] = table.data, table.caption + "\n"
        texts |= {f"{figure}.md": table.markdown(), f"{figure}.tex": table.latex()}
        folder.mkdir(parents=True, exist_ok=True)
    else:
        with style.context():
            drawing = FIGURES[figure](known, options)
            folder.mkdir(parents=True, exist_ok=True)
            style.save(drawing.figure, folder / figure, mark)
        data, texts["caption.md"] = drawing.data, style.marked(drawing.caption, mark) + "\n"
    with atomic_file(folder / f"{figure}.csv") as staged:
        data.to_csv(staged, index=False, lineterminator="\n", float_format="%.12g")
    for name, text in texts.items():
        with atomic_file(folder / name) as staged:
            staged.write_text(text, encoding="utf-8")
