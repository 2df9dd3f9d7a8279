"""A figure with the numbers it shows and its caption."""

from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawing:
    """What a function of FIGURES returns.

    Attributes:
        figure: drawn, not yet written.
        data: the plotted numbers.
        caption: one paragraph of plain text.
    """

    figure: Figure
    data: pd.DataFrame
    caption: str
