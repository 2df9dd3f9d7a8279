"""A figure or table of the report: one file declares its title, its needs and how it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from saeflow.errors import UserError
from saeflow.figures.needs import Need
from saeflow.tables.load import Tables
from saeflow.tables.numbers import natural, significant
from saeflow.tables.render import Printed
from saeflow.tables.runs import settings_words
from saeflow.tables.schema import Column, fact, heading

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


@dataclass(frozen=True)
class Drawing:
    """A drawn figure.

    Attributes:
        figure: drawn, not yet written.
        data: the plotted numbers.
        caption: one paragraph of plain text.
        details: pages of an appendix, each drawn like the figure and no taller than a page.
    """

    figure: Canvas
    data: pd.DataFrame
    caption: str
    details: tuple[Canvas, ...] = ()


@dataclass(frozen=True)
class PaperTable:
    """A table of a paper.

    Attributes:
        data: as it is written to CSV; `evaluated_on` is left out where every SAE is measured on its own source.
        caption: one paragraph of plain text.
    """

    data: pd.DataFrame
    caption: str

    def __post_init__(self) -> None:
        if "evaluated_on" in self.data and (self.data["evaluated_on"] == self.data["source"]).all():
            object.__setattr__(self, "data", self.data.drop(columns="evaluated_on"))


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture that the report can hold; declared as FIGURE in a file of `figures.plots`.

    Attributes:
        title: heading in the report.
        draw: takes the tables and `figures` of the parameters; raises UserError where no run belongs in it, or where
            runs differ in budget.
        needs: what the parameters must have; None for what every parameter file has.
    """

    title: str
    draw: Callable[[Tables, Mapping[str, Any]], Drawing]
    needs: Need | None = None


@dataclass(frozen=True, kw_only=True)
class TableFigure:
    """A table that the report can hold; declared as FIGURE in a file of `figures.papers`.

    Attributes:
        title, draw, needs: as of Figure.
        columns: those that no table of `results/tables` has, by name.
    """

    title: str
    draw: Callable[[Tables, Mapping[str, Any]], PaperTable]
    needs: Need | None = None
    columns: Mapping[str, Column] = field(default_factory=dict)

    def printed(self, table: PaperTable) -> Printed:
        """Return the table as it is printed in Markdown, LaTeX and the report."""
        data = table.data
        is_number = [pd.api.types.is_numeric_dtype(data[name]) for name in data]
        words = is_number.index(True) if any(is_number) else len(is_number)
        names = [str(name) for name in data.columns]
        head = [self._heading(name) for name in names]
        if "setting" in data:
            data = data.assign(setting=settings_words(list(data["setting"])))
        body = [
            [str(value) for value in line[:words]]
            + [self._cell(*cell) for cell in zip(names[words:], line[words:], strict=True)]
            for line in data.itertuples(index=False, name=None)
        ]
        return Printed(head, words, body, table.caption)

    def _heading(self, name: str) -> str:
        own = self.columns.get(name)
        return own.label if own and own.label else heading(name)

    def _cell(self, name: str, value: Any) -> str:
        if value is None or pd.isna(value):
            return ""
        known = self.columns.get(name) or fact(name)
        return known.text(value) if known else significant(value)


def ordered(data: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Return lines in natural order of some columns (k8 before k32)."""
    places = [[natural(str(value)) for value in line] for line in data[by].to_numpy()]
    order = sorted(range(len(data)), key=lambda i: places[i])
    return data.iloc[order].reset_index(drop=True)


def without_data(name: str, lacking: str) -> UserError:
    """Return the refusal of a figure that the tables have nothing for."""
    return UserError(
        f"figures.names: {name} needs {lacking}, the tables have none. Take {name} out of figures.names in params.yaml."
    )
