"""Series of runs as figures show them: what one line goes through, in the legend's order, with labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from saeflow.figures import style
from saeflow.tables import compare
from saeflow.tables.load import Tables
from saeflow.tables.numbers import natural
from saeflow.tables.runs import setting_words

if TYPE_CHECKING:
    from matplotlib.artist import Artist

ESTIMATORS = {"mle": "maximum likelihood", "twonn": "TwoNN"}
"""Estimators of local intrinsic dimension, as panels name them."""


@dataclass(frozen=True)
class Series:
    """Runs that one line goes through."""

    rows: pd.DataFrame
    look: style.Look
    label: str


def series_of(rows: pd.DataFrame) -> list[Series]:
    """Split the runs of one panel into series, in the legend's order, each with a label of its own.

    A label is the variant's name; where the panel shows several series of a variant, what they
    differ in is added: what the entry's name adds to the variant's, d_sae, schedule, else the setting.
    """
    keyed = sorted(
        rows.groupby("series", sort=False),
        key=lambda item: (
            style.rank(item[1]["variant"].iloc[0], item[1]["entry"].iloc[0]),
            natural(item[1]["entry"].iloc[0]),
            natural(str(item[0])),
        ),
    )
    looks = [style.look(held["variant"].iloc[0], held["entry"].iloc[0]) for _, held in keyed]
    found = []
    for i, (_, held) in enumerate(keyed):
        twins = [j for j, chosen in enumerate(looks) if chosen == looks[i]]
        label = _label(_first(held), [_first(keyed[j][1]) for j in twins], looks[i])
        found.append(Series(held, looks[i], label))
    return found


def _first(held: pd.DataFrame) -> pd.Series:
    """The run that names a series: one whose entry is called what its variant is, where there is one."""
    own = held[[not _own_name(row) for _, row in held.iterrows()]]
    return (own if len(own) else held).iloc[0]


def _own_name(row: pd.Series) -> str:
    """Return an entry's name without source and variant: `mlp` of the source scenes' scenes-sparsemax-mlp."""
    name = str(row["entry"]).removeprefix(f"{row['source']}-")
    variant = str(row["variant"]).replace("_", "-")
    return "" if name == variant else name.removeprefix(f"{variant}-")


def _entry_name(row: pd.Series, chosen: style.Look, entries: int) -> str:
    """Return the name of a look; where several entries have it, with what this entry's name adds to the variant's."""
    own = _own_name(row) if entries > 1 else ""
    return f"{chosen.label} ({own})" if own else chosen.label


def _label(row: pd.Series, twins: list[pd.Series], chosen: style.Look) -> str:
    parts = [_entry_name(row, chosen, len({twin["entry"] for twin in twins}))]
    if len({twin["d_sae"] for twin in twins}) > 1:
        parts.append(f"{row['d_sae']:g} latents")
    same = [
        twin for twin in twins if (twin["entry"], twin["d_sae"]) == (row["entry"], row["d_sae"])
    ]
    if len({twin["schedule"] for twin in same}) > 1:
        parts.append(str(row["schedule"]))
    if len([twin for twin in same if twin["schedule"] == row["schedule"]]) > 1:
        words = setting_words(str(row["setting"])).split(", ")
        parts += [word for word in words if not word.startswith("k = ")]
    return ", ".join(parts)


def each_setting(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Settings of a series in natural order (k8 before k32): runs of one size and k, whichever entry asked for them."""
    k = "k_target" if "k_target" in rows else "k"
    known = rows.drop_duplicates("run").to_dict("records")
    settings = {
        row["run"]: row["setting"] if pd.isna(row[k]) else f"d{row['d_sae']:g}-k{row[k]:g}"
        for row in known
    }
    of_row = rows["run"].map(settings)
    for setting in sorted(set(settings.values()), key=natural):
        yield setting, rows[of_row == setting]


def entry_labels(rows: pd.DataFrame) -> list[str]:
    """A label for each row: its variant and setting, and what tells it from the others: entry, size, seed."""
    looks = [style.look(row["variant"], row["entry"]) for _, row in rows.iterrows()]
    entries = {
        look: {e for e, same in zip(rows["entry"], looks, strict=True) if same == look}
        for look in looks
    }
    sizes = rows.groupby("entry")["d_sae"].transform("nunique")
    has_seeds = rows.duplicated(["entry", "setting"], keep=False)
    labels = []
    for (_, row), look, n_sizes, several in zip(
        rows.iterrows(), looks, sizes, has_seeds, strict=True
    ):
        size = f"{row['d_sae']:,.0f} latents" if n_sizes > 1 else ""
        seed = f"seed {row['seed']:g}" if several else ""
        parts = [_entry_name(row, look, len(entries[look])), size, setting_label(row), seed]
        labels.append(", ".join(filter(None, parts)))
    return labels


def setting_label(row: Mapping[Any, Any] | pd.Series, k: str = "k") -> str:
    """Return the label that distinguishes a setting within its series: its k, or its penalty."""
    if not pd.isna(row[k]):
        return f"k = {row[k]:g}"
    return setting_words(str(row["setting"]))


Places = Mapping[str, int]
"""By label of a series: its place among those of the same colour."""

_TWINS = ("s", "^", "D", "v", "p")
"""Open markers of a variant's third, fourth ... label."""


def places_of(tables: Tables) -> dict[str, int]:
    """Return each series' place among those of its colour, over all that the tables hold.

    A figure asks with all tables, whatever it shows of them, so that a series looks the same in every figure.
    """
    rows = compare.of_one_size(tables.wide)
    found = [
        one
        for panel in compare.panels_of(rows)
        for one in series_of(compare.one_panel(rows, panel))
    ]
    colors: dict[str, str] = {}
    places: dict[str, int] = {}
    for one in sorted(found, key=lambda one: (style.rank_of(one.look), natural(one.label))):
        if one.label not in colors:
            places[one.label] = sum(color == one.look.color for color in colors.values())
            colors[one.label] = one.look.color
    return places


def in_order(legend: Mapping[str, Artist], places: Places) -> dict[str, Artist]:
    """Return a legend in the order of `places_of`, what is no series after it."""
    known = [label for label in places if label in legend]
    return {label: legend[label] for label in [*known, *(x for x in legend if x not in known)]}


def marker_of(one: Series, places: Places) -> str:
    """Return the marker of a series: its variant's, also of a second one, which is open; then others."""
    place = places.get(one.label, 0)
    return one.look.marker if place < 2 else _TWINS[(place - 2) % len(_TWINS)]


def stroke(one: Series, places: Places) -> dict[str, Any]:
    """Return how a series is drawn: those of one variant differ in dashes and markers."""
    place = places.get(one.label, 0)
    dash = style.LINE_STYLES[place % len(style.LINE_STYLES)]
    drawn = {"color": one.look.color, "marker": marker_of(one, places), "ls": dash}
    return drawn | ({"markerfacecolor": "white"} if place else {})
