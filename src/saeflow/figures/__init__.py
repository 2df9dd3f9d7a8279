"""Figures and the report, from the tables alone: no model is loaded, no metric computed."""

from collections.abc import Callable, Mapping
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
from saeflow.figures.formulas import ev_formulas
from saeflow.figures.fronts import ce_l0, fvu_l0, recovery
from saeflow.figures.schedules import schedules
from saeflow.figures.stability import stability
from saeflow.figures.tables import Tables, load_tables
from saeflow.files import atomic_file

__all__ = ["FIGURES", "Drawing", "Tables", "draw", "load_tables"]

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
}


def draw(figure: str, tables: Path, options: Mapping[str, Any], folder: Path) -> None:
    """Draw one figure and write it with its data.

    Args:
        figure: a key of FIGURES.
        tables: folder with the tables that `collect` wrote.
        options: `figures` of the parameters without the names.
        folder: written: FIGURE.svg, .pdf, .png (300 dpi), .csv (the plotted numbers), caption.md.

    Raises:
        UserError: an unknown figure, a table that is missing or damaged, a figure that no run of the
            tables belongs in, or one whose runs differ in budget.
    """
    if figure not in FIGURES:
        raise UserError(
            f"figures.names: unknown figure {figure!r}. Known: {', '.join(FIGURES)}. Mend params.yaml."
        )
    with style.context():
        drawing = FIGURES[figure](load_tables(tables), options)
        folder.mkdir(parents=True, exist_ok=True)
        style.save(drawing.figure, folder / figure)
    with atomic_file(folder / f"{figure}.csv") as staged:
        drawing.data.to_csv(staged, index=False, lineterminator="\n", float_format="%.12g")
    with atomic_file(folder / "caption.md") as staged:
        staged.write_text(drawing.caption + "\n", encoding="utf-8")
