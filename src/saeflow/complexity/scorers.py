"""Scorers: one number per context that says how complex it is.

A kind of scorer is a function and a line in KINDS. Scores lie in the scorer's own units; the probe maps
them to 0..10.
"""

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saeflow.config import SPLITS
from saeflow.errors import UserError
from saeflow.files import file_digest
from saeflow.sources import KINDS as SOURCE_KINDS
from saeflow.sources import SourceKind, kind_named, kind_of

if TYPE_CHECKING:
    import pandas as pd

SCORES = "scores.csv"


def _fits(kind: str, source: SourceKind) -> bool:
    """Return whether a kind of scorer is for a kind of source."""
    if kind == "table":
        return source.in_model is not None
    if kind == "true_count":
        return source.has_true_counts is not None
    return source.has_tokens


def check_scoring(name: str, scoring: Mapping[str, Any], source: Mapping[str, Any]) -> None:
    """Refuse a scorer that does not fit a source.

    Raises:
        UserError: it does not, or its table or formula is missing.
    """
    where = f"complexity.{name}"
    kind = kind_of(source)
    if not _fits(scoring["kind"], kind):
        wanted = [name for name in SOURCE_KINDS if _fits(scoring["kind"], kind_named(name))]
        raise UserError(
            f"{where}.kind: {scoring['kind']} needs a source of kind {' or '.join(wanted)}, found "
            f"{source['kind']}. Choose another scorer for that store."
        )
    if kind.probed_position(source) is None:
        raise UserError(
            f"{where}: the probe reads an image's CLS token, found tokens: patches in its source. Set tokens to "
            "all or cls."
        )
    if (
        scoring["kind"] == "true_count"
        and kind.has_true_counts is not None
        and not kind.has_true_counts(source)
    ):
        raise UserError(
            f"{where}.kind: true_count needs images whose objects are known (scenes). Choose the scorer table."
        )
    if scoring["kind"] == "table" and not Path(scoring["file"]).is_file():
        raise UserError(f"{where}.file: no such file: {scoring['file']}. Fix the path.")
    low_high = scoring["range"]
    if low_high is not None and not low_high[0] < low_high[1]:
        raise UserError(f"{where}.range: expected [low, high] with low < high, found {low_high}.")


def scoring_digests(scoring: Mapping[str, Any]) -> dict[str, str]:
    """Digests of what a scorer reads from outside the results, by name."""
    return {scoring["file"]: file_digest(Path(scoring["file"]))} if "file" in scoring else {}


def score_contexts(
    scoring: Mapping[str, Any], source: Mapping[str, Any], folder: Path, device: str, out: Path
) -> None:
    """Score contexts of both splits.

    Args:
        scoring: an entry of `complexity`.
        source: the source's parameters.
        folder: the source's folder, with model/ and inputs/.
        device: where a model runs.
        out: written: scores.csv with split, context, unit (of a text, the context's document), position and score;
            `position` names the row of the context that the probe reads, the last one of a text, the first one (CLS)
            of an image.

    Raises:
        UserError: the table misses contexts, or a score is not finite.
    """
    import pandas as pd

    tables = []
    inputs = kind_of(source).inputs(source, folder / "inputs", folder / "model")
    for split in SPLITS:
        context, position, score = KINDS[scoring["kind"]](scoring, source, folder, split, device)
        if not np.isfinite(score).all():
            first = context[~np.isfinite(score)][0]
            raise UserError(
                f"complexity ({scoring['kind']}): the score of context {first} of the {split} split is "
                "not finite. Fix it, or leave the context out."
            )
        unit = inputs.units(split)[context]
        columns = {"context": context, "unit": unit, "position": position, "score": score}
        tables.append(pd.DataFrame({"split": split, **columns}))
    pd.concat(tables).to_csv(out / SCORES, index=False, lineterminator="\n")


def _chosen(scoring: Mapping[str, Any], available: int) -> np.ndarray:
    """The contexts that are scored, spread evenly over the split."""
    count = available if scoring["contexts"] is None else min(scoring["contexts"], available)
    return np.arange(count) * available // count


def _read_at(source: Mapping[str, Any], contexts: np.ndarray) -> np.ndarray:
    """Return the position of each context that the probe reads."""
    return np.full(len(contexts), kind_of(source).probed_position(source))


def _inputs(folder: Path, split: str) -> np.ndarray:
    """(contexts, ...) token ids or pixels."""
    result: np.ndarray = np.load(folder / "inputs" / f"{split}.npy", mmap_mode="r")
    return result


def _of_text(measure: Callable[[str, Mapping[str, Any]], float]) -> Callable[..., Any]:
    """A scorer that measures the text of a context."""

    def scorer(
        scoring: Mapping[str, Any], source: Mapping[str, Any], folder: Path, split: str, device: str
    ) -> Any:
        from saeflow.sources.models import load_tokenizer

        tokenizer: Any = load_tokenizer(folder / "model")
        tokens = _inputs(folder, split)
        contexts = _chosen(scoring, len(tokens))
        texts = tokenizer.batch_decode(
            [tokens[context].tolist() for context in contexts], skip_special_tokens=True
        )
        scores = np.array([measure(text, scoring) for text in texts], dtype=np.float64)
        return contexts, _read_at(source, contexts), scores

    return scorer


def _readability(text: str, scoring: Mapping[str, Any]) -> float:
    """A readability formula of textstat; more is harder."""
    import textstat

    score = float(getattr(textstat, scoring["formula"])(text))
    return -score if scoring["formula"] == "flesch_reading_ease" else score


def _compression(text: str, scoring: Mapping[str, Any]) -> float:
    """Compressed over plain size (zlib, level 9): text that repeats itself is near 0."""
    plain = text.encode()
    return len(zlib.compress(plain, 9)) / max(1, len(plain))


def _surprisal(
    scoring: Mapping[str, Any], source: Mapping[str, Any], folder: Path, split: str, device: str
) -> Any:
    """Mean cross-entropy of a context's tokens under the source's own model, in nats."""
    import torch

    from saeflow.progress import progress
    from saeflow.sources.models import load_model

    model = load_model(folder / "model", device)
    tokens = _inputs(folder, split)
    contexts = _chosen(scoring, len(tokens))
    batch, scores = int(source["forward_batch"]), []
    with torch.inference_mode():
        for start in progress(range(0, len(contexts), batch), f"surprisal of {split}", "batch"):
            rows = np.asarray(tokens[contexts[start : start + batch]], dtype=np.int64)
            ids = torch.as_tensor(rows, device=device)
            logits: Any = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), ids[:, 1:], reduction="none"
            )
            scores.append(loss.double().mean(1).cpu().numpy())
    return contexts, _read_at(source, contexts), np.concatenate(scores)


def _table(
    scoring: Mapping[str, Any], source: Mapping[str, Any], folder: Path, split: str, device: str
) -> Any:
    """A column of a table with columns split and context; each context once."""
    table = read_table(Path(scoring["file"]), scoring["column"])
    table = table[table["split"] == split].dropna(subset=["context"])
    available = len(_inputs(folder, split))
    where = f"{scoring['file']}: {split} split"
    contexts = table["context"].to_numpy()
    if len(contexts) and (contexts.min() < 0 or contexts.max() >= available):
        raise UserError(
            f"{where}: expected contexts 0..{available - 1}, found {contexts.min():g}.."
            f"{contexts.max():g}. Use the table that was made for these contexts."
        )
    if table["context"].duplicated().any():
        twice = table.loc[table["context"].duplicated(), "context"].iloc[0]
        raise UserError(f"{where}: context {twice:g} is there twice. Keep one row of it.")
    if scoring["drop_missing"]:
        table = table[table[scoring["column"]].notna()]
        contexts = table["context"].to_numpy()
    elif missing := sorted(set(range(available)) - set(contexts.tolist())):
        raise UserError(
            f"{where}: {len(missing)} of {available} contexts have no score, the first is {missing[0]}. "
            "Add them, or set drop_missing: true to fit the probe on the others."
        )
    if len(contexts) == 0:
        raise UserError(f"{where}: expected scores, found none. Add them.")
    contexts = contexts.astype(np.int64)
    return contexts, _read_at(source, contexts), table[scoring["column"]].to_numpy(np.float64)


def read_table(path: Path, column: str) -> "pd.DataFrame":
    """A CSV or Parquet table with columns split, context and `column`.

    Raises:
        UserError: it is no such table.
    """
    import pandas as pd

    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise UserError(f"{path}: expected a CSV or Parquet table ({error}). Fix it.") from None
    if lost := {"split", "context", column} - set(table.columns):
        raise UserError(
            f"{path}: expected columns split, context and {column}, {', '.join(sorted(lost))} is missing. "
            "Add it."
        )
    for name in ("context", column):
        if not pd.api.types.is_numeric_dtype(table[name]):
            raise UserError(f"{path}: expected numbers in column {name}, found text. Fix it.")
    return table


def _true_count(
    scoring: Mapping[str, Any], source: Mapping[str, Any], folder: Path, split: str, device: str
) -> Any:
    """The number of true features that are on, for every row of synthetic contexts; of scenes, of objects."""
    inputs = kind_of(source).inputs(source, folder / "inputs", folder / "model")
    return inputs.true_counts(split, _chosen(scoring, inputs.n_contexts(split)))


KINDS: dict[str, Callable[..., Any]] = {
    "compression": _of_text(_compression),
    "readability": _of_text(_readability),
    "surprisal": _surprisal,
    "table": _table,
    "true_count": _true_count,
}
