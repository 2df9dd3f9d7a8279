"""Measure SAEs and baselines of one store: the same rows, the same measures, one table."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from saeflow.evaluation.baselines import baselines
from saeflow.evaluation.by_dimension import PerRow
from saeflow.evaluation.contexts import ContextMeans
from saeflow.evaluation.controls import Controls
from saeflow.evaluation.decoder_projection import DecoderProjection
from saeflow.evaluation.dimension import DIMENSIONS
from saeflow.evaluation.images import PerGroup, PerImage, write_cards
from saeflow.evaluation.intervals import UNIT, PerUnit, interval_lines
from saeflow.evaluation.measure import Lines, Measured, Observer, measure_rows
from saeflow.evaluation.recovery import Recovery
from saeflow.evaluation.setup import Setup
from saeflow.tables.evaluations import Evaluation, write_evaluation
from saeflow.tables.metrics import brief
from saeflow.tables.runs import identify

logger = logging.getLogger(__name__)

SUMS = "sums.safetensors"
"""Sums of each unit of the SAE's own source, whose quotients are metrics, for paired comparisons."""
ROWS, IN_MODEL, CONTROL = "rows.", "model.", "control."
"""Names in SUMS begin so: sums of evaluated rows, of predicted tokens of the model with the SAE in it, and of evaluated
rows under a control, whose name follows."""


def observers(setup: Setup, sae: Any, *, is_trained: bool) -> list[Observer]:
    """The measures of one SAE or baseline beside reconstruction and sparsity; a new measure is added here.

    Args:
        setup: rows, inputs and settings.
        sae: an SAE, or a baseline.
        is_trained: it is an SAE: its single latents mean something.
    """
    rows, settings = setup.rows, setup.settings
    found: list[Observer] = []
    if is_trained and (features := setup.inputs.true_features) is not None:
        found.append(
            Recovery(torch.from_numpy(features), sae.directions(), is_signed=sae.is_signed)
        )
    if groups := setup.inputs.row_groups:
        means = {name: rows.at(positions).statistics for name, positions in groups.items()}
        found.append(PerGroup(groups, means))
    if is_trained:
        found += [_per_context(setup), DecoderProjection(sae, rows.statistics.rows)]
    if (bootstrap := settings.get("bootstrap")) is not None:
        per_unit = PerUnit(setup.inputs.units("evaluation"), bootstrap)
        found += [per_unit, Controls(sae, rows, per_unit, bootstrap)]
    if is_trained and setup.folders.dimension is not None:
        found.append(
            PerRow(
                load_file(setup.folders.dimension / DIMENSIONS), rows.store.columns,
                setup.inputs.row_groups, setup.inputs.units("evaluation"), bootstrap,
            )
        )  # fmt: skip
    return found


def _per_context(setup: Setup) -> ContextMeans:
    """Means of each context; of images, with what its concept cards are chosen by."""
    rows, settings = setup.rows, setup.settings
    columns, listed = rows.store.columns, settings["contexts_listed"]
    if (images := setup.inputs.images) is None:
        return ContextMeans(rows.contexts, columns, listed)
    cards, n_images = settings["concept_cards"], len(images.pixels)
    return PerImage(n_images, columns, listed, min(cards["among"], n_images) if cards else 0)


def _last_rows(setup: Setup) -> int:
    """Contexts of the training split whose last row is stored; where its rows are deleted, all of them."""
    if setup.train.has_rows:
        return int(setup.train.n_last)
    return int(setup.train.attrs["raw_rows"] // len(np.unique(setup.held_out.column("position"))))


def row_policy(setup: Setup, sae: Any, *, is_trained: bool) -> dict[str, float]:
    """Return the row policy as metrics that stand beside the others in every table."""
    trains_on_last = is_trained and sae.trains_on == "last"
    rows, multiple = setup.rows, setup.settings["max_norm_multiple"]
    skips = rows.selection.positions == "rest" or setup.source_params.get("skip_first", False)
    return {
        "rows": float(rows.statistics.rows),
        "train_rows": float(_last_rows(setup) if trains_on_last else setup.train.rows),
        "excluded_rows_fraction": rows.statistics.excluded_fraction,
        "first_position_excluded": float(skips),
        **({} if multiple is None else {"max_norm_multiple": float(multiple)}),
    }


def measure(
    setup: Setup,
    sae: Any,
    *,
    is_trained: bool,
    observed: Sequence[Observer] | None = None,
) -> tuple[Evaluation, Measured]:
    """Measure one SAE or baseline on rows and in the model.

    Args:
        setup: rows, inputs and model.
        sae: see `measure_rows`; `forward` is what is spliced into the model.
        is_trained: it is an SAE.
        observed: measures of the rows; None for those of `observers`.

    Returns:
        All that is written, and what the pass over the rows found.
    """
    if observed is None:
        observed = observers(setup, sae, is_trained=is_trained)
    measured = measure_rows(sae, setup.rows, observed)
    metrics = row_policy(setup, sae, is_trained=is_trained) | measured.metrics
    tables: dict[str, Lines] = dict(measured.tables)
    sums: dict[str, Any] = {}
    for observer in observed:
        if isinstance(observer, PerUnit):
            sums |= {f"{ROWS}{name}": values for name, values in observer.saved.items()}
        if isinstance(observer, Controls):
            sums |= {
                f"{CONTROL}{control}.{name}": values
                for control, held in observer.found.items()
                for name, values in held.saved.items()
            }
    # Labelled sets are no rows of a store: once, with the SAE's own source.
    if setup.in_model is not None and (setup.is_own or not setup.kind.has_labelled_sets):
        found = setup.in_model.measure(sae, is_trained=is_trained)
        metrics |= found.metrics
        tables |= found.tables
        if "intervals" in tables and found.sums:
            more = interval_lines(found.sums, setup.settings["bootstrap"])
            tables["intervals"] = [*tables["intervals"], *more]
            saved = {UNIT: found.units, **found.sums}
            sums |= {f"{IN_MODEL}{name}": values for name, values in saved.items()}
    return Evaluation(setup.on, metrics, measured.histograms, tables, sums), measured


def evaluate_sae(
    sae: Any, config: Mapping[str, Any], measured_on: Sequence[Setup], folder: Path
) -> None:
    """Measure one trained SAE and write its tables.

    Args:
        sae: as `saeflow.load` returns it.
        config: its config.json.
        measured_on: setups of the source and hook point it was trained on, the first of this source itself.
        folder: written: the tables of the job `evaluate`, and concept cards of images, those of another source in a folder of its name.

    Raises:
        UserError: the SAE was trained on other activations, or a measurement has no value.
    """
    results = []
    for setup in measured_on:
        setup.check_fits(config)
        sae = sae.to(setup.device).eval()
        observed = observers(setup, sae, is_trained=True)
        found, measured = measure(setup, sae, is_trained=True, observed=observed)
        logger.info("%s%s: %s", config["name"], _where(setup), brief(found.metrics))
        results.append((identify(config), found))
        if setup.is_own and found.sums:
            save_file(dict(found.sums), folder / SUMS)
        for observer in observed:
            if isinstance(observer, PerImage):
                place = folder if setup.is_own else folder / setup.on
                place.mkdir(exist_ok=True)
                _write_cards(setup, sae, observer, measured, place)
    write_evaluation(folder, results)


def _write_cards(
    setup: Setup, sae: Any, per_image: PerImage, measured: Measured, folder: Path
) -> None:
    """Concept cards of an SAE of images, where they are asked for; see `write_cards`."""
    settings, images, model = setup.settings["concept_cards"], setup.inputs.images, setup.in_model
    if settings is None or images is None or model is None:
        return
    write_cards(
        sae, setup.rows, per_image, measured.fired, images, partial(model.name_latents, sae),
        dict(settings, among=per_image.among), folder,
    )  # fmt: skip


def evaluate_baselines(ranks: list[int], measured_on: Sequence[Setup], folder: Path) -> None:
    """Measure identity, mean and PCA of a store and write their tables.

    Args:
        ranks: of PCA; those that are not below the store's width are left out.
        measured_on: setups of the store: baselines are fitted to its training split.
        folder: written: metrics.csv and histograms.csv.
    """
    results = []
    own = measured_on[0]
    fitted = baselines(own.train, ranks, own.settings["batch_size"], own.device)
    for baseline, setup in itertools.product(fitted, measured_on):
        moved = baseline.to(setup.device).eval()
        found, _ = measure(setup, moved, is_trained=False)
        name = f"{setup.source}/{setup.hook_point}/{baseline.variant}/k{baseline.width}"
        logger.info("%s%s: %s", name, _where(setup), brief(found.metrics))
        ids = {
            "run": name,
            "source": setup.source,
            "hook_point": setup.hook_point,
            "entry": baseline.variant,
            "variant": baseline.variant,
            "schedule": "constant",
            "d_sae": baseline.width,
            "k": baseline.width,
            "seed": 0,
            "tokens": 0 if baseline.variant == "identity" else setup.train.rows,
        }
        results.append((ids, found))
    write_evaluation(folder, results)


def _where(setup: Setup) -> str:
    return "" if setup.is_own else f" on {setup.on}"
