"""Sentences of captions, made from the numbers that a figure shows."""

from collections.abc import Iterable

import pandas as pd

from saeflow.tables import compare


def listed(words: Iterable[str]) -> str:
    """a; a and b; a, b and c."""
    parts = list(words)
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def compact(value: float) -> str:
    """A count as it is read aloud: 12,000; 2.5 M; 1 G."""
    for size, unit in ((1e9, " G"), (1e6, " M")):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:,.0f}"


def seeds(rows: pd.DataFrame) -> str:
    """State the number of seeds of each setting."""
    counts = rows.groupby(["source", "hook_point", "entry", "setting"])["seed"].nunique()
    low, high = int(counts.min()), int(counts.max())
    return f"{low}" if low == high else f"{low} to {high}"


def seed_sentence(rows: pd.DataFrame) -> str:
    """State the meaning of a front's points and error bars."""
    count = seeds(rows)
    has_bounds = "low" in rows and rows["low"].notna().any()  # one document alone gives none
    resampled = "95 % bootstrap intervals over documents, images or samples" if has_bounds else ""
    if count == "1":
        return "Each point is one seed" + (f", error bars {resampled}." if resampled else ".")
    bars = resampled if resampled and not is_seeded(rows) else "one sample standard deviation"
    return f"Points are means over {count} seeds, error bars {bars}, faint points the single seeds."


def is_seeded(rows: pd.DataFrame) -> bool:
    """Tell whether every setting of an SAE has several seeds, so that all error bars can be deviations over them."""
    saes = rows[compare.is_sae(rows)]
    counts = saes.groupby(["source", "hook_point", "entry", "setting"])["seed"].nunique()
    return len(counts) > 0 and int(counts.min()) > 1


def size_sentence(rows: pd.DataFrame) -> str:
    """State the number of latents of each panel's SAEs."""
    sizes: dict[str, list[str]] = {}
    for panel in compare.panels_of(rows):
        held = compare.one_panel(rows, panel)
        shown = listed(
            f"{size:,.0f}" for size in sorted(held[compare.is_sae(held)]["d_sae"].unique())
        )
        sizes.setdefault(shown, []).append(compare.panel_title(panel))
    if len(sizes) == 1:
        return f"SAEs have {next(iter(sizes))} latents."
    return (
        "Latents: " + "; ".join(f"{size} ({listed(where)})" for size, where in sizes.items()) + "."
    )


def budget_sentence(rows: pd.DataFrame) -> str:
    """State the number of tokens that the runs were trained on."""
    saes = rows[compare.is_sae(rows)]
    tokens = sorted(saes["tokens"].dropna().unique())
    others = sorted(saes.loc[saes["tokens"].isna(), "entry"].unique())
    quoted = listed(f"“{name}”" for name in others)
    unknown = f"How {quoted} was trained is not known here. " if others else ""
    if not tokens:
        return unknown.strip()
    if len(tokens) == 1:
        which = "The other" if others else "All"
        return f"{unknown}{which} SAEs were trained on {compact(tokens[0])} tokens."
    per_panel = rows[compare.is_sae(rows)].groupby(["source", "hook_point"])["tokens"].nunique()
    shown = listed(compact(value) for value in tokens)
    if per_panel.max() == 1:
        return f"{unknown}SAEs of one panel were trained on equally many tokens ({shown})."
    return f"{unknown}Budgets differ: SAEs were trained on {shown} tokens."


_SCALES = {
    "unit": "divided so that their mean squared norm is 1",
    "dimension": "divided so that their mean squared norm is d_in",
    "raw": "as they are",
    "centred": "less their mean row, divided by the root of their mean squared norm",
}
"""Activations under each input scale (`training.input_scale`)."""


def scale_sentence(rows: pd.DataFrame, options: pd.DataFrame) -> str:
    """The units of losses: the input scale that runs were trained in."""
    asked = options[options["option"] == "training.input_scale"].set_index("run")["chosen"]
    entries = rows.drop_duplicates("run").set_index("run")["entry"]
    held = entries.groupby(asked.reindex(entries.index)).unique()
    if len(held) == 1:
        return f"Losses are of activations {_SCALES[str(held.index[0])]}."
    parts = [f"{_SCALES[str(kind)]} ({listed(sorted(found))})" for kind, found in held.items()]
    return f"Losses of different input scales cannot be compared: activations {'; '.join(parts)}."


def rows_sentence(rows: pd.DataFrame, cross_entropy: bool = False) -> str:
    """State the number of evaluated rows of each source, and which rows were left out."""
    texts: dict[str, list[str]] = {}
    for panel in compare.panels_of(rows):
        held = compare.one_panel(rows, panel)
        texts.setdefault(_policy(held.iloc[0], cross_entropy), []).append(
            compare.panel_title(panel)
        )
    if len(texts) == 1:
        return "Evaluated on held-out rows: " + next(iter(texts)) + "."
    parts = [f"{listed(panels)}: {text}" for text, panels in texts.items()]
    return "Evaluated on held-out rows: " + "; ".join(parts) + "."


def _policy(row: pd.Series, cross_entropy: bool) -> str:
    first = "left out" if row.get("first_position_excluded") == 1 else "included"
    multiple = row.get("max_norm_multiple")
    if pd.isna(multiple):
        norm = "rows of any norm"
    else:
        norm = f"rows above {multiple:g} times the median training norm left out"
    excluded = 100 * row.get("excluded_rows_fraction", 0.0)
    text = (
        f"{compact(row['rows'])} rows (first positions {first}; {norm}; "
        f"{excluded:.2g} % of the split excluded)"
    )
    if cross_entropy and not pd.isna(row.get("ce_tokens")):
        kept = "kept" if row.get("ce_first_position_kept") == 1 else "replaced too"
        text += (
            f"; cross-entropy on {compact(row['ce_tokens'])} predicted tokens, those of {row['ce_contexts']:g} contexts "
            f"({100 * row['ce_share']:.3g} % of the split's), the activation of each first position {kept}"
        )
    return text
