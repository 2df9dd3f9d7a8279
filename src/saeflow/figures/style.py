"""Style of every figure: sizes, type, one colour and marker per variant.

The colours of the variants differ by at least 23 in CIE 1976 Lab from each other, for normal vision and
under simulated protanopia, deuteranopia and tritanopia (Machado et al. 2009, severity 1); markers differ
too, so that a print in grey can be read.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from saeflow.tables.runs import RANDOM_DECODER, variant_label

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLUMN_WIDTH = 3.4  # inches, one column of a two-column paper
TEXT_WIDTH = 7.0  # inches, the whole page
PAGE_HEIGHT = 9.0  # inches, of which no figure takes more
PNG_DPI = 300
INK = "#222222"
FAINT = "#BBBBBB"
MARK = "#C00000"

RC = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.labelpad": 3,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 5,
    "axes.titlesize": 8,
    "figure.constrained_layout.h_pad": 0.04,
    "figure.constrained_layout.w_pad": 0.04,
    "figure.dpi": 100,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same bytes on every machine
    "font.size": 7.5,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "legend.borderaxespad": 0.2,
    "legend.columnspacing": 1.2,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 1.9,
    "legend.handletextpad": 0.5,
    "legend.labelspacing": 0.35,
    "lines.linewidth": 1.1,
    "lines.markersize": 4,
    "pdf.fonttype": 42,
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "saeflow",
    "text.color": INK,
    "xtick.color": INK,
    "xtick.labelsize": 7,
    "xtick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "xtick.minor.size": 1.5,
    "xtick.minor.width": 0.4,
    "ytick.color": INK,
    "ytick.labelsize": 7,
    "ytick.major.size": 2.5,
    "ytick.major.width": 0.6,
    "ytick.minor.size": 1.5,
    "ytick.minor.width": 0.4,
}


@dataclass(frozen=True)
class Look:
    """Colour, marker and name of one variant in every figure."""

    label: str
    color: str
    marker: str


VARIANTS = {
    variant: Look(variant_label(variant), color, marker)
    for variant, color, marker in (
        ("relu", "#4FA95D", "v"),
        ("gated", "#0E370D", "D"),
        ("jumprelu", "#CD9F07", "P"),
        ("p_anneal", "#F17CB5", "<"),
        ("topk", "#2777E7", "o"),
        ("batch_topk", "#04B7FB", "s"),
        ("matryoshka", "#1F1388", "^"),
        ("soft_topk", "#883753", "X"),
        ("adaptive_k", "#AE440E", ">"),
        ("sparsemax", "#9760AE", "*"),
        ("entmax", "#540056", "h"),
        ("feature_choice", "#0931D0", "d"),
        ("matching_pursuit", "#8E2FAB", "H"),
        ("top_afa", "#F10284", "8"),
        ("abs_topk", "#5A794E", "p"),
    )
}
BASELINES = {
    name: Look(variant_label(name), color, marker)
    for name, color, marker in (
        (RANDOM_DECODER, "#555555", "d"),
        ("pca", "#8A8A8A", "."),
        ("mean", "#A8A8A8", "_"),
        ("identity", "#C4C4C4", "_"),
    )
}
_SPARE = (("#7A7A00", "p"), ("#006D6D", "H"), ("#B00060", "8"))  # for a variant added later
LINE_STYLES = (
    "-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)), (0, (8, 2)), (0, (4, 1.2, 1, 1.2, 1, 1.2)),
)  # fmt: skip


def look(variant: str, entry: str = "") -> Look:
    """Colour, marker and label of a variant or baseline, the same in every figure.

    Args:
        variant: the tables' column.
        entry: the tables' column; an entry whose name holds `random-decoder` is a baseline,
            whatever its variant.
    """
    if RANDOM_DECODER in entry:
        return BASELINES[RANDOM_DECODER]
    known = VARIANTS.get(variant) or BASELINES.get(variant)
    if known is not None:
        return known
    color, marker = _SPARE[zlib.crc32(variant.encode()) % len(_SPARE)]
    return Look(variant_label(variant), color, marker)


def rank(variant: str, entry: str = "") -> int:
    """Place of a variant in legends and rows."""
    return rank_of(look(variant, entry))


def rank_of(look: Look) -> int:
    """Place of a look in legends and rows: variants, those added later, baselines."""
    fixed = [*VARIANTS.values(), None, *BASELINES.values()]
    return fixed.index(look) if look in fixed else len(VARIANTS)


def shades(color: str, count: int) -> list[tuple[float, float, float]]:
    """`count` tints of a colour, from light to the colour itself."""
    from matplotlib.colors import to_rgb

    base = to_rgb(color)
    weights = [1.0] if count == 1 else [0.4 + 0.6 * i / (count - 1) for i in range(count)]
    return [(1 - w + w * base[0], 1 - w + w * base[1], 1 - w + w * base[2]) for w in weights]


@contextmanager
def context() -> Iterator[None]:
    """matplotlib with saeflow's style and nothing of the user's own settings."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(RC)
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure (inches) whose layout leaves no label outside."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plain(value: float, _position: int = 0) -> str:
    """A tick label: 0.05, 8, 200, 10k, 2M."""
    return _written(value, abs(value))


def _written(value: float, size: float) -> str:
    """A number in the unit of numbers of a size."""
    if value and size >= 999_500:
        return f"{value / 1e6:.3g}M"
    if value and size >= 9_999.5:
        return f"{value / 1e3:.3g}k"
    return f"{value:.4g}"


def even_ticks(target: Axis, most: int) -> None:
    """Put ticks at round numbers of a linear axis, all of them written in the unit of the largest.

    Args:
        target: `ax.xaxis` or `ax.yaxis`.
        most: intervals between ticks at most.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    def label(value: float, _position: int) -> str:
        low, high = sorted(target.get_view_interval())
        shown = [abs(tick) for tick in target.get_majorticklocs() if low <= tick <= high]
        return _written(value, max(shown, default=abs(value)))

    target.set_major_locator(MaxNLocator(most))
    target.set_major_formatter(FuncFormatter(label))


def log_axis(ax: Axes, axis: str, low: float, high: float) -> None:
    """A logarithmic axis over [low, high] with few, plainly written ticks.

    Args:
        axis: "x" or "y".
        low, high: limits, positive.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    getattr(ax, f"set_{axis}scale")("log")
    getattr(ax, f"set_{axis}lim")(low, high)
    subs = [1.0, 2.0, 5.0] if high / low <= 30 else [1.0, 3.0] if high / low <= 300 else [1.0]
    target = ax.xaxis if axis == "x" else ax.yaxis
    target.set_major_locator(LogLocator(subs=subs, numticks=20))
    target.set_major_formatter(FuncFormatter(plain))
    target.set_minor_locator(
        LogLocator(subs=tuple(range(2, 10)), numticks=20) if high / low <= 1e5 else NullLocator()
    )
    target.set_minor_formatter(NullFormatter())


def l0_axis(ax: Axes, low: float, high: float) -> None:
    """A logarithmic x axis over [low, high] whose ticks are powers of two, as k usually is."""
    from matplotlib.ticker import FixedLocator, NullLocator

    log_axis(ax, "x", low, high)
    powers = np.arange(np.ceil(np.log2(low)), np.floor(np.log2(high)) + 1)
    every = -(-len(powers) // 8) or 1
    first = len(powers) % every and (len(powers) - 1) % every
    ax.xaxis.set_major_locator(FixedLocator(list(2.0 ** powers[int(first) :: every])))
    ax.xaxis.set_minor_locator(NullLocator())


def legend_columns(labels: list[str], width: float) -> int:
    """Columns of the most even legend that fits into `width` inches."""
    widest = 0.45 + 0.056 * max(map(len, labels))
    fitting = max(1, min(len(labels), int(width / widest)))
    return -(-len(labels) // -(-len(labels) // fitting))


def legend_below(figure: Figure, legend: Mapping[str, Artist]) -> None:
    """Put a legend (handles by label) below all panels, in columns that fit the width of the text."""
    columns = legend_columns(list(legend), TEXT_WIDTH)
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=columns)


def marked(caption: str, mark: str) -> str:
    """A caption with the mark before it, where there is one."""
    return f"{mark}. {caption}" if mark else caption


def save(figure: Figure, stem: Path, mark: str = "") -> None:
    """Write STEM.svg, .pdf and .png, with a mark across them: the same figure gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # placed once, so that all three formats are alike
    if mark:
        width, height = figure.get_size_inches()
        # Letters of DejaVu Sans are about 0.7 of their size wide; 72 points are an inch.
        size = min(0.8 * 72 * width / (0.7 * len(mark)), 0.6 * 72 * height)
        figure.text(
            0.5, 0.5, mark, size=size, color=MARK, alpha=0.25, ha="center", va="center", zorder=1000
        )
    # The canvases' own methods: savefig would draw everything a second time to place it again.
    FigureCanvasSVG(figure).print_svg(
        stem.with_suffix(".svg"), metadata={"Date": None, "Creator": "saeflow"}
    )
    nothing = {"Creator": None, "Producer": None, "CreationDate": None}
    FigureCanvasPdf(figure).print_pdf(stem.with_suffix(".pdf"), metadata=nothing)
    figure.set_dpi(PNG_DPI)
    FigureCanvasAgg(figure).print_png(stem.with_suffix(".png"), metadata={"Software": None})
