"""Interpretation of one SAE's latents: sparse probes of facts that the source knows, detection by a scorer, absorption."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse

from saeflow.evaluation.absorption import absorb
from saeflow.evaluation.detection import Scorer, Text, detect, scorer_of
from saeflow.evaluation.judge import Judge
from saeflow.evaluation.probing import Rows, probe
from saeflow.evaluation.rows import EvaluatedRows
from saeflow.evaluation.setup import Setup
from saeflow.evaluation.tasks import asked, tasks
from saeflow.files import write_json
from saeflow.tables.evaluations import write_of_run

logger = logging.getLogger(__name__)

_COLUMNS = ("context", "position", "token", "true_indices", "cover", "label")


def interpret(
    sae: Any,
    config: Mapping[str, Any],
    setup: Setup,
    settings: Mapping[str, Any],
    folder: Path,
    scorer: Scorer | None = None,
) -> dict[str, Any]:
    """Write probing.csv, detection.csv and absorption.csv of one trained SAE.

    Args:
        sae: as `saeflow.load` returns it.
        config: its config.json.
        setup: of the source and hook point it was trained on.
        settings: evaluation.interpretability of the parameters.
        folder: written.
        scorer: takes the place of the one that settings name.

    Returns:
        Facts for the record: `judge`, what a language model was asked, where one was.

    Raises:
        UserError: the SAE was trained on other activations, the scorer cannot be used, or absorption not be measured.
    """
    setup.check_fits(config)
    detection = settings["detection"]
    judge = None
    if detection is not None and scorer is None:
        if detection["judge"] is not None:
            scorer = judge = Judge(detection["judge"], folder / "replies.jsonl")
        else:
            scorer = scorer_of(detection["scorer"])
    sae = sae.to(setup.device).eval()
    splits = {"train": replace(setup.rows, store=setup.train), "evaluation": setup.rows}
    known = {split: setup.inputs.known(split) for split in splits}
    held = {
        split: _read(sae, of_split, known[split], settings["rows"])
        for split, of_split in splits.items()
    }
    rows = {split: _probed(*held[split], known[split]) for split in splits}
    chosen = settings["probing"]
    lines = probe(rows["train"], rows["evaluation"], chosen["k"], chosen["rows"], chosen["seed"])
    write_of_run(folder, "probing", config, lines)
    found: list[dict[str, Any]] = []
    if scorer is not None and detection is not None and "token" in held["train"][2]:
        train, test = (
            Text(
                latents, columns["context"], columns["position"], tokens, known[split]["strings"],
            )
            for split, (_, latents, columns) in held.items()
            if (tokens := setup.inputs.tokens(split)) is not None
        )  # fmt: skip
        found = detect(train, test, detection, scorer)
    write_of_run(folder, "detection", config, found)
    if judge is not None:
        latents_of = [str(line["latent"]) for line in found]
        write_json(
            folder / "explanations.json", dict(zip(latents_of, judge.explanations, strict=True))
        )
    spelling = settings["absorption"]
    has_words = spelling is not None and setup.kind.has_tokens
    lines_of_letters = absorb(sae, setup, spelling) if has_words else []
    write_of_run(folder, "absorption", config, lines_of_letters)
    questions = len({line["task"] for line in lines})
    logger.info("%s: %d questions, %d latents", config["name"], questions, len(found))
    return {} if judge is None else {"judge": judge.facts()}


def _probed(
    x: np.ndarray,
    latents: sparse.csr_array,
    columns: Mapping[str, np.ndarray],
    known: Mapping[str, Any],
) -> Rows:
    kept = asked(columns)
    of_kept = {name: values[kept] for name, values in columns.items()}
    return Rows(x[kept], latents[kept], tasks(of_kept, known))


def _read(
    sae: Any, rows: EvaluatedRows, known: Mapping[str, Any], most: int
) -> tuple[np.ndarray, sparse.csr_array, dict[str, np.ndarray]]:
    """Activations, latents and columns of the first rows of a store, a random sample since stores are shuffled."""
    asked_of = {*_COLUMNS, *known.get("questions", {}).values()}
    names = [name for name in rows.store.columns if name in asked_of]
    xs, codes, columns, count = [], [], {name: [] for name in names}, 0  # type: ignore[var-annotated]
    with torch.inference_mode():
        for batch in rows:
            xs.append(batch.x.cpu().numpy())
            codes.append(sparse.csr_array(sae.encode(batch.x).float().cpu().numpy()))
            for name in names:
                columns[name].append(batch.column(name))
            count += len(batch.x)
            if count >= most:
                break
    if not count:
        raise rows.none_left()
    joined = {name: np.concatenate(parts)[:most] for name, parts in columns.items()}
    latents = sparse.csr_array(sparse.vstack(codes))[:most]
    return np.concatenate(xs)[:most], latents, joined
