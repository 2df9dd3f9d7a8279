"""The metric table: every scalar metric is one entry, which all tables, axes, reports and documents read.

A new metric is computed in its measuring file of `saeflow.evaluation` and gets one entry here; `summary="mean"` adds it
to the summary, `printed=True` to the printed tables and the report. The order is that of the summary's columns.

The file is one list of entries, which is why it is longer than others.

Symbols in definitions: x (rows, d_in) are the evaluated activations, e = x - x_hat, m is the mean of the evaluated rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from saeflow.tables.numbers import significant

_TOLERANCE = 1e-3
"""Largest distance by which rounding may carry a value out of its bounds."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One scalar metric.

    Attributes:
        label: heading in printed tables.
        definition: one or two sentences.
        unit: of the printed values; empty for a pure number.
        axis: name on an axis with the unit; `label (unit)` where empty.
        source: publication or code that defines it.
        bounds: least and largest possible value.
        better: direction of improvement; empty where there is none.
        summary: `mean` for mean and standard deviation over seeds, `stated` for a value that all seeds share.
        printed: whether the printed summary and the report have a column for it.
        digits: significant digits in print.
        percent: whether a share is printed in per cent.
    """

    label: str
    definition: str
    unit: str = ""
    axis: str = ""
    source: str = ""
    bounds: tuple[float | None, float | None] = (None, None)
    better: Literal["", "lower", "higher"] = ""
    summary: Literal["", "mean", "stated"] = ""
    printed: bool = False
    digits: int = 3
    percent: bool = False

    def text(self, value: float) -> str:
        """Return a value as it is printed."""
        return significant(100 * value if self.percent else value, self.digits)


_SHARE, _CORRELATION, _POSITIVE, _AT_MOST_1 = (0.0, 1.0), (-1.0, 1.0), (0.0, None), (None, 1.0)
_PER_TOKEN = "nats/token"

METRICS: dict[str, Metric] = {
    "rows": Metric(label="rows", definition="Evaluated rows.", bounds=_POSITIVE, summary="stated"),
    "train_rows": Metric(
        label="training rows", definition="Rows of the split that the SAE was trained on: tokens over them are its epochs.",
        bounds=_POSITIVE, summary="stated",
    ),
    "excluded_rows_fraction": Metric(
        label="excluded rows", definition="Share of the split's rows that the row policy leaves out.",
        bounds=_SHARE, summary="stated",
    ),
    "first_position_excluded": Metric(
        label="first position excluded", definition="1 if first positions are left out, else 0.",
        bounds=_SHARE, summary="stated",
    ),
    "max_norm_multiple": Metric(
        label="largest norm", definition="Rows of a larger norm are left out; absent where none are.",
        unit="median training norms", bounds=_POSITIVE, summary="stated",
    ),
    "ce_first_position_kept": Metric(
        label="first position kept", definition="1 if first positions keep their clean activation in the spliced model, else 0.",
        bounds=_SHARE, summary="stated",
    ),
    "ce_tokens": Metric(
        label="predicted tokens", definition="Predicted tokens that cross-entropies and KL are means over.",
        bounds=_POSITIVE, summary="stated",
    ),
    "ce_contexts": Metric(
        label="predicted contexts", definition="Contexts whose predicted tokens these are.", bounds=_POSITIVE, summary="stated",
    ),
    "ce_share": Metric(
        label="share of contexts", definition="Share of the evaluation split's contexts that these are.", bounds=_SHARE,
        summary="stated",
    ),
    "ce_uniform": Metric(
        label="CE of a uniform guess", definition="Cross-entropy of a uniform guess, ln(vocabulary).", unit=_PER_TOKEN, bounds=_POSITIVE, summary="stated",
    ),
    "l0_mean": Metric(
        label="L0", definition="Mean over rows of the number of latents that are not 0.", unit="per token",
        axis="mean L0 (active latents per token)", bounds=_POSITIVE, summary="mean", printed=True,
    ),
    "l0_median": Metric(
        label="median L0", definition="50th percentile of L0 over rows (exact, linear between order statistics).",
        unit="per token", bounds=_POSITIVE,
    ),
    "l0_p5": Metric(
        label="5th percentile of L0", definition="5th percentile of L0 over rows.", unit="per token", bounds=_POSITIVE
    ),
    "l0_p95": Metric(
        label="95th percentile of L0", definition="95th percentile of L0 over rows.", unit="per token", bounds=_POSITIVE
    ),
    "nmse": Metric(
        label="NMSE", definition="sum |e|^2 / sum |x|^2 over all rows (uncentred).",
        bounds=_POSITIVE, better="lower", summary="mean", printed=True,
    ),
    "fvu": Metric(
        label="FVU", definition="sum |e|^2 / sum |x - m|^2 over all rows.",
        bounds=_POSITIVE, better="lower", summary="mean", printed=True,
    ),
    "explained_variance": Metric(
        label="explained variance", definition="1 - fvu.", bounds=_AT_MOST_1, better="higher", summary="mean",
    ),
    "cosine": Metric(
        label="cosine", definition="Mean over rows of <x, x_hat> / (|x| |x_hat|); a row with a zero vector counts 0.",
        axis="cosine similarity", bounds=_CORRELATION, better="higher", summary="mean", printed=True,
    ),
    "relative_norm": Metric(
        label="relative norm", definition="sum |x_hat| / sum |x| over all rows (norms, not squares): below 1 is shrinkage.",
        bounds=_POSITIVE, summary="mean",
    ),
    "mse": Metric(
        label="MSE", definition="sum |e|^2 / (rows d_in).", unit="squared units of the activations",
        bounds=_POSITIVE, better="lower",
    ),
    "fve_dictionary_learning": Metric(
        label="error about its own mean (dictionary_learning)",
        definition=(
            "1 - sum_d Var(e_d) / sum_d Var(x_d): the error about its own mean, so a constant bias is free. Here over all "
            "rows at once; the released code averages it over batches."
        ),
        source="dictionary_learning, SoftSAE, AdaptiveK", bounds=_AT_MOST_1, better="higher",
    ),
    "ev_legacy_saelens": Metric(
        label="mean of ratios by row (SAELens to 2025)",
        definition=(
            "Mean over rows of 1 - |e|^2 / |x - m|^2. Here m is the mean of all evaluated rows, not of a batch; rows equal "
            "to m are left out."
        ),
        source="SAELens up to 2025, SAEBench paper", bounds=_AT_MOST_1, better="higher",
    ),
    "ev_saelens_6_18": Metric(
        label="depends on the unit (SAELens 6.18)",
        definition=(
            "1 - E / (P - (P / d_in)^2) with E and P the means over rows of |e|^2 and |x|^2: a square of a square, so it "
            "changes with the unit of the activations and may exceed 1. Only to show the difference; absent where the "
            "denominator is 0."
        ),
        source="SAELens 6.18, SAEBench 0.6",
    ),
    "nmse_token_openai": Metric(
        label="NMSE by token", definition="Mean over rows of |e|^2 / |x|^2; zero rows are left out.",
        source="OpenAI sparse_autoencoder", bounds=_POSITIVE, better="lower",
    ),
    "nmse_layernorm_batchtopk": Metric(
        label="NMSE of standardised rows",
        definition=(
            "Mean over rows and dimensions of (e / (s + 1e-5))^2, s the standard deviation of the row's entries (d_in - 1 in "
            "the denominator): the squared error on standardised rows."
        ),
        source="BatchTopK", bounds=_POSITIVE, better="lower",
    ),
    "r2_overcomplete": Metric(
        label="one mean for all dimensions (overcomplete)",
        definition="1 - sum |e|^2 / sum_rd (x_rd - c)^2 with one scalar c, the mean of all entries.",
        source="overcomplete", bounds=_AT_MOST_1, better="higher",
    ),
    "dead_fraction": Metric(
        label="dead", definition="Share of the latents that never fire over the evaluated rows.", unit="%",
        axis="dead latents (share)", bounds=_SHARE, better="lower", summary="mean", printed=True, percent=True,
    ),
    "dense_fraction": Metric(
        label="dense", definition="Share of the latents that fire on more than 10 % of the evaluated rows.", unit="%",
        axis="dense latents (share)", bounds=_SHARE, better="lower", summary="mean", printed=True, percent=True,
    ),
    "decoder_projection": Metric(
        label="decoder projection",
        definition=(
            "The value that d_sae / 4 projections (x - b_dec) . d per row exceed, d the decoder's directions with length 1, over "
            "at most 4096 evenly spaced rows, divided by the root mean of |x - m|^2. Of SAEs of one size that differ in L0, the "
            "one of least projection has the right L0, by this proxy; absent where fewer are positive."
        ),
        source="Chanin & Garriga-Alonso 2025, arXiv 2508.16560", bounds=_POSITIVE, better="lower", summary="mean",
    ),
    "ce_clean": Metric(
        label="clean CE", definition="Mean cross-entropy of the next token, the model as it is.", unit=_PER_TOKEN,
        bounds=_POSITIVE, summary="mean",
    ),
    "ce_spliced": Metric(
        label="spliced CE", definition="Mean cross-entropy with x_hat in place of x at the hook point.", unit=_PER_TOKEN,
        bounds=_POSITIVE, better="lower", summary="mean",
    ),
    "ce_mean": Metric(
        label="CE of the mean", definition="Mean cross-entropy with the mean row of the training split in place of x.",
        unit=_PER_TOKEN, bounds=_POSITIVE,
    ),
    "ce_zero": Metric(
        label="CE of zero", definition="Mean cross-entropy with zero in place of x.", unit=_PER_TOKEN, bounds=_POSITIVE,
        summary="stated",
    ),
    "ce_degradation": Metric(
        label="CE degradation", definition="ce_spliced - ce_clean.", unit=_PER_TOKEN,
        axis="cross-entropy degradation (nats/token)", better="lower", summary="mean", printed=True,
    ),
    "loss_recovered_of_mean": Metric(
        label="loss recovered (mean ablation)",
        definition="(ce_mean - ce_spliced) / (ce_mean - ce_clean); absent where what the mean costs is not clear of 0.",
        better="higher", summary="mean", printed=True,
    ),
    "loss_recovered": Metric(
        label="loss recovered (zero ablation)", definition="(ce_zero - ce_spliced) / (ce_zero - ce_clean); absent where what zero costs is not clear of 0.",
        better="higher", summary="mean", printed=True,
    ),
    "kl": Metric(
        label="KL", unit=_PER_TOKEN, axis="KL divergence (nats/token)", better="lower", summary="mean", printed=True,
        definition=(
            "Mean KL(clean || spliced) of the next-token distributions; of a model in half precision, whose logits are "
            "rounded, a value near 0 may be below it."
        ),
    ),
    "matched_feature_cosine": Metric(
        label="matched cosine",
        definition=(
            "Cosine similarity of decoder directions and true features, matched one to one for the largest sum (Hungarian), "
            "averaged over the true features; one without a latent counts 0."
        ),
        bounds=_CORRELATION, better="higher", summary="mean", printed=True,
    ),
    "matched_feature_cosine_chance": Metric(
        label="chance of matched cosine",
        definition="The matched cosine of as many random directions of that width (one draw): what an untrained decoder reaches.",
        bounds=_CORRELATION, summary="mean", printed=True,
    ),
    "features_found": Metric(
        label="features found", definition="Share of the true features whose matched latent has a cosine above 0.7.", unit="%",
        bounds=_SHARE, better="higher", summary="mean", printed=True, percent=True,
    ),
    "mcc": Metric(
        label="MCC",
        definition=(
            "Mean correlation coefficient: absolute cosines of decoder directions and true features, matched one to one for "
            "the largest sum, averaged over the min(d_sae, features) matched pairs."
        ),
        source="O'Neill et al. 2024 (arXiv:2411.13117)", bounds=_SHARE, better="higher", summary="mean",
    ),
    "support_precision": Metric(
        label="support precision",
        definition=(
            "TP / sum of L0: share of the firing latents whose matched feature is on; a latent without a matched feature is "
            "a false positive. Sums over all rows (micro-average)."
        ),
        bounds=_SHARE, better="higher", summary="mean",
    ),
    "support_recall": Metric(
        label="support recall", definition="TP / sum of true counts: share of the features that are on whose latent fires.",
        bounds=_SHARE, better="higher", summary="mean",
    ),
    "support_f1": Metric(
        label="support F1", definition="2 TP / (sum of L0 + sum of true counts).",
        bounds=_SHARE, better="higher", summary="mean", printed=True,
    ),
    "true_l0_mean": Metric(
        label="true L0", definition="Mean number of features that are on.", unit="per sample", bounds=_POSITIVE,
    ),
    "k_hat_mean": Metric(
        label="k-hat", definition="Mean over rows of the k that the SAE allows (variants that choose it).",
        unit="per token", bounds=_POSITIVE, summary="mean", printed=True,
    ),
    "spearman_l0_true": Metric(
        label="Spearman of L0, true count",
        definition="Spearman correlation of a row's L0 with its true count; absent where either is constant.",
        bounds=_CORRELATION, better="higher", summary="mean", printed=True,
    ),
    "spearman_k_hat_true": Metric(
        label="Spearman of k-hat, true count",
        definition="Spearman correlation of the k that the SAE allows, in steps of 1/64, with the row's true count.",
        bounds=_CORRELATION, better="higher", summary="mean", printed=True,
    ),
    "spearman_norm_true": Metric(
        label="Spearman of the norm, true count",
        definition="Spearman correlation of the activation's norm, in steps of 0.3 %, with the true count: what the norm alone tells.",
        bounds=_CORRELATION, summary="mean", printed=True,
    ),
    "partial_l0_true": Metric(
        label="Spearman of L0, true count, given the norm",
        definition="Partial Spearman correlation of a row's L0 with its true count, the activation's norm taken out of both.",
        bounds=_CORRELATION, better="higher", summary="mean", printed=True,
    ),
    "partial_k_hat_true": Metric(
        label="Spearman of k-hat, true count, given the norm",
        definition="Partial Spearman correlation of the k that the SAE allows with the true count, the activation's norm taken out of both.",
        bounds=_CORRELATION, better="higher", summary="mean", printed=True,
    ),
    "zero_shot_clean": Metric(
        label="clean zero-shot accuracy", definition="Accuracy of the model as it is, mean over labelled sets.", unit="%",
        bounds=_SHARE, summary="mean", percent=True,
    ),
    "zero_shot": Metric(
        label="zero-shot accuracy",
        definition="Accuracy with x_hat in place of every token that the source's stores hold, mean over labelled sets.",
        unit="%", bounds=_SHARE, better="higher", summary="mean", printed=True, percent=True,
    ),
    "zero_shot_chance": Metric(
        label="chance", definition="1 / number of classes, mean over labelled sets.", unit="%", bounds=_SHARE, percent=True,
    ),
    "fvu_cls": Metric(
        label="FVU of CLS", definition="FVU over CLS tokens only, about their own mean.",
        bounds=_POSITIVE, better="lower", summary="mean", printed=True,
    ),
    "fvu_patches": Metric(
        label="FVU of patches", definition="FVU over patches only, about their own mean.",
        bounds=_POSITIVE, better="lower", summary="mean", printed=True,
    ),
    "nmse_cls": Metric(
        label="NMSE of CLS", definition="NMSE over CLS tokens only.", bounds=_POSITIVE, better="lower",
    ),
    "nmse_patches": Metric(
        label="NMSE of patches", definition="NMSE over patches only.", bounds=_POSITIVE, better="lower",
    ),
    "cosine_cls": Metric(
        label="cosine of CLS", definition="Cosine over CLS tokens only.", bounds=_CORRELATION, better="higher",
    ),
    "cosine_patches": Metric(
        label="cosine of patches", definition="Cosine over patches only.", bounds=_CORRELATION, better="higher",
    ),
    "l0_cls": Metric(
        label="L0 of CLS", definition="Mean L0 over CLS tokens only.", unit="per token", bounds=_POSITIVE, summary="mean",
    ),
    "l0_patches": Metric(
        label="L0 of patches", definition="Mean L0 over patches only.", unit="per token", bounds=_POSITIVE, summary="mean",
    ),
    "spearman_l0_objects": Metric(
        label="Spearman of L0, objects",
        definition="Spearman correlation of an image's mean L0 over its tokens with its number of objects (scenes).",
        bounds=_CORRELATION, better="higher", summary="mean", printed=True,
    ),
    "spearman_k_hat_objects": Metric(
        label="Spearman of k-hat, objects",
        definition="Spearman correlation of an image's mean k-hat over its tokens with its number of objects (scenes).",
        bounds=_CORRELATION, better="higher", summary="mean",
    ),
    "spearman_norm_objects": Metric(
        label="Spearman of the norm, objects",
        definition="Spearman correlation of an image's mean activation norm with its number of objects (scenes).",
        bounds=_CORRELATION, summary="mean", printed=True,
    ),
    "partial_l0_objects": Metric(
        label="Spearman of L0, objects, given the norm",
        definition="Partial Spearman correlation of an image's mean L0 with its number of objects, its mean activation norm taken out of both.",
        bounds=_CORRELATION, better="higher", summary="mean", printed=True,
    ),
    "partial_k_hat_objects": Metric(
        label="Spearman of k-hat, objects, given the norm",
        definition="Partial Spearman correlation of an image's mean k-hat with its number of objects, its mean activation norm taken out of both.",
        bounds=_CORRELATION, better="higher", summary="mean",
    ),
}  # fmt: skip
"""By name, the metrics of metrics.csv."""

BETWEEN_SEEDS: dict[str, Metric] = {
    "matched_cosine": Metric(
        label="matched cosine",
        definition=(
            "Cosine similarity of decoder directions of two seeds, matched one to one for the largest sum (Hungarian), "
            "averaged over the pairs; dead latents count, wherever they point. Up to 4096 latents."
        ),
        bounds=_CORRELATION, better="higher",
    ),
    "matched_cosine_alive": Metric(
        label="matched cosine, living latents",
        definition=(
            "The matched cosine among latents that fire on an evaluated row, averaged over the fewer ones of the two seeds."
        ),
        bounds=_CORRELATION, better="higher",
    ),
    "mutual_max_cosine": Metric(
        label="mutual nearest cosine",
        definition=(
            "Above 4096 latents: mean cosine of those pairs that are each other's nearest. Not comparable with "
            "matched_cosine: the latents without such a partner are left out."
        ),
        bounds=_CORRELATION, better="higher",
    ),
    "mutual_share": Metric(
        label="mutual share", definition="Above 4096 latents: share of the latents in such pairs.", bounds=_SHARE,
    ),
    "max_cosine_ab": Metric(
        label="nearest cosine of a", definition="Mean over latents of seed a of the largest cosine with one of seed b.",
        bounds=_CORRELATION, better="higher",
    ),
    "max_cosine_ba": Metric(
        label="nearest cosine of b", definition="Mean over latents of seed b of the largest cosine with one of seed a.",
        bounds=_CORRELATION, better="higher",
    ),
    "spearman_l0": Metric(
        label="Spearman of L0",
        definition="Spearman correlation between the seeds of a row's L0; absent where L0 is constant.",
        bounds=_CORRELATION, better="higher",
    ),
    "spearman_k_hat": Metric(
        label="Spearman of k-hat", definition="Spearman correlation between the seeds of the k that the SAE allows.",
        bounds=_CORRELATION, better="higher",
    ),
}  # fmt: skip
"""By name, the metrics of stability.csv."""


def summarised() -> list[str]:
    """Return the metrics that the summary has mean and standard deviation of."""
    return [name for name, metric in METRICS.items() if metric.summary == "mean"]


def stated() -> list[str]:
    """Return the metrics that the summary states once for all seeds: the row policy."""
    return [name for name, metric in METRICS.items() if metric.summary == "stated"]


def printed() -> list[str]:
    """Return the summarised metrics that printed tables have a column for."""
    return [name for name in summarised() if METRICS[name].printed]


def check(values: Mapping[str, float], known: Mapping[str, Metric] = METRICS) -> None:
    """Refuse a metric without an entry, and a value that the metric cannot have.

    Raises:
        ValueError: the code that measured it and the table disagree.
    """
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"metric {name!r} has no entry in saeflow.tables.metrics. Add one.")
        low, high = known[name].bounds
        if (low is not None and value < low - _TOLERANCE) or (
            high is not None and value > high + _TOLERANCE
        ):
            raise ValueError(f"metric {name}: expected a value in {low}..{high}, found {value!r}.")


def brief(values: Mapping[str, float]) -> str:
    """Return the printed metrics of one run as a line of a log."""
    return ", ".join(
        f"{METRICS[name].label} {METRICS[name].text(values[name])}"
        + (f" {METRICS[name].unit}" if METRICS[name].percent else "")
        for name in printed()
        if name in values
    )
