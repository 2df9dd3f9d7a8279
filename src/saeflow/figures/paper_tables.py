"""The papers' tables, from the tables of all runs: as CSV, Markdown and LaTeX."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from saeflow.errors import UserError
from saeflow.evaluation.tables import escape_latex, latex_table, markdown_table, natural
from saeflow.figures import captions
from saeflow.figures import tables as read
from saeflow.figures.sizes import METRICS, l0_sentence, sized

_NAMES = {
    "d_sae": "latents", "l0_mean": "L0", "nmse": "NMSE", "fvu": "FVU", "ce_degradation": "CE degradation",
    "zero_shot": "zero-shot accuracy", "r2": "R²", "rmse": "RMSE", "pearson": "Pearson", "spearman": "Spearman",
    "hook_point": "hook point", "evaluated_on": "evaluated on", "tokens_per_s": "tokens/s", "against_topk": "time against TopK", "hours_of_1e9": "hours for 1 G tokens",
    "score_scale": "score scale", "k": "k", "guide": "guided by", "guide_l0": "its L0", "guide_nmse": "its NMSE",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """What a function of TABLES returns.

    Attributes:
        data: as it is written to CSV; `evaluated_on` is left out where every SAE is measured on its own source.
        caption: one paragraph of plain text.
    """

    data: pd.DataFrame
    caption: str

    def __post_init__(self) -> None:
        if "evaluated_on" in self.data and (self.data["evaluated_on"] == self.data["source"]).all():
            object.__setattr__(self, "data", self.data.drop(columns="evaluated_on"))

    @property
    def words(self) -> int:
        """How many of the first columns are no numbers."""
        is_number = [pd.api.types.is_numeric_dtype(self.data[name]) for name in self.data]
        return is_number.index(True) if any(is_number) else len(is_number)

    @property
    def head(self) -> list[str]:
        """The columns' names as they are printed."""
        return [_NAMES.get(str(name), str(name).replace("_", " ")) for name in self.data.columns]

    @property
    def body(self) -> list[list[str]]:
        """The cells as they are printed: numbers with four digits."""
        return [
            [str(value) for value in line[: self.words]]
            + [_cell(value) for value in line[self.words :]]
            for line in self.data.itertuples(index=False, name=None)
        ]

    def markdown(self) -> str:
        """The table with its caption."""
        return f"{markdown_table(self.head, self.words, self.body)}\n\n{self.caption}\n"

    def latex(self) -> str:
        """The same; needs \\usepackage{booktabs}."""
        lines = [" & ".join(map(escape_latex, line)) + r" \\" for line in self.body]
        return latex_table(escape_latex(self.caption), self.head, self.words, lines)


def _cell(value: Any) -> str:
    if value is None or pd.isna(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _refuse(table: str, needs: str) -> UserError:
    return UserError(
        f"figures.names: {table} needs {needs}, the tables have none. Take {table} out of figures.names in params.yaml."
    )


def _ordered(data: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Lines in natural order (k8 before k32)."""
    places = [[natural(str(value)) for value in line] for line in data[list(by)].to_numpy()]
    order = sorted(range(len(data)), key=lambda i: places[i])
    return data.iloc[order].reset_index(drop=True)


def dictionary_size(tables: read.Tables, options: Mapping[str, Any]) -> Table:
    """NMSE and cross-entropy degradation by size of the dictionary (Sparsemax SAE, text)."""
    rows = sized(tables, options, "table_dictionary_size")
    metrics = ["l0_mean", *(metric for metric in METRICS if metric in rows)]
    keys = ["source", "evaluated_on", "line", "d_sae"]
    data = rows.groupby(keys, as_index=False)[metrics].mean()
    data = data.rename(columns={"line": "entry"})
    data["entry"] = data["entry"].str.rstrip("/")
    caption = (
        f"Error and rise of the model's cross-entropy (nats/token) by number of latents. Mean L0: {l0_sentence(rows)}. "
        f"{captions.budget_sentence(rows)} {captions.rows_sentence(rows, cross_entropy=True)}"
    )
    return Table(_ordered(data, ["source", "evaluated_on", "entry", "d_sae"]), caption)


def top_n(tables: read.Tables, options: Mapping[str, Any]) -> Table:
    """Accuracy through the n most frequent concepts, by labelled set and as mean over sets (Sparsemax SAE, vision)."""
    rows = tables.classification
    rows = rows[read.is_sae(rows) & (rows["concepts"] == "on") & (rows["labels"] == "true")]
    if rows.empty:
        raise _refuse("table_top_n", "labelled images")
    shown = tables.wide[tables.wide["run"].isin(rows["run"])]
    read.check_budgets(tables, shown, options)
    keys = ["source", "entry", "setting", "protocol"]
    by_set = rows.groupby([*keys, "set", "n"], as_index=False)["accuracy"].mean()
    mean = (
        by_set.groupby([*keys, "n"], as_index=False)["accuracy"].mean().assign(set="mean of sets")
    )
    if rows["set"].nunique() > 1:
        by_set = pd.concat([by_set, mean])
    every = by_set[by_set["protocol"] == "all"]
    held = by_set[by_set["protocol"] != "all"]
    wide = held.pivot(index=[*keys, "set"], columns="n", values="accuracy").reset_index()
    counts = sorted(set(held["n"]), key=natural)
    whole = every.rename(columns={"accuracy": "all"})[["source", "entry", "setting", "set", "all"]]
    data = wide.merge(whole, on=["source", "entry", "setting", "set"], how="left")
    data = data[[*keys[:3], "set", "protocol", *counts, "all"]]
    clean = rows.groupby("set")["clean_accuracy"].first()
    caption = (
        "Zero-shot accuracy (mean over classes) with only the n most frequent concepts on. leak_free: concepts of all classes, "
        "chosen on the training half; paper: concepts of the image's true class, chosen on the tested images. Without an SAE: "
        f"{captions.listed(f'{value:.3f} ({name})' for name, value in clean.items())}. {captions.budget_sentence(shown)}"
    )
    return Table(_ordered(data, [*keys[:3], "set", "protocol"]), caption)


def ablation(tables: read.Tables, options: Mapping[str, Any]) -> Table:
    """Architecture x activation of the Sparsemax SAE (Sparsemax SAE, ablation)."""
    chosen = tables.options[tables.options["variant"] == "sparsemax"]
    wanted = ["architecture", "activation", "score_scale"]
    if chosen.empty:
        raise _refuse("table_ablation", "SAEs of the variant sparsemax")
    cells = chosen[chosen["option"].isin(wanted)].pivot(
        index="run", columns="option", values="chosen"
    )
    cells = cells.rename_axis(index="trained").reset_index()
    rows = tables.wide.merge(cells, on="trained", suffixes=("", "_option"))
    rows = read.of_one_size(rows)
    read.check_budgets(tables, rows, options)
    metrics = [name for name in ("l0_mean", "nmse", "ce_degradation", "zero_shot") if name in rows]
    keys = ["source", "evaluated_on", "entry", "setting", *wanted]
    data = rows.groupby(keys, as_index=False)[metrics].mean()
    caption = (
        "Architecture (mlp: encoder and decoder of their own; shared: cross-attention over shared concepts) and activation "
        f"(weights, scores: two forms of sparsemax; relu). {captions.budget_sentence(rows)} {captions.rows_sentence(rows)}"
    )
    by = ["source", "evaluated_on", "architecture", "activation", "score_scale", "setting"]
    return Table(_ordered(data, by), caption)


def guided_k(tables: read.Tables, options: Mapping[str, Any]) -> Table:
    """TopK at the mean L0 that another SAE chose, beside it (Sparsemax SAE: the k it finds guides TopK)."""
    guides = tables.options[
        (tables.options["option"] == "guide") & (tables.options["chosen"] != "null")
    ]
    if guides.empty:
        raise _refuse("table_guided_k", "an entry with options: {k: {mean_l0_of: RUN}}")
    wide = tables.wide.set_index(["trained", "evaluated_on"])
    runs = [*guides["run"], *guides["chosen"]]
    shown = tables.wide[tables.wide["trained"].isin(runs)]
    read.check_budgets(tables, shown, options)
    metrics = [name for name in ("nmse", "ce_degradation", "zero_shot") if name in wide]
    lines = []
    for run, guide in zip(guides["run"], guides["chosen"], strict=True):
        for on, name in itertools.product(wide.loc[run].index, (guide, run)):
            row = wide.loc[(name, on)]
            own = {"source": row["source"], "evaluated_on": on}
            own |= {"entry": row["entry"], "setting": row["setting"]}
            known = {
                "k": row["k"],
                "l0_mean": row["l0_mean"],
                **{metric: row[metric] for metric in metrics},
            }
            lines.append({**own, "role": "guide" if name == guide else "guided", **known})
    caption = (
        "SAEs that find their own sparsity (guide), and TopK trained with k at the guide's mean L0 on training activations, rounded "
        f"(guided). {captions.budget_sentence(shown)}"
    )
    return Table(pd.DataFrame(lines), caption)


def probes(tables: read.Tables, options: Mapping[str, Any]) -> Table:
    """Quality of the complexity probes by model and hook point (AdaptiveK)."""
    rows = tables.probes[tables.probes["split"] == "evaluation"]
    if rows.empty:
        raise _refuse("table_probes", "fitted probes")
    columns = [
        "source",
        "complexity",
        "hook_point",
        "contexts",
        "ridge",
        "rmse",
        "r2",
        "pearson",
        "spearman",
    ]
    caption = (
        "Ridge regression from one activation of a context to its complexity score (0 to 10), on held-out contexts; ridge: the "
        "penalty that cross-validation chose."
    )
    return Table(_ordered(rows[columns], columns[:3]), caption)


def training_cost(tables: read.Tables, options: Mapping[str, Any]) -> Table:
    """Training throughput by variant, and against TopK of the same size on the same store (AdaptiveK)."""
    steps = tables.training
    if steps.empty or "tokens_per_s" not in steps:
        raise _refuse("table_training_cost", "trained SAEs")
    keys = ["source", "hook_point", "d_sae"]
    by_run = steps.groupby([*keys, "variant", "run"])["tokens_per_s"].median().reset_index()
    data = by_run.groupby([*keys, "variant"], as_index=False)["tokens_per_s"].median()
    topk = data[data["variant"] == "topk"][[*keys, "tokens_per_s"]]
    data = data.merge(topk, on=keys, how="left", suffixes=("", "_topk"))
    data["against_topk"] = data.pop("tokens_per_s_topk") / data["tokens_per_s"]
    data["hours_of_1e9"] = 1e9 / data["tokens_per_s"] / 3600
    data = data[["source", "variant", "d_sae", "tokens_per_s", "against_topk", "hours_of_1e9"]]
    caption = (
        "Median training throughput over logged steps, as the workflow ran it (jobs beside each other share the machine: compare "
        "with benchmarks/), and its ratio to TopK of the same size on the same store."
    )
    return Table(_ordered(data, ["source", "d_sae", "variant"]), caption)


def interpretability(tables: read.Tables, options: Mapping[str, Any]) -> Table:
    """How many latents a simple model of text predicts, and how well sparse probes do."""
    rows = tables.detection
    if rows.empty:
        raise _refuse(
            "table_interpretability", "evaluation.interpretability with detection, of text"
        )
    shown = tables.wide[tables.wide["run"].isin(rows["run"])]
    read.check_budgets(tables, shown, options)
    keys = ["source", "entry", "setting"]
    grouped = rows.groupby(keys)
    data = grouped[["balanced_accuracy", "auc", "shuffled", "interpretable"]].mean()
    data.insert(0, "judged", grouped["latent"].nunique())
    probes_of = tables.probing[tables.probing["method"] == "latents"]
    by_k = probes_of.pivot_table(index=keys, columns="k", values="accuracy")
    data = data.join(
        by_k.add_prefix("probe_k").rename(columns=lambda name: name.removesuffix(".0"))
    )
    caption = (
        "Detection: from windows of training text on which a latent fires and others, naive Bayes on the marked token and the one "
        "before it says of held-out windows whether it fires (balanced accuracy and AUC, mean over the sampled latents; shuffled: with "
        "shuffled answers). interpretable: share of the judged latents at or above the threshold. probe: accuracy of sparse "
        f"probes with k latents, mean over questions. {captions.budget_sentence(shown)}"
    )
    return Table(_ordered(data.reset_index(), keys), caption)


def absorption(tables: read.Tables, options: Mapping[str, Any]) -> Table:
    """Absorption of first letters, mean over letters and seeds (SAEBench)."""
    rows = tables.absorption
    rows = rows[rows["letter"] == "mean"]
    if rows.empty:
        raise _refuse("table_absorption", "evaluation.interpretability with absorption, of text")
    shown = tables.wide[tables.wide["run"].isin(rows["run"])]
    read.check_budgets(tables, shown, options)
    keys = ["source", "entry", "setting"]
    names = [
        "d_sae",
        "counted",
        "probe_f1",
        "split_latents",
        "absorption_fraction",
        "full_absorption",
    ]
    data = rows.groupby(keys, as_index=False)[names].mean().rename(columns={"counted": "letters"})
    caption = (
        "Absorption of first letters. The measure is meaningless for models below about 1 B parameters and dictionaries below 16k "
        "latents: such models hardly know how words are spelled. letters: those that a logistic probe of the activation tells "
        "(with too few of them, the rest is empty); split latents: latents of a letter; absorption fraction: share of a letter's "
        "direction that other latents write in place of its own; full absorption: share of the words on which its own are silent and "
        f"another writes it. Means over letters and seeds. {captions.budget_sentence(shown)}"
    )
    return Table(_ordered(data, keys), caption)


TABLES: dict[str, Callable[[read.Tables, Mapping[str, Any]], Table]] = {
    "table_dictionary_size": dictionary_size,
    "table_top_n": top_n,
    "table_ablation": ablation,
    "table_guided_k": guided_k,
    "table_probes": probes,
    "table_training_cost": training_cost,
    "table_interpretability": interpretability,
    "table_absorption": absorption,
}
