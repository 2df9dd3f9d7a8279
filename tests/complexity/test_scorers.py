"""Scorers of contexts, each against a reference of its own."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from saeflow.complexity.scorers import check_scoring, score_contexts, scoring_digests
from saeflow.errors import UserError
from saeflow.files import file_digest
from saeflow.sources import open_source, prepare_inputs

VISION = {"kind": "vision", "images": {"folder": "somewhere"}, "tokens": "all"}
ALL: dict[str, Any] = {"contexts": None, "range": None}
SYNTHETIC = {
    "kind": "synthetic", "hook_points": ["features"], "d_in": 12, "n_features": 12,
    "coherence": 0.1, "l0_law": {"kind": "uniform", "smallest": 1, "largest": 5},
    "frequency_exponent": 0, "correlation": None, "hierarchy": None,
    "coefficient": {"kind": "normal", "mean": 1.0, "std": 0.2}, "noise_std": 0.0,
    "skip_first": False, "max_norm_multiple": None, "seed": 0,
}  # fmt: skip


def scores(scoring: dict[str, Any], text: tuple[Any, Path], out: Path) -> pd.DataFrame:
    params, folder = text
    score_contexts(scoring, params, folder, "cpu", out)
    return pd.read_csv(out / "scores.csv")


def texts(folder: Path, split: str) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokens = np.load(folder / "inputs" / f"{split}.npy")
    return [tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in tokens]


def test_compression_is_compressed_over_plain_size(text: Any, tmp_path: Path) -> None:
    found = scores({"kind": "compression", **ALL}, text, tmp_path)
    assert set(found.position) == {31}
    for split in ("train", "evaluation"):
        of_split = found[found.split == split]
        assert of_split.context.tolist() == list(range(len(of_split)))
        plain = [one.encode() for one in texts(text[1], split)]
        expected = [len(zlib.compress(one, 9)) / len(one) for one in plain]
        np.testing.assert_allclose(of_split.score, expected, rtol=1e-12)


@pytest.mark.parametrize("formula", ["flesch_kincaid_grade", "flesch_reading_ease", "gunning_fog"])
def test_readability_is_the_librarys_and_more_is_harder(
    formula: str, text: Any, tmp_path: Path
) -> None:
    import textstat

    found = scores({"kind": "readability", "formula": formula, **ALL}, text, tmp_path)
    sign = -1 if formula == "flesch_reading_ease" else 1
    expected = [sign * getattr(textstat, formula)(one) for one in texts(text[1], "train")]
    np.testing.assert_allclose(found[found.split == "train"].score, expected)


def test_surprisal_is_the_models_own_loss(text: Any, tmp_path: Path) -> None:
    """Against the loss that the model itself reports, one context at a time."""
    found = scores({"kind": "surprisal", "contexts": 5, "range": None}, text, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(text[1] / "model").eval()
    tokens = np.load(text[1] / "inputs" / "train.npy")
    of_split = found[found.split == "train"]
    assert of_split.context.tolist() == [len(tokens) * i // 5 for i in range(5)]
    for context, score in zip(of_split.context, of_split.score, strict=True):
        ids = torch.tensor(tokens[context].astype(np.int64))[None]
        with torch.inference_mode():
            assert score == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-4)


def test_true_count_is_that_of_each_synthetic_row(tmp_path: Path) -> None:
    folder = tmp_path / "synthetic"
    (folder / "inputs").mkdir(parents=True)
    prepare_inputs(SYNTHETIC, {"train": 512, "evaluation": 256}, folder, folder / "inputs")
    scoring = {"kind": "true_count", "contexts": 2, "range": [0, 6]}
    found = scores(scoring, (SYNTHETIC, folder), tmp_path)
    source = open_source(SYNTHETIC, folder, "cpu")
    for split, contexts in (("train", [0, 2]), ("evaluation", [0, 1])):
        of_split = found[found.split == split]
        columns = [source.block(split, c, c + 1).columns for c in contexts]
        expected = np.concatenate([(c["true_indices"] >= 0).sum(1) for c in columns])
        np.testing.assert_array_equal(of_split.score, expected)
        np.testing.assert_array_equal(
            of_split.position, np.concatenate([c["position"] for c in columns])
        )


def write_table(path: Path, text: Any, change: Any = None) -> Path:
    rows = [
        {"split": split, "context": context, "label": (7 * context) % 11 - 0.5}
        for split in ("train", "evaluation")
        for context in range(len(np.load(text[1] / "inputs" / f"{split}.npy")))
    ]
    table = pd.DataFrame(rows)
    if change:
        table = change(table)
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path)
    return path


def table_scoring(path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "table", "file": str(path), "column": "label", "drop_missing": False,
        "range": None, **changes,
    }  # fmt: skip


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_is_joined_by_context(suffix: str, text: Any, tmp_path: Path) -> None:
    path = write_table(tmp_path / f"labels.{suffix}", text, lambda t: t.sample(frac=1))
    scoring = table_scoring(path)
    found = scores(scoring, text, tmp_path)
    assert ((7 * found.context) % 11 - 0.5 == found.score).all()
    assert scoring_digests(scoring) == {str(path): file_digest(path)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[t.context != 3], "1 of 40 contexts have no score, the first is 3"),
        (lambda t: t.assign(label=t.label.where(t.context != 3)), "context 3 .* not finite"),
        (lambda t: t.assign(label=np.inf), "not finite"),
        (lambda t: t.assign(label="high"), "found text"),
        (lambda t: t.drop(columns="split"), "split is missing"),
        (lambda t: t.assign(context=t.context + 1), "expected contexts 0..39"),
        (lambda t: pd.concat([t, t[:1]]), "context 0 is there twice"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    change: Any, message: str, text: Any, tmp_path: Path
) -> None:
    path = write_table(tmp_path / "labels.csv", text, change)
    with pytest.raises(UserError, match=message):
        scores(table_scoring(path), text, tmp_path)
    assert not (tmp_path / "scores.csv").exists()


def test_missing_labels_are_dropped_never_zero(text: Any, tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "labels.csv",
        text,
        lambda t: t.assign(label=t.label.where(t.context != 3))[t.context != 5],
    )
    found = scores(table_scoring(path, drop_missing=True), text, tmp_path)
    assert not {3, 5} & set(found.context)
    assert ((7 * found.context) % 11 - 0.5 == found.score).all()


def test_scorers_that_do_not_fit_the_source_are_refused(text: Any, tmp_path: Path) -> None:
    params = text[0]
    for scoring, source, message in (
        ({"kind": "true_count", **ALL}, params, "needs a source of kind synthetic"),
        ({"kind": "compression", **ALL}, SYNTHETIC, "needs a source of kind text"),
        ({"kind": "surprisal", **ALL}, VISION, "needs a source of kind text"),
        ({"kind": "true_count", **ALL}, VISION, "needs images whose objects are known"),
        (
            {"kind": "true_count", **ALL},
            VISION | {"tokens": "patches"},
            "the probe reads an image's CLS token",
        ),
        (table_scoring(tmp_path / "none.csv"), params, "no such file"),
        ({"kind": "compression", "contexts": None, "range": [3, 3]}, params, "low < high"),
    ):
        with pytest.raises(UserError, match=message):
            check_scoring("labels", scoring, source)
    check_scoring("labels", {"kind": "compression", **ALL}, params)
