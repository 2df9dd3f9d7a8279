"""What each figure or table needs of the parameters, so that one without data is refused before the first job."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from saeflow.errors import UserError

_FIXED = ("topk",)
"""Variants whose number of active latents does not vary."""


class _Asked:
    """Parameters as figures depend on them."""

    def __init__(self, params: Mapping[str, Any], runs: Iterable[Any]) -> None:
        self.runs = list(runs)
        self.evaluation = params["evaluation"]
        used = {run.source for run in self.runs}
        self.sources = {name: params["sources"][name] for name in used}
        also = self.evaluation.get("also_on", {})
        self.measured = used | {other for name in used for other in also.get(name, ())}
        self.measured_sources = [params["sources"][name] for name in self.measured]
        self.probed_at = [
            s for one in params["complexity"].values() for s in one.get("probe_at", ())
        ]
        self.interpreted = self.evaluation.get("interpretability") or {}

    def kind(self, kind: str) -> bool:
        return any(source["kind"] == kind for source in self.sources.values())

    def variant(self, *variants: str) -> bool:
        return any(run.variant in variants for run in self.runs)

    def sized(self) -> bool:
        """Whether runs differ in their number of latents alone."""
        sizes: dict[str, set[int]] = {}
        for run in self.runs:
            sizes.setdefault(re.sub(r"/d\d+-?|seed\d+$", "/", run.name), set()).add(run.d_sae)
        return any(len(found) > 1 for found in sizes.values())

    def seeded(self) -> bool:
        settings = [re.sub(r"-?seed\d+$", "", run.name) for run in self.runs]
        return len(set(settings)) < len(settings)

    def labelled(self) -> bool:
        return self.kind("vision") and bool(self.evaluation["labelled_sets"])

    def cards(self) -> bool:
        return self.kind("vision") and self.evaluation["concept_cards"] is not None

    def varying(self) -> bool:
        return any(run.variant not in _FIXED for run in self.runs)

    def dimension(self) -> bool:
        chosen = self.evaluation["dimension"]
        return (
            chosen is not None and bool(self.measured & set(chosen["sources"])) and self.varying()
        )

    def objects(self) -> bool:
        return any("scenes" in source.get("images", {}) for source in self.measured_sources)

    def hook_points(self) -> list[str]:
        """Where probes read."""
        own = [run.hook_point for run in self.runs if run.options.get("complexity")]
        return own + [store.partition("/")[2] for store in self.probed_at]

    def interprets(self, part: str) -> bool:
        return bool(self.interpreted.get("runs")) and self.interpreted.get(part) is not None


_PROBES = "a run of the variant adaptive_k, or complexity.NAME.probe_at"
_LABELLED = "a vision source with SAEs and evaluation.labelled_sets"
_CARDS = "a vision source with SAEs and evaluation.concept_cards"
_SIZES = "an entry of saes with several d_sae"

NEEDS: dict[str, tuple[str, Callable[[_Asked], bool]]] = {
    "ce_l0": ("a text source with SAEs", lambda a: a.kind("text")),
    "recovery": ("a synthetic source with SAEs", lambda a: a.kind("synthetic")),
    "dictionary_size": (_SIZES, _Asked.sized),
    "table_dictionary_size": (_SIZES, _Asked.sized),
    "top_concepts": (_LABELLED, _Asked.labelled),
    "table_top_n": (_LABELLED, _Asked.labelled),
    "concepts": (_CARDS, _Asked.cards),
    "simple_to_complex": (
        f"{_CARDS}, and a variant whose L0 varies", lambda a: a.cards() and a.varying()
    ),
    "adaptivity": (
        "images of generated scenes, or evaluation.dimension of a source with SAEs whose L0 varies",
        lambda a: a.objects() or a.dimension(),
    ),
    "k_dimension": (
        "evaluation.dimension of a source with SAEs whose L0 varies", _Asked.dimension
    ),
    "controls": (
        "evaluation.bootstrap and a run of a variant that chooses its k (soft_topk, adaptive_k)",
        lambda a: bool(a.evaluation.get("bootstrap")) and a.variant("soft_topk", "adaptive_k"),
    ),
    "k_complexity": (
        "a run of the variant adaptive_k and evaluation.contexts_listed above 0",
        lambda a: a.variant("adaptive_k") and a.evaluation["contexts_listed"] > 0,
    ),
    "complexity": (_PROBES, lambda a: bool(a.hook_points())),
    "table_probes": (_PROBES, lambda a: bool(a.hook_points())),
    "probe_layers": (
        f"{_PROBES}, at a block of a model", lambda a: any("blocks." in p for p in a.hook_points())
    ),
    "stability": ("an entry of saes with several seeds", _Asked.seeded),
    "table_ablation": ("a run of the variant sparsemax", lambda a: a.variant("sparsemax")),
    "table_guided_k": (
        "an entry with options: {k: {mean_l0_of: RUN}}", lambda a: any(run.guide for run in a.runs)
    ),
    "probing": ("evaluation.interpretability with probing", lambda a: a.interprets("probing")),
    "table_interpretability": (
        "evaluation.interpretability with detection", lambda a: a.interprets("detection")
    ),
    "table_absorption": (
        "evaluation.interpretability with absorption", lambda a: a.interprets("absorption")
    ),
}  # fmt: skip
"""Of figures that not every parameter file has data for: what is needed, and whether it is there."""


def check_figures(params: Mapping[str, Any], runs: Iterable[Any]) -> None:
    """Refuse a figure that would find no data.

    Args:
        params: valid parameters.
        runs: their `SAEConfig`s.

    Raises:
        UserError: `figures.names` has one.
    """
    asked = _Asked(params, runs)
    for name in params["figures"]["names"]:
        if name in NEEDS:
            needed, is_there = NEEDS[name]
            if not is_there(asked):
                raise UserError(
                    f"figures.names: {name} needs {needed}; these parameters have none. Add it, or take {name} out."
                )
