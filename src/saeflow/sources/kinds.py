"""Kinds of sources: one record each of all that other steps ask about a kind.

A new kind is a module of its own that defines `KIND`, a `SourceKind`, and one line in KINDS. Modules are
imported when they are first used; importing one loads no model code.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saeflow.errors import UserError
from saeflow.sources.base import Inputs, Source

KINDS = {
    "synthetic": "saeflow.sources.synthetic",
    "synthetic_world": "saeflow.sources.synthetic_world",
    "text": "saeflow.sources.text",
    "vision": "saeflow.sources.vision",
}

Params = Mapping[str, Any]
"""One entry of `sources`."""


@dataclass(frozen=True, kw_only=True)
class InModel:
    """A measurement with reconstructions in the place of a model's activations.

    Attributes:
        module: the module that implements it, see `saeflow.evaluation.in_model`.
        options: options of `evaluation` that its clean side depends on.
        has_labelled_sets: it runs the model on labelled sets, not on contexts of the evaluation split.
    """

    module: str
    options: tuple[str, ...]
    has_labelled_sets: bool = False


def _first(params: Params) -> int | None:
    return 0


@dataclass(frozen=True, kw_only=True)
class SourceKind:
    """Facts about one kind of source; defaults are those of a source without a model.

    Attributes:
        check: (name, params, folder): refuse parameters that the first job would refuse, see `check_source`.
        external_inputs: (params): digests of what `prepare_inputs` reads from outside the results, by name.
        prepare_inputs: (params, rows by split, model, folder, workers), see `saeflow.sources.prepare_inputs`.
        open: (params, folder, device): the activations.
        inputs: (params, inputs, model): the prepared inputs and what is known of them.
        rows_per_context: (params): rows that each context gives; None where only the fetched model tells.
        probed_position: (params): position of a context whose row a complexity probe reads; None where the
            stores do not hold it.
        has_true_counts: (params): the number of true features or objects of each context is known; None: never.
        prepares_in_parallel: several processes prepare its inputs.
        has_tokens: contexts are sequences of tokens of a text, whose first position `skip_first` may leave out.
        has_images: contexts are images.
        has_true_dictionary: the true features are known.
        in_model: how reconstructions are measured in its model; None without a model.
    """

    check: Callable[[str, Params, Path], None]
    external_inputs: Callable[[Params], dict[str, str]]
    prepare_inputs: Callable[[Params, Mapping[str, int], Path, Path, int], dict[str, Any]]
    open: Callable[[Params, Path, str], Source]
    rows_per_context: Callable[[Params], int | None]
    inputs: Callable[[Params, Path, Path], Inputs] = Inputs
    probed_position: Callable[[Params], int | None] = _first
    has_true_counts: Callable[[Params], bool] | None = None
    prepares_in_parallel: bool = False
    has_tokens: bool = False
    has_images: bool = False
    has_true_dictionary: bool = False
    in_model: InModel | None = None

    @property
    def has_labelled_sets(self) -> bool:
        """True if its model classifies labelled sets."""
        return self.in_model is not None and self.in_model.has_labelled_sets

    @property
    def predicts_contexts(self) -> bool:
        """True if its model is measured on contexts of the evaluation split, as next-token predictions are."""
        return self.in_model is not None and not self.in_model.has_labelled_sets


def kind_named(name: str) -> SourceKind:
    """The record of a kind.

    Raises:
        UserError: there is no such kind.
    """
    if name not in KINDS:
        raise UserError(f"kind: expected one of {', '.join(sorted(KINDS))}, found {name!r}.")
    kind: SourceKind = importlib.import_module(KINDS[name]).KIND
    return kind


def kind_of(params: Params) -> SourceKind:
    """The record of a source's kind.

    Raises:
        UserError: there is no such kind.
    """
    return kind_named(params["kind"])
