"""The setup that every SAE of one store is measured with: rows, prepared inputs, the model in the loop."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from saeflow.errors import UserError
from saeflow.evaluation.in_model import ModelInTheLoop, open_model
from saeflow.evaluation.rows import EvaluatedRows, RowSelection
from saeflow.sources import Inputs, SourceKind, kind_of
from saeflow.stores import open_store


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Result folders that a measurement opens; a job states them (saeflow.jobs.declared).

    Attributes:
        train: the store that the SAEs are trained on.
        held_out: the store whose rows are measured.
        inputs: what these rows are of: tokens, pixels, the true dictionary.
        model: the source's model; None without one.
        clean: the model's clean side; None without a model, or where it is not needed.
        dimension: local intrinsic dimensions of the measured rows; None where they are not asked for.
    """

    train: Path
    held_out: Path
    inputs: Path | None = None
    model: Path | None = None
    clean: Path | None = None
    dimension: Path | None = None

    @classmethod
    def of(cls, reads: Mapping[str, Path], on: str | None = None) -> "Folders":
        """Choose the folders of one measurement.

        Args:
            reads: the folders that a job reads, by their role there.
            on: the source whose held-out rows are measured, if it is another one than the SAEs are trained on.
        """
        place = "" if on is None else f"on/{on}/"
        return cls(
            train=reads["train"],
            held_out=reads[f"{place}evaluation"],
            inputs=reads.get(f"{place}inputs"),
            model=reads.get("model"),
            clean=reads.get(f"{place}clean", reads.get("clean")),
            dimension=reads.get(f"{place}dimension"),
        )


class Setup:
    """Rows, inputs and model that SAEs and baselines of one (source, hook point) are measured with.

    The training split gives the norm limit, the mean row and what baselines are fitted to.

    Args:
        folders: what is opened.
        source, hook_point: name the store that the SAEs are trained on.
        settings: `evaluation` of the parameters.
        device: where SAEs and the model run.
        on: the source whose held-out rows are measured, of the same model; None for `source`.
    """

    def __init__(
        self,
        folders: Folders,
        source: str,
        hook_point: str,
        settings: Mapping[str, Any],
        device: str,
        on: str | None = None,
    ) -> None:
        self.source, self.on, self.hook_point = source, on or source, hook_point
        self.settings, self.device = settings, device
        self.folders = folders

    @property
    def is_own(self) -> bool:
        """Return whether the measured rows are of the source that the SAEs are trained on."""
        return self.on == self.source

    @cached_property
    def train(self) -> Any:
        """The training split's store."""
        return open_store(self.folders.train / f"{self.hook_point}.zarr")

    @cached_property
    def held_out(self) -> Any:
        """The evaluation split's store."""
        return open_store(self.folders.held_out / f"{self.hook_point}.zarr")

    @cached_property
    def source_params(self) -> Mapping[str, Any]:
        """The parameters that the measured rows were made with."""
        return dict(self.held_out.attrs["source_params"])

    @property
    def kind(self) -> SourceKind:
        """The facts about the source's kind."""
        return kind_of(self.source_params)

    @cached_property
    def rows(self) -> EvaluatedRows:
        """The rows that are measured; the norm limit comes from the training split."""
        multiple = self.settings["max_norm_multiple"]
        skips = self.settings["skip_first"] and self.kind.has_tokens
        selection = RowSelection(
            positions="rest" if skips else "all",
            norm_limit=None if multiple is None else multiple * self.train.median_norm,
        )
        return EvaluatedRows(self.held_out, selection, self.settings["batch_size"], self.device)

    @cached_property
    def inputs(self) -> Inputs:
        """The prepared inputs that the measured rows are of."""
        inputs = self.folders.inputs
        assert inputs is not None
        model = self.folders.model or inputs.with_name("model")  # opened by kinds that have one
        return self.kind.inputs(self.source_params, inputs, model)

    @cached_property
    def in_model(self) -> ModelInTheLoop | None:
        """The source's model with its clean side; None for a source without a model."""
        clean, model = self.folders.clean, self.folders.model
        if clean is None or model is None:
            return None
        return open_model(self.source_params, clean, model, self.device)

    def check_fits(self, config: Mapping[str, Any]) -> None:
        """Refuse an SAE that was trained on something else.

        An SAE from elsewhere knows no digest of its model and no scale; what it does know is compared.

        Args:
            config: its config.json.

        Raises:
            UserError: source, hook point, width, model or scale differ.
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
        again = f"{run} was trained on, found {{}}. Train the SAE again on this store."
        model, here_model = config.get("model"), self.held_out.model
        if model is not None and model != here_model:
            raise UserError(
                f"{self.held_out.path}: expected activations of the model {model[:12]}, which SAE "
                + again.format((here_model or "none")[:12])
            )
        scale = config.get("scale")
        if scale is not None and not math.isclose(scale, self.train.scale, rel_tol=1e-6):
            raise UserError(
                f"{self.train.path}: expected activations of scale {scale:g}, which SAE "
                + again.format(f"{self.train.scale:g}")
            )


def setups(
    reads: Mapping[str, Path],
    source: str,
    hook_point: str,
    settings: Mapping[str, Any],
    device: str,
) -> list[Setup]:
    """The setup of a store, and one for each source of `also_on`, with what is particular to that source.

    Args:
        reads: the folders that the job reads, by their role there.
        source, hook_point, settings, device: as for `Setup`.
    """
    chosen = {key: value for key, value in settings.items() if key != "also_on"}
    others = settings.get("also_on", {})
    return [
        Setup(Folders.of(reads), source, hook_point, chosen, device),
        *(
            Setup(Folders.of(reads, on), source, hook_point, chosen | own, device, on)
            for on, own in others.items()
        ),
    ]
