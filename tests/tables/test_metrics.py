"""The metric table is complete, agrees with what measures, and refuses what disagrees."""

import pytest

from saeflow.evaluation.controls import METRICS as CONTROLLED
from saeflow.evaluation.intervals import RATIOS
from saeflow.figures import FIGURES
from saeflow.tables.metrics import BETWEEN_SEEDS, METRICS, Metric, brief, check, printed, stated
from saeflow.tables.schema import TABLES, axis_label, heading, label

ALL = {**METRICS, **{f"seeds: {name}": metric for name, metric in BETWEEN_SEEDS.items()}}


@pytest.mark.parametrize("name", ALL)
def test_an_entry_is_whole(name: str) -> None:
    metric = ALL[name]
    assert (
        metric.definition[0].isupper() or metric.definition[0].isdigit() or " " in metric.definition
    )
    assert metric.definition.endswith(".")
    assert metric.label
    low, high = metric.bounds
    assert low is None or high is None or low < high
    assert not metric.percent or (metric.bounds == (0, 1) and metric.unit == "%")


def test_labels_of_printed_columns_differ() -> None:
    names = printed()
    assert len({heading(name) for name in names}) == len(names)


def test_metrics_with_intervals_and_controls_have_entries() -> None:
    assert set(RATIOS) <= set(METRICS)
    assert set(CONTROLLED) <= set(METRICS)


def test_columns_are_defined_and_words_have_no_unit() -> None:
    for name, table in TABLES.items():
        assert table.about.endswith("."), name
        for column, about in table.columns.items():
            assert about.definition.endswith("."), (name, column)
            assert about.kind != "word" or not about.unit, (name, column)


def test_one_to_one_matching_is_not_called_mean_max() -> None:
    matched = METRICS["matched_feature_cosine"]
    assert "one to one" in matched.definition
    assert axis_label("matched_feature_cosine") == matched.label == "matched cosine"
    assert not any("max cosine" in metric.label for metric in METRICS.values())
    assert FIGURES["recovery"].title


def test_names_have_units_where_they_are_drawn_and_printed() -> None:
    assert axis_label("l0_mean") == "mean L0 (active latents per token)"
    assert heading("ce_degradation") == "CE degradation (nats/token)"
    assert axis_label("lr") == "lr"
    assert label("some_new_metric") == "some new metric"


def test_the_summary_states_the_row_policy() -> None:
    assert stated() == [
        "rows", "train_rows", "excluded_rows_fraction", "first_position_excluded", "max_norm_multiple", "ce_first_position_kept", "ce_tokens",
        "ce_contexts", "ce_share", "ce_uniform", "ce_zero",
    ]  # fmt: skip


def test_an_unknown_metric_and_an_impossible_value_are_refused() -> None:
    with pytest.raises(ValueError, match="'toy' has no entry"):
        check({"toy": 1.0})
    with pytest.raises(ValueError, match=r"fvu: expected a value in 0.0\.\.None, found -0.1"):
        check({"fvu": -0.1})
    with pytest.raises(ValueError, match="dead_fraction"):
        check({"dead_fraction": 1.2})
    check({"fvu": 0.5, "kl": -1e-7, "dead_fraction": 1.0})


def test_shares_are_printed_in_per_cent() -> None:
    assert METRICS["dead_fraction"].text(0.0725) == "7.25"
    assert Metric(label="a", definition="b.").text(0.0725) == "0.0725"
    assert brief({"fvu": 0.12345, "dead_fraction": 0.0725, "mse": 1.0}) == "FVU 0.123, dead 7.25 %"


def test_rounding_of_half_precision_may_carry_kl_below_0() -> None:
    """Logits of bfloat16 near 100 are off by up to 0.25: over 500 tokens the mean KL of equal models is off by 0.004."""
    check({"kl": -0.004})
