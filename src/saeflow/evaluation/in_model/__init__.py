"""The model in the loop: reconstructions in the place of activations, and what that does to the model's outputs.

A kind of source names the module that measures it (`SourceKind.in_model`); the module has

- `write_clean`, a `WriteClean`, which runs the model once as it is;
- `open_clean`, an `OpenClean`, which opens the clean side to measure SAEs against it.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from saeflow.evaluation.measure import Lines
from saeflow.sources import kind_of

if TYPE_CHECKING:
    from torch import Tensor


class NearText(NamedTuple):
    """The text that a latent is nearest to.

    Attributes:
        text: itself.
        cosine: with what the latent does.
        shuffled: the cosine that the nearest of as many shuffled texts stays below in 95 % of the shuffles.
    """

    text: str
    cosine: float
    shuffled: float


@dataclass(frozen=True)
class InModelResult:
    """One SAE or baseline in the model.

    Attributes:
        metrics: by name.
        sums: what each unit (a document) adds to sums, (units,) float64 by name, see `intervals.RATIOS`; empty
            where the model is not measured by context.
        units: (units,) their numbers in the source.
        tables: lines by table.
    """

    metrics: Mapping[str, float]
    sums: Mapping[str, np.ndarray] = field(default_factory=dict)
    units: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    tables: Mapping[str, Lines] = field(default_factory=dict)


class ModelInTheLoop(Protocol):
    """A source's model with its clean side."""

    @property
    def model(self) -> Any:
        """The loaded model."""
        ...

    def measure(self, sae: Any, *, is_trained: bool) -> InModelResult:
        """Compare the model with reconstructions in it with its clean side.

        Args:
            sae: an SAE or a baseline on the model's device.
            is_trained: it is an SAE, whose single latents mean something.

        Raises:
            UserError: the model's output is not finite.
        """
        ...

    def name_latents(self, sae: Any, latents: np.ndarray) -> list[NearText]:
        """The nearest text of each of some latents (n,); nothing where there are no texts."""
        ...


class WriteClean(Protocol):
    def __call__(
        self,
        source: Mapping[str, Any],
        folder: Path,
        hook_point: str,
        mean: "Tensor",
        settings: Mapping[str, Any],
        labelled: Mapping[str, Path],
        device: str,
        out: Path,
    ) -> dict[str, str]:
        """Run the model as it is and keep what every SAE is compared with.

        Args:
            source: the source's parameters.
            folder: the source's folder, with model/ and inputs/.
            hook_point: where activations are replaced.
            mean: (d_in,) mean row of the training split.
            settings: `evaluation` of the parameters.
            labelled: by name, the folders of prepared labelled sets.
            device: where the model runs.
            out: written.

        Returns:
            What is not measured and why, by what it is about; for the record and the report.
        """
        ...


class OpenClean(Protocol):
    def __call__(self, clean: Path, model: Path, device: str) -> ModelInTheLoop:
        """Open a clean side.

        Args:
            clean: the folder that `write_clean` wrote.
            model: the folder of the source's model.
            device: where the model runs.
        """
        ...


def _module(source: Mapping[str, Any]) -> Any:
    in_model = kind_of(source).in_model
    return None if in_model is None else importlib.import_module(in_model.module)


def clean_writer(source: Mapping[str, Any]) -> WriteClean:
    """The function that writes the clean side of a source's model."""
    writer: WriteClean = _module(source).write_clean
    return writer


def open_model(
    source: Mapping[str, Any], clean: Path, model: Path, device: str
) -> ModelInTheLoop | None:
    """A source's model in the loop, see `OpenClean`; None for a source without a model."""
    module = _module(source)
    if module is None:
        return None
    opened: ModelInTheLoop = module.open_clean(clean, model, device)
    return opened
