"""The figures and tables that there are: every file of `figures.plots` and `figures.papers` declares one."""

import importlib
import pkgutil
from typing import Any

from saeflow.errors import UserError
from saeflow.figures import papers, plots
from saeflow.figures.figure import Figure, TableFigure


def _declared(package: Any) -> dict[str, Any]:
    """Return FIGURE of each file of a package, by the file's name."""
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return {name: importlib.import_module(f"{package.__name__}.{name}").FIGURE for name in names}


FIGURES: dict[str, Figure] = _declared(plots)
TABLES: dict[str, TableFigure] = _declared(papers)


def find(name: str) -> Figure | TableFigure:
    """Return a figure or table by its name in `figures.names`.

    Raises:
        UserError: there is none of this name.
    """
    known: dict[str, Figure | TableFigure] = {**FIGURES, **TABLES}
    if name not in known:
        raise UserError(
            f"figures.names: unknown figure {name!r}. Known: {', '.join(known)}. Fix params.yaml."
        )
    return known[name]
