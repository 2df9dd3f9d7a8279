"""Needs of a figure of the parameters, so that one without data is refused before the first job."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from saeflow.config import imports
from saeflow.sources import SourceKind, kind_of

_FIXED = ("topk",)
"""Variants whose number of active latents does not vary."""


class Asked:
    """Parameters as figures depend on them.

    Args:
        params: valid parameters.
        runs: their `SAEConfig`s.
    """

    def __init__(self, params: Mapping[str, Any], runs: Iterable[Any]) -> None:
        self.runs = list(runs)
        self.evaluation = params["evaluation"]
        used = {one.source for one in (*self.runs, *imports(params))}
        self.sources = {name: params["sources"][name] for name in used}
        also = self.evaluation.get("also_on", {})
        self.measured = used | {other for name in used for other in also.get(name, ())}
        self.measured_sources = [params["sources"][name] for name in self.measured]
        self.probed_at = [
            s for one in params["complexity"].values() for s in one.get("probe_at", ())
        ]
        self.interpreted = self.evaluation.get("interpretability") or {}

    def source(self, fact: Callable[[SourceKind], bool]) -> bool:
        """Tell whether an SAE is measured on a source of a kind with this fact."""
        return any(fact(kind_of(source)) for source in self.sources.values())

    def variant(self, *variants: str) -> bool:
        """Tell whether a run is of one of these variants."""
        return any(run.variant in variants for run in self.runs)

    def sized(self) -> bool:
        """Tell whether runs differ in their number of latents alone."""
        sizes: dict[str, set[int]] = {}
        for run in self.runs:
            sizes.setdefault(re.sub(r"/d\d+-?|seed\d+$", "/", run.name), set()).add(run.d_sae)
        return any(len(found) > 1 for found in sizes.values())

    def seeded(self) -> bool:
        """Tell whether runs differ in their seed alone."""
        settings = [re.sub(r"-?seed\d+$", "", run.name) for run in self.runs]
        return len(set(settings)) < len(settings)

    def labelled(self) -> bool:
        """Tell whether images are classified."""
        classifies = self.source(lambda kind: kind.has_labelled_sets)
        return classifies and bool(self.evaluation["labelled_sets"])

    def cards(self) -> bool:
        """Tell whether concepts of images are shown."""
        has_images = self.source(lambda kind: kind.has_images)
        return has_images and self.evaluation["concept_cards"] is not None

    def varying(self) -> bool:
        """Tell whether some run's number of active latents varies."""
        return any(run.variant not in _FIXED for run in self.runs)

    def dimension(self) -> bool:
        """Tell whether local intrinsic dimension is estimated where some L0 varies."""
        chosen = self.evaluation["dimension"]
        return (
            chosen is not None and bool(self.measured & set(chosen["sources"])) and self.varying()
        )

    def objects(self) -> bool:
        """Tell whether images of scenes are measured, whose objects are counted."""
        return any("scenes" in source.get("images", {}) for source in self.measured_sources)

    def hook_points(self) -> list[str]:
        """Return the hook points that complexity probes read."""
        own = [run.hook_point for run in self.runs if run.options.get("complexity")]
        return own + [store.partition("/")[2] for store in self.probed_at]

    def deep(self) -> bool:
        """Tell whether SAEs are trained at two blocks or more of a source's model."""
        blocks: dict[str, set[str]] = {}
        for run in self.runs:
            if found := re.search(r"blocks\.(\d+)\.", run.hook_point):
                blocks.setdefault(run.source, set()).add(found[1])
        return any(len(found) > 1 for found in blocks.values())

    def interprets(self, part: str) -> bool:
        """Tell whether `evaluation.interpretability` names runs and this part."""
        return bool(self.interpreted.get("runs")) and self.interpreted.get(part) is not None


@dataclass(frozen=True)
class Need:
    """Needs of one figure of the parameters.

    Attributes:
        what: in words, for the refusal.
        is_there: whether parameters have it.
    """

    what: str
    is_there: Callable[[Asked], bool]


TRAINED = Need("an entry of saes that is trained", lambda asked: bool(asked.runs))
SIZES = Need("an entry of saes with several d_sae", Asked.sized)
DEPTH = Need("SAEs at two or more blocks of a model (hook_points: [blocks.*.PLACE])", Asked.deep)
LABELLED = Need("a vision source with SAEs and evaluation.labelled_sets", Asked.labelled)
CARDS = Need("a vision source with SAEs and evaluation.concept_cards", Asked.cards)
PROBES = Need(
    "a run of the variant adaptive_k, or complexity.NAME.probe_at", lambda a: bool(a.hook_points())
)
