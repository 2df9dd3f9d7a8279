"""The schemas of all tables: their columns with units and definitions, in the order in which files hold them.

The file is one list of entries, which is why it is longer than others.
"""

from dataclasses import dataclass
from typing import Literal

from saeflow.tables.metrics import METRICS, Metric, stated, summarised
from saeflow.tables.numbers import significant
from saeflow.tables.runs import with_target


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table.

    Attributes:
        definition: one or two sentences.
        kind: `word` for text, `count` for what is whole, `number` for the rest.
        unit: empty for words and pure numbers.
        label: heading in printed tables; the name with spaces where empty.
        axis: name on an axis with the unit; `label (unit)` where empty.
        is_required: whether every row must have a finite number.
    """

    definition: str
    kind: Literal["word", "count", "number"] = "number"
    unit: str = ""
    label: str = ""
    axis: str = ""
    is_required: bool = False

    def text(self, value: float) -> str:
        """Return a number as it is printed."""
        is_whole = self.kind == "count" and value == round(value)
        return f"{value:,.0f}" if is_whole else significant(value)


Columns = dict[str, Column]


def _word(definition: str, label: str = "") -> Column:
    return Column(definition=definition, kind="word", label=label)


def _count(definition: str, unit: str = "", label: str = "", axis: str = "") -> Column:
    return Column(definition=definition, kind="count", unit=unit, label=label, axis=axis)


def _number(definition: str, unit: str = "", label: str = "", axis: str = "") -> Column:
    return Column(definition=definition, unit=unit, label=label, axis=axis)


_VALUE = Column(
    definition="Its value, in the metric's unit; shares are between 0 and 1.", is_required=True
)
_PLACE: Columns = {
    "source": _word("Source that the SAE was trained on: a key of `sources`."),
    "hook_point": _word("Where activations are read, such as the residual stream after a block."),
}
IDS: Columns = {
    "run": _word("Name of the run: SOURCE/HOOK_POINT/ENTRY/SETTING-seedN, or of a baseline."),
    **_PLACE,
    "entry": _word("Key of `saes`, or the baseline's name."),
    "variant": _word("Variant of SAE, or the baseline."),
    "schedule": _word("Schedule of an option in training, `constant` where none changes."),
    "d_sae": _count("Number of latents.", label="latents"),
    "k": _count("Number of latents that the options allow; empty where the variant sets none.", "per token", "k", "k"),
    "seed": _count("Seed of initialisation and of the order of batches."),
    "tokens": _count("Activations that the SAE was trained on; empty where this is not known.", "tokens"),
}  # fmt: skip
MEASURED_IDS: Columns = {
    **IDS,
    "evaluated_on": _word(
        "Source whose held-out rows were measured: the SAE's own or one of `evaluation.also_on`."
    ),
}
TARGETED_IDS: Columns = with_target(IDS)
"""Columns that identify a line of a table with a k of its own."""

_INTERVAL = {
    "low": _number(
        "Lower bound of the 95 % bootstrap interval over documents, images or samples; empty where there is one alone."
    ),
    "high": _number("Upper bound of this interval."),
}
_SCORED: Columns = {
    **_PLACE,
    "complexity": _word("Kind of complexity score: a key of `complexity`."),
    "split": _word("train or evaluation."),
}
_ESTIMATE: Columns = {
    "estimator": _word("Estimator of local intrinsic dimension: mle or twonn."),
    "neighbours": _count("Neighbours that an estimate uses."),
}
_RANKED: Columns = {
    f"{name}_{quantity}{bound}": _number(f"{opening}{what} of {called} with the dimension{given}.")
    for quantity, called in (("l0", "L0"), ("k_hat", "k-hat"))
    for name, what, given in (
        ("spearman", "Spearman correlation", ""),
        ("partial", "Spearman correlation", " given the activation's norm"),
    )
    for bound, opening in (
        ("", ""),
        ("_low", "Lower bound of the 95 % bootstrap interval over units of the "),
        ("_high", "Upper bound of this interval: of the "),
    )
}
_QUALITY: Columns = {
    "rmse": _number("Root mean squared error of the predicted scores.", "points of 10", "RMSE"),
    "r2": _number(
        "Coefficient of determination of the predicted scores.",
        label="R²",
        axis="R², held-out contexts",
    ),
    "pearson": _number("Pearson correlation of predicted and given scores.", label="Pearson"),
    "spearman": _number("Spearman correlation of predicted and given scores.", label="Spearman"),
}
STEPS: Columns = {
    "step": Column(definition="Number of the logged step.", kind="count", is_required=True),
    "tokens_seen": Column(
        definition="Tokens seen up to this step.", kind="count", axis="training tokens", is_required=True
    ),
    "loss": _number("Sum of the loss's terms on the step's batch, of scaled activations."),
    "reconstruction": _number("Loss term: reconstruction error.", axis="reconstruction loss"),
    "auxk": _number("Loss term: AuxK, of dead latents, or of underused ones too."),
    "l1": _number("Loss term: L1 penalty of the latents."),
    "penalty": _number("Loss term: Lp penalty of the latents (p_anneal)."),
    "l0_penalty": _number("Loss term: L0 penalty (jumprelu)."),
    "gate": _number("Loss term: reconstruction through the gate alone (gated)."),
    "budget": _number("Loss term: excess of the mean k-hat over the budget (soft_topk)."),
    "probe": _number("Loss term: the complexity probe (adaptive_k)."),
    "k": _count("k, or the budget of k, that the step's schedule gives.", "per token", "k", axis="k (or its budget)"),
    "k_hat": _number("Mean k that the SAE allowed in the batch.", "per token", axis="mean k̂ of a batch"),
    "k_hat_std": _number("Standard deviation over the batch of the k that the SAE allowed.", "per token"),
    "temperature": _number("Temperature of the soft top-k; 0 is hard.", axis="temperature of the soft top-k"),
    "l1_weight": _number("Weight of the L1 (or Lp) penalty.", axis="weight of the L1 (or Lₚ) penalty"),
    "l0_weight": _number("Weight of the L0 penalty.", axis="weight of the L0 penalty"),
    "p": _number("Exponent of the penalty (p_anneal).", axis="p of the penalty"),
    "theta": _number("Mean threshold of the latents (jumprelu).", axis="mean threshold (JumpReLU)"),
    "threshold": _number("Threshold in use at inference (batch_topk).", axis="threshold in use"),
    "score_scale": _number("Scale of the scores (sparsemax, entmax).", label="score scale", axis="scale of the scores"),
    "masked": _number("Share of the latents above the largest firing rate (sparsemax).", "share"),
    "alpha": _number("alpha of the entmax.", axis="α of the entmax"),
    "deviation": _number("Weight of the probe's distance from the fitted probe (adaptive_k).", axis="weight of the probe's deviation"),
    "batch_fvu": _number(
        "FVU of the step's batch, by its pass in training, before the update: of rows not seen before, as long as tokens "
        "are fewer than the rows of the training split.", label="batch FVU", axis="FVU of training batches",
    ),
    "l0": _number("Mean number of active latents in the batch.", "per token", "L0", "L0 (active latents per token)"),
    "dead": _number("Latents silent for `dead_after_tokens` tokens.", "share", axis="dead latents (share)"),
    "lr": _number("Learning rate."),
    "tokens_per_s": _number("Training throughput since the last logged step.", "tokens/s", "tokens/s"),
}  # fmt: skip
"""Columns that a logged step may hold; a variant of the user's own may log more."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """One CSV file of results/tables.

    Attributes:
        about: what a row is.
        columns: id columns first.
        job: the job that measures it, and writes such a file for each of its results where it is not `collect`.
        is_open: whether it may have further columns of numbers.
        optional: columns that a file has only where some run logged them.
    """

    about: str
    columns: Columns
    job: Literal[
        "evaluate",
        "interpret",
        "stability",
        "rivals",
        "choose",
        "probe",
        "dimension",
        "train",
        "collect",
    ]
    is_open: bool = False
    optional: frozenset[str] = frozenset()

    @property
    def needed(self) -> list[str]:
        """The columns that every file has."""
        return [name for name in self.columns if name not in self.optional]


TABLES: dict[str, Table] = {
    "metrics": Table(
        about="A row per measurement of a run on one source, and metric.", job="evaluate",
        columns=MEASURED_IDS | {"metric": _word("Name of the metric; see the list of metrics."), "value": _VALUE},
    ),
    "histograms": Table(
        about="A row per measurement, histogram and bin.", job="evaluate",
        columns=MEASURED_IDS | {
            "histogram": _word("l0: rows by L0; log10_firing_rate: latents by log10 of their firing rate, dead ones left out."),
            "left": Column(definition="Lower bound of the bin, inside of it.", is_required=True),
            "right": Column(definition="Upper bound of the bin, outside of it.", is_required=True),
            "count": Column(definition="Rows or latents in the bin.", kind="count", is_required=True),
        },
    ),
    "training": Table(
        about="A row per run and logged step.", job="train", columns=TARGETED_IDS | STEPS, is_open=True,
        optional=frozenset(STEPS) - {"step", "tokens_seen"},
    ),
    "options": Table(
        about="A row per run and option.", job="train",
        columns=IDS | {
            "option": _word("Option of the variant, `guide` (the run whose mean L0 is k), or training.NAME."),
            "chosen": _word("Its value: text as it is, anything else as JSON."),
        },
    ),
    "complexity": Table(
        about="A row per fitted probe, split and context with a score.", job="probe",
        columns=_SCORED | {
            "context": _count("Number of the context in its split."),
            "score": _number("Given complexity score, 0 to 10.", label="complexity score"),
            "predicted": _number("Score that the probe reads from an activation of the context, 0 to 10."),
        },
    ),
    "probes": Table(
        about="A row per fitted probe and split.", job="probe",
        columns=_SCORED | {
            "contexts": _count("Contexts with a score."),
            "units": _count("Documents, images or samples that these are of."),
            "ridge": _number("Ridge penalty that cross-validation chose, with documents held out whole."),
            "at_edge": _count("1 if it is the smallest or largest of those tried, else 0.", label="at the edge"),
            **_QUALITY,
            "r2_low": _number("Lower bound of the 95 % bootstrap interval of R² over documents, images or samples.", label="R², from"),
            "r2_high": _number("Upper bound of this interval.", label="R², to"),
        },
    ),
    "classification": Table(
        about="A row per SAE, labelled set and selection of concepts.", job="evaluate",
        columns=MEASURED_IDS | {
            "set": _word("Labelled set: a key of `evaluation.labelled_sets`."),
            "classes": _count("Number of classes."),
            "images": _count("Classified images."),
            "clean_accuracy": _number("Accuracy of the model as it is, mean over classes.", "share"),
            "protocol": _word(
                "leak_free: concepts of all classes, chosen on the training half; paper: concepts of the image's true class, "
                "chosen on the classified images; all: no selection."
            ),
            "labels": _word("true, or permuted as a control."),
            "concepts": _word("on: only the chosen concepts; off: all but these."),
            "n": _word("Number of most frequent concepts chosen for each class, or all."),
            "accuracy": _number("Accuracy, mean over classes.", "share"),
            "kept": _number(
                "Concepts that an image may use: under leak_free the union of all classes' choices, under paper those of its own class, mean "
                "over classes.", label="concepts kept"
            ),
            "l0": _number("Mean number of latents left on.", "per token", "L0"),
        },
    ),
    "contexts": Table(
        about="A row per SAE and context (text, image, sample), for the first `evaluation.contexts_listed`.", job="evaluate",
        columns=MEASURED_IDS | {
            "context": _count("Number of the context in the evaluation split."),
            "label": _count("Class of an image, -1 or empty where unknown."),
            "objects": _count("Objects in a generated scene, -1 or empty where unknown."),
            "l0": _number("Mean L0 over the context's rows.", "per token", "L0"),
            "k_hat": _number("Mean k that the SAE allows; empty where it chooses none.", "per token"),
            "norm": _number("Mean norm of the context's activations."),
        },
    ),
    "dimension": Table(
        about="A row per SAE, region of the rows and estimate of local intrinsic dimension.", job="evaluate",
        columns=MEASURED_IDS | {
            "region": _word(
                "all; of images cls and patches, and of scenes object and background, the patches on and off an object; of other "
                "contexts early and late, the halves of their positions."
            ),
            **_ESTIMATE,
            "rows": _count("Rows of the region that have every estimate."),
            "units": _count("Documents, images or samples that these are of, which are resampled."),
            "dimension": _number("Mean local intrinsic dimension."),
            **_RANKED,
        },
    ),
    "dimension_bins": Table(
        about="A row per SAE, estimate and tenth of the rows in order of their dimension.", job="evaluate",
        columns=MEASURED_IDS | _ESTIMATE | {
            "bin": _count("Number of the bin, from the lowest dimension."),
            "rows": _count("Rows in the bin."),
            "dimension": _number("Mean local intrinsic dimension."),
            "l0": _number("Mean L0.", "per token", "L0"),
            "k_hat": _number("Mean k that the SAE allows; empty where it chooses none.", "per token"),
        },
    ),
    "dimension_agreement": Table(
        about="A row per store and pair of estimates of local intrinsic dimension.", job="dimension",
        columns=_PLACE | _ESTIMATE | {
            "other_estimator": _ESTIMATE["estimator"],
            "other_neighbours": _ESTIMATE["neighbours"],
            "rows": _count("Rows with both estimates."),
            "spearman": _number("Spearman correlation of both over these rows.", label="Spearman"),
        },
    ),
    "dimension_control": Table(
        about="A row per store, estimate, and manifold of known dimension; rows of the manifolds are as many and as wide as "
        "those of the store.", job="dimension",
        columns=_PLACE | _ESTIMATE | {
            "manifold": _word("sphere; torus, a product of circles; union of all of them, far apart, each with as many rows."),
            "true_dimension": _count("Dimension of the sphere or torus; empty for the union."),
            "rows": _count("Rows with an estimate."),
            "bias": _number("Mean estimate less the true dimension; empty for the union."),
            "spearman": _number("Spearman correlation of the estimate with the true dimension, over the union.", label="Spearman"),
        },
    ),
    "intervals": Table(
        about="A row per measurement and metric that is a ratio of sums over rows or tokens.", job="evaluate",
        columns=MEASURED_IDS | {
            "metric": _word("Name of the metric."), "value": _VALUE, **_INTERVAL,
            "units": _count("Documents, images or samples that are resampled."),
        },
    ),
    "controls": Table(
        about="A row per SAE that chooses its k, control and metric.", job="evaluate",
        columns=MEASURED_IDS | {
            "control": _word(
                "own: the SAE as it is; shuffled_k: the k of another row; k_by_norm: the same k's in the order of the "
                "activations' norms; mean_k: the mean k in every row; batch_threshold: one threshold for all rows with "
                "equally many active in all."
            ),
            "metric": _word("Name of the metric."), "value": _VALUE, **_INTERVAL,
            "difference": _number("Value less that of the SAE as it is."),
            "difference_low": _number("Lower bound of the paired 95 % bootstrap interval of the difference."),
            "difference_high": _number("Upper bound of this interval."),
        },
    ),
    "unmeasured": Table(
        about="A row per measurement of a run on one source, and quantity that its model does not have.", job="evaluate",
        columns=MEASURED_IDS | {
            "what": _word("The quantity, such as cross-entropy."),
            "why": _word("Why it is not measured."),
        },
    ),
    "stability": Table(
        about="A row per setting, pair of seeds and metric.", job="stability",
        columns={name: column for name, column in IDS.items() if name not in ("run", "seed")} | {
            "setting": _word("Setting that the seeds share."),
            "seed_a": _count("One seed."),
            "seed_b": _count("The other seed."),
            "metric": _word("Name of the metric; see the list of metrics between seeds."), "value": _VALUE,
        },
    ),
    "rivals": Table(
        about="A row per setting that finds its own number of latents, setting trained at the L0 that it found, and metric.",
        job="rivals",
        columns=_PLACE | {
            "d_sae": IDS["d_sae"],
            "entry": _word("Key of `saes` of the SAE that finds its own number of latents."),
            "variant": _word("Its variant."),
            "setting": _word("Its setting."),
            "rival_entry": _word("Key of `saes` of the rival, whose k is the mean L0 found."),
            "rival_variant": _word("The rival's variant.", label="rival"),
            "rival_setting": _word("The rival's setting."),
            "metric": _word("Name of the metric."), "value": _VALUE,
            "rival": _number("The rival's value."),
            "difference": _number("Value less the rival's, paired by seed and unit, mean over seeds."),
            "low": _number("Lower bound of the paired 95 % bootstrap interval of the difference; empty where there is one unit alone."),
            "high": _number("Upper bound of this interval."),
            "seed_sd": _number("Sample standard deviation of the difference over seeds; empty for one.", label="SD over seeds"),
            "seeds": _count("Pairs of runs of equal seed."),
            "units": _count("Documents, images or samples that are resampled."),
        },
    ),
    "sweeps": Table(
        about="A row per trial of a tuned setting; values are means over seeds.", job="choose",
        columns=_PLACE | {
            "d_sae": IDS["d_sae"],
            "entry": _word("Key of `saes`, which has `ranges`."),
            "variant": _word("Its variant."),
            "setting": _word("Setting, with the trial."),
            "drawn": _word("Values of the keys that have ranges: those that the entry states in trial 0, drawn ones in others."),
            "trial": _count("Number of the trial."),
            "trials": _count("Trials that were chosen among."),
            "is_chosen": _count("1 if the trial was chosen, else 0.", label="chosen"),
            "is_within": _count("1 if its mean L0 on the selection part is at most `l0_limit`, else 0.", label="within the limit"),
            "l0_limit": _number("Mean L0 up to which the lowest FVU is chosen; where no trial is within, the nearest to `sweep.l0` is.", "per token", "largest L0"),
            "selection_fvu": _number("FVU on the documents, images or samples that trials are chosen on.", label="FVU, selection"),
            "selection_l0": _number("Mean L0 on these.", "per token", "L0, selection"),
            "fvu": _number("FVU on the other held-out documents, images or samples.", label="FVU"),
            "fvu_low": _number("Lower bound of its 95 % bootstrap interval over these; empty where there is one alone."),
            "fvu_high": _number("Upper bound of this interval."),
            "l0": _number("Mean L0 on these.", "per token", "L0"),
            "l0_low": _number("Lower bound of its 95 % bootstrap interval."),
            "l0_high": _number("Upper bound of this interval."),
            "difference": _number("FVU less that of trial 0, on these, paired by unit and seed."),
            "low": _number("Lower bound of the paired 95 % bootstrap interval of the difference."),
            "high": _number("Upper bound of this interval."),
            "seeds": _count("Number of seeds."),
            "selection_units": _count("Documents, images or samples that trials are chosen on.", label="units, selection"),
            "units": _count("Documents, images or samples that are reported on and resampled."),
        },
    ),
    "probing": Table(
        about="A row per SAE, question and sparse probe.", job="interpret",
        columns=TARGETED_IDS | {
            "task": _word("Yes-or-no question about a row whose answer the source knows."),
            "method": _word("latents, neurons (dimensions of the activation), or the whole activation."),
            "k": _count("Latents or neurons of the probe; empty for the whole activation."),
            "train_rows": _count("Rows that the probe was fitted to, half of them yes."),
            "test_rows": _count("Held-out rows asked, half of them yes."),
            "accuracy": _number("Share of held-out rows answered right; 0.5 is chance.", "share"),
            "f1": _number("F1 of yes."),
            "auc": _number("Area under the ROC curve.", label="AUC"),
        },
    ),
    "detection": Table(
        about="A row per judged latent.", job="interpret",
        columns=TARGETED_IDS | {
            "latent": _count("Number of the latent."),
            "firing": _count("Held-out rows on which it fires."),
            "balanced_accuracy": _number(
                "Mean of the shares of held-out windows with and without the latent that the scorer tells right; 0.5 is chance.",
                "share",
            ),
            "auc": _number("Area under the ROC curve of the scorer's scores.", label="AUC"),
            "shuffled": _number("Balanced accuracy with shuffled answers: a control, near 0.5.", "share"),
            "interpretable": _number("1 if the balanced accuracy is at least the threshold, else 0."),
        },
    ),
    "absorption": Table(
        about="A row per SAE and first letter, and their mean.", job="interpret",
        columns=TARGETED_IDS | {
            "letter": _word("The letter, or `mean` over those that count."),
            "words": _count("Held-out words of the letter."),
            "probe_f1": _number("F1 of the letter's logistic probe of the activation on held-out words.", label="probe F1"),
            "true_positives": _count("Held-out words of the letter that its probe finds."),
            "split_latents": _count("Latents of the letter: one more while that raises the F1 of a probe of them by more than the jump."),
            "latents": _word("Their numbers, with spaces between."),
            "sparse_f1": _number("F1 of the logistic probe of the letter's latents on held-out words.", label="sparse F1"),
            "counted": _count(
                "1 if the probe finds the letter (its F1 is above the least one), so that it counts in the means; in the row "
                "`mean`, how many do."
            ),
            "absorption_fraction": _number(
                "Mean over true positives of the share of the letter's direction that other latents write in place of the "
                "letter's own.", "share",
            ),
            "full_absorption": _number(
                "Share of the true positives on which the letter's own latents are silent and one other latent writes its "
                "direction.", "share",
            ),
        },
    ),
    "summary": Table(
        about="A row per setting and source measured on: mean and standard deviation over seeds.", job="collect",
        columns={name: column for name, column in MEASURED_IDS.items() if name not in ("run", "seed")} | {
            "setting": _word("Setting that the seeds share: the run's name without place and seed."),
            "seeds": _count("Number of seeds."),
            **{name: _number(METRICS[name].definition, METRICS[name].unit) for name in stated()},
            **{
                f"{name}_{part}": _number(f"{what} over seeds of `{name}`.")
                for name in summarised()
                for part, what in (("mean", "Mean"), ("sd", "Sample standard deviation (empty for one seed)"))
            },
        },
    ),
}  # fmt: skip

HISTOGRAMS: Columns = {
    "l0": STEPS["l0"],
    "firing_rate": _number("Share of the rows on which a latent fires.", axis="firing rate (share of tokens)"),
}  # fmt: skip
_FACTS: dict[str, Metric | Column] = {
    **{name: column for table in TABLES.values() for name, column in table.columns.items()},
    **IDS,
    **STEPS,
    **HISTOGRAMS,
    **METRICS,
}


def tables_of(job: str) -> list[str]:
    """Return the tables that a job measures."""
    return [name for name, table in TABLES.items() if table.job == job]


def columns_of(table: str) -> list[str]:
    """Return the names of a table's columns, in order."""
    return list(TABLES[table].columns)


def fact(name: str) -> Metric | Column | None:
    """Return the entry of a metric, else of the column of that name; None for another name."""
    return _FACTS.get(name)


def label(name: str) -> str:
    """Return a metric's or column's name as people write it, without its unit."""
    found = fact(name)
    return (found.label if found else "") or name.replace("_", " ")


def heading(name: str) -> str:
    """Return a printed column's heading: label and unit."""
    found = fact(name)
    unit = found.unit if isinstance(found, Metric) else ""
    return f"{label(name)} ({unit})" if unit else label(name)


def axis_label(name: str) -> str:
    """Return a metric's or column's name with its unit, for an axis."""
    found = fact(name)
    if found is not None and found.axis:
        return found.axis
    unit = found.unit if found else ""
    return f"{label(name)} ({unit})" if unit else label(name)
