"""Measure SAEs and baselines of one store: the same rows, the same functions, one table."""

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from saeflow.errors import UserError
from saeflow.evaluation.baselines import baselines
from saeflow.evaluation.measure import Measured, measure_rows
from saeflow.evaluation.rows import RowSelection, RowStatistics, row_statistics
from saeflow.evaluation.splice import ModelInTheLoop
from saeflow.evaluation.tables import identify, write_evaluation
from saeflow.stores import open_store

logger = logging.getLogger(__name__)


class Bench:
    """What every SAE of one (source, hook point) is measured on.

    Args:
        results: the results folder.
        source, hook_point: name the store.
        evaluation: `evaluation` of the parameters.
        device: where SAEs and the model run.
    """

    def __init__(
        self,
        results: Path,
        source: str,
        hook_point: str,
        evaluation: Mapping[str, Any],
        device: str,
    ) -> None:
        self.source = source
        self.hook_point = hook_point
        self.evaluation = evaluation
        self.device = device
        self.batch_size: int = evaluation["batch_size"]
        self._stores = results / "stores" / source
        self._model = results / "sources" / source / "model"
        self._inputs = results / "sources" / source / "inputs"
        self._clean = results / "evaluations" / source / hook_point / "clean"

    @property
    def inputs(self) -> list[Path]:
        """The result folders that a measurement reads."""
        stores = [self._stores / "train", self._stores / "evaluation"]
        if self._model.exists():
            return [*stores, self._model, self._clean]
        return [*stores, self._inputs]

    @cached_property
    def train(self) -> Any:
        """The training split's store."""
        return open_store(self._stores / "train" / f"{self.hook_point}.zarr")

    @cached_property
    def held_out(self) -> Any:
        """The evaluation split's store."""
        return open_store(self._stores / "evaluation" / f"{self.hook_point}.zarr")

    @cached_property
    def source_params(self) -> Mapping[str, Any]:
        """The parameters that the source's stores were made with."""
        return dict(self.held_out.attrs["source_params"])

    @cached_property
    def selection(self) -> RowSelection:
        """Which rows are measured; the norm limit comes from the training split."""
        multiple = self.evaluation["max_norm_multiple"]
        has_contexts = self.source_params["kind"] != "synthetic"
        return RowSelection(
            skip_first=self.evaluation["skip_first"] and has_contexts,
            norm_limit=None if multiple is None else multiple * self.train.median_norm,
        )

    @cached_property
    def statistics(self) -> RowStatistics:
        """Count and mean of the measured rows."""
        return row_statistics(self.held_out, self.selection, self.batch_size, self.device)

    @cached_property
    def features(self) -> Tensor | None:
        """(n_features, d_in) true dictionary of a synthetic source."""
        if self.source_params["kind"] != "synthetic":
            return None
        return load_file(self._inputs / "dictionary.safetensors")["features"]

    @cached_property
    def model_in_the_loop(self) -> ModelInTheLoop | None:
        """The source's model with its clean side, where the source has a model."""
        if not self._model.exists():
            return None
        return ModelInTheLoop(self._clean, self._model, self.device)

    @property
    def policy(self) -> dict[str, float]:
        """The row policy, as metrics that stand beside the others in every table."""
        multiple = self.evaluation["max_norm_multiple"]
        skipped = self.selection.skip_first or self.source_params["skip_first"]
        return {
            "rows": float(self.statistics.rows),
            "excluded_rows_fraction": self.statistics.excluded_fraction,
            "first_position_excluded": float(skipped),
            **({} if multiple is None else {"max_norm_multiple": float(multiple)}),
        }

    def measure(self, sae: Any, *, recovery: bool) -> Measured:
        """Every metric of one SAE or baseline.

        Args:
            sae: see `measure_rows`; `forward` is what is spliced into the model.
            recovery: compare its decoder with the true dictionary, where there is one.
        """
        features = self.features if recovery else None
        measured = measure_rows(
            sae, self.held_out, self.selection, self.statistics, self.batch_size, self.device,
            features,
        )  # fmt: skip
        metrics = self.policy | measured.metrics
        if self.model_in_the_loop is not None:
            metrics |= self.model_in_the_loop.metrics(sae.forward)
        return Measured(metrics, measured.histograms)

    def check_fits(self, config: Mapping[str, Any]) -> None:
        """Refuse an SAE that was trained on something else.

        Raises:
            UserError: source, hook point or width differ.
        """
        run = config["name"]
        trained_on = f"{config['source']}/{config['hook_point']}"
        here = f"{self.source}/{self.hook_point}"
        if trained_on != here:
            raise UserError(
                f"{self.held_out.path}: expected activations of {trained_on}, which SAE {run} was "
                f"trained on, found {here}. Evaluate it on its own store."
            )
        if config["d_in"] != self.held_out.d_in:
            raise UserError(
                f"{self.held_out.path}: expected activations of width {config['d_in']}, which SAE "
                f"{run} was trained on, found {self.held_out.d_in}. Train the SAE again on this store."
            )


def evaluate_sae(sae: Any, config: Mapping[str, Any], bench: Bench, folder: Path) -> None:
    """Measure one trained SAE and write its tables.

    Args:
        sae: as `saeflow.load` returns it.
        config: its config.json.
        bench: of the source and hook point it was trained on.
        folder: written: metrics.csv and histograms.csv.

    Raises:
        UserError: the SAE was trained on other activations, or a measurement has no value.
    """
    bench.check_fits(config)
    measured = bench.measure(sae.to(bench.device).eval(), recovery=True)
    logger.info("%s: %s", config["name"], _brief(measured.metrics))
    write_evaluation(folder, [(identify(config), measured.metrics, measured.histograms)])


def evaluate_baselines(ranks: list[int], bench: Bench, folder: Path) -> None:
    """Measure identity, mean and PCA of a store and write their tables.

    Args:
        ranks: of PCA; those that are not below the store's width are left out.
        bench: of the store.
        folder: written: metrics.csv and histograms.csv.
    """
    results = []
    for baseline in baselines(bench.train, ranks, bench.batch_size, bench.device):
        measured = bench.measure(baseline.to(bench.device).eval(), recovery=False)
        name = f"{bench.source}/{bench.hook_point}/{baseline.variant}/k{baseline.width}"
        logger.info("%s: %s", name, _brief(measured.metrics))
        ids = {
            "run": name,
            "source": bench.source,
            "hook_point": bench.hook_point,
            "entry": baseline.variant,
            "variant": baseline.variant,
            "schedule": "constant",
            "d_sae": baseline.width,
            "k": baseline.width,
            "seed": 0,
            "tokens": 0 if baseline.variant == "identity" else bench.train.rows,
        }
        results.append((ids, measured.metrics, measured.histograms))
    write_evaluation(folder, results)


def _brief(metrics: Mapping[str, float]) -> str:
    names = ("fvu", "l0_mean", "ce_degradation", "mmcs", "support_f1")
    return ", ".join(f"{name} {metrics[name]:.4g}" for name in names if name in metrics)
