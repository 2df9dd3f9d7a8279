"""The jobs that a parameter file asks for, and the key of each: what the workflow runs, when again.

A key digests the rule's name, the job's own slice of the parameters, the code it runs, the pinned
libraries that can change its result, and the keys of the jobs it builds on. It does not depend on file
times, so a checkout of an older commit leaves nothing to do, and a changed parameter reruns exactly
the jobs that depend on it.
"""

import functools
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any, TypeVar, cast

from saeflow.config import ImportConfig, SAEConfig, expand_runs, imports, job_key, scorer_file
from saeflow.files import file_digest
from saeflow.sources import SourceKind, kind_of

_NUMERIC = ("torch", "numba", "numpy", "safetensors")
_MODEL = (*_NUMERIC, "transformers", "tokenizers", "datasets", "pillow")
_STORE = (*_MODEL, "zarr", "numcodecs")
_TABLE = (*_MODEL, "pandas", "scipy")
_PROBE = (*_STORE, "pandas", "scikit-learn", "scipy")
_DRAW = ("jinja2", "matplotlib", "numpy", "pandas", "safetensors")
_SHARED = ("config",)
_WRITTEN = tuple(
    f"tables/{name}" for name in ("evaluations", "files", "metrics", "numbers", "runs", "schema")
)
"""The modules of tables that measuring jobs run."""
_IN_MODEL = ("evaluation/in_model", "evaluation/zero_shot")
_ROW_POLICY = ("batch_size", "skip_first", "max_norm_multiple")
_OF_IMAGES = ("labelled_sets", "concept_cards")


Key = TypeVar("Key", bound=Callable[..., str])


def _once(method: Key) -> Key:
    """Work out a key once for each plan: the keys of all that stands before it go into it."""

    @functools.wraps(method)
    def kept(self: "Plan", *names: str) -> str:
        asked = (method.__name__, *names)
        if asked not in self._keys:
            self._keys[asked] = method(self, *names)
        return self._keys[asked]

    return cast(Key, kept)


class Plan:
    """What one parameter file asks for."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.params = params
        self._keys: dict[tuple[str, ...], str] = {}
        self.runs: dict[str, SAEConfig] = {run.name: run for run in expand_runs(params)}
        self.imports: dict[str, ImportConfig] = {one.name: one for one in imports(params)}
        self.evaluated: dict[str, SAEConfig | ImportConfig] = {**self.runs, **self.imports}

    @cached_property
    def stores(self) -> list[tuple[str, str]]:
        """(source, hook point) of every store that an SAE is trained or evaluated on."""
        return sorted({(run.source, run.hook_point) for run in self.evaluated.values()})

    @cached_property
    def sources(self) -> list[str]:
        """Sources that an SAE is trained or evaluated on, or a probe fitted on."""
        return sorted(self._learned_from | {o for s, _ in self.stores for o in self.others(s)})

    @cached_property
    def _learned_from(self) -> set[str]:
        """Sources that an SAE or a probe learns from."""
        return {source for source, *_ in (*self.stores, *self.probes)}

    def others(self, source: str) -> list[str]:
        """Sources on whose evaluation split the SAEs of a source are measured too."""
        return list(self.params["evaluation"].get("also_on", {}).get(source, ()))

    def splits(self, source: str) -> list[str]:
        """The splits that are extracted: of a source that is only evaluated on, no training split."""
        return ["train", "evaluation"] if source in self._learned_from else ["evaluation"]

    def clean_sides(self) -> list[tuple[str, str, str]]:
        """(source, hook point, other) of what `others` need of the model in the loop: of texts, their clean side."""
        return [
            (source, hook_point, other)
            for source, hook_point in self.stores
            for other in self.others(source)
            if not self.kind(other).has_labelled_sets
        ]

    @cached_property
    def probes(self) -> list[tuple[str, str, str]]:
        """(source, hook point, complexity) of every probe that an SAE uses, or that is asked for."""
        used = ((run, self.complexity(run.name)) for run in self.runs.values())
        found = {(run.source, run.hook_point, name) for run, name in used if name}
        for name, scoring in self.params["complexity"].items():
            for store in scoring.get("probe_at", ()):
                source, _, hook_point = store.partition("/")
                found.add((source, hook_point, name))
        return sorted(found)

    @cached_property
    def training_groups(self) -> list[list[str]]:
        """Runs that one job trains: `runtime.saes_per_job` at most, of one store; same batches first."""

        def stream(name: str) -> tuple[str, str, bool, int, int]:
            run = self.runs[name]
            guided = run.guide is not None  # apart: its guide is trained before
            return run.source, run.hook_point, guided, run.training.batch_size, run.seed

        names = sorted(self.runs, key=stream)
        return self._at_most(names, lambda name: stream(name)[:3])

    @cached_property
    def evaluation_groups(self) -> list[list[str]]:
        """Runs that one job evaluates: those that one job trains, and imported ones of one store."""
        imported = sorted(self.imports, key=lambda name: self.imports[name].store)
        return self.training_groups + self._at_most(imported, lambda n: self.imports[n].store)

    def _at_most(self, names: list[str], alike: Callable[[str], Any]) -> list[list[str]]:
        """`runtime.saes_per_job` names each, which follow one another and are alike."""
        size, found = self.params["runtime"]["saes_per_job"], []
        for _, some in itertools.groupby(names, alike):
            every = list(some)
            found += [every[i : i + size] for i in range(0, len(every), size)]
        return found

    @cached_property
    def seeds(self) -> dict[str, list[str]]:
        """By setting (a run's name without its seed): its runs, where there are several."""
        found: dict[str, list[str]] = {}
        for name in self.runs:
            found.setdefault(re.sub(r"-seed\d+$", "", name), []).append(name)
        return {setting: runs for setting, runs in found.items() if len(runs) > 1}

    def complexity(self, run: str) -> str | None:
        """The scores that a run's options name, where its variant uses any."""
        return self.runs[run].options.get("complexity")

    def has_model(self, source: str) -> bool:
        """Whether the source reads a model (and so has a model in the loop)."""
        return "model" in self.params["sources"][source]

    def same_model(self, source: str) -> str | None:
        """The first source with the same model, which fetches it for all of them; None for that one."""
        own = self.params["sources"][source]["model"]
        first = next(
            name
            for name in self.sources
            if self.has_model(name) and self.params["sources"][name]["model"] == own
        )
        return None if first == source else first

    def kind(self, source: str) -> SourceKind:
        """The facts about a source's kind."""
        return kind_of(self.params["sources"][source])

    def has_dimension(self, source: str) -> bool:
        """Whether the local intrinsic dimension of the source's rows is asked for."""
        dimension = self.params["evaluation"]["dimension"]
        return dimension is not None and source in dimension["sources"]

    def labelled(self, source: str) -> list[str]:
        """The labelled sets that the model of a source with SAEs classifies."""
        has_saes = any(source == own for own, _ in self.stores)
        sets = self.params["evaluation"]["labelled_sets"]
        return list(sets) if has_saes and self.kind(source).has_labelled_sets else []

    # The slices of the parameters that each job sees.

    def source(self, source: str) -> dict[str, Any]:
        return dict(self.params["sources"][source])

    def model(self, source: str) -> dict[str, Any]:
        """What fetching the model depends on; the hook points only to check that it has them."""
        return {key: self.params["sources"][source][key] for key in ("model", "hook_points")}

    def rows(self, source: str) -> dict[str, int]:
        """Rows asked for, by split."""
        store = self.params["stores"][source]
        return {split: store[f"{split}_rows"] for split in self.splits(source)}

    def store(self, source: str) -> dict[str, Any]:
        """How the stores of a source are written."""
        return dict(self.params["stores"][source])

    def scoring(self, complexity: str) -> dict[str, Any]:
        chosen = self.params["complexity"][complexity]
        return {key: value for key, value in chosen.items() if key != "probe_at"}

    def run(self, run: str) -> dict[str, Any]:
        return asdict(self.runs[run])

    def evaluation(self, source: str) -> dict[str, Any]:
        """What of `evaluation` concerns the SAEs of a source: images only where it sees any."""
        apart = ("pca_ranks", "latents", "interpretability", "also_on")
        every = {k: v for k, v in self.params["evaluation"].items() if k not in apart}
        if not self.kind(source).has_images:
            every = {k: v for k, v in every.items() if k not in _OF_IMAGES}
        every["dimension"] = self.dimension() if self.has_dimension(source) else None
        on = {
            other: {"dimension": self.dimension() if self.has_dimension(other) else None}
            for other in self.others(source)
        }
        return every | ({"also_on": on} if on else {})

    def row_policy(self) -> dict[str, Any]:
        """What of `evaluation` says which rows are measured."""
        return {key: self.params["evaluation"][key] for key in _ROW_POLICY}

    def dimension(self) -> dict[str, Any] | None:
        """How local intrinsic dimension is estimated, where it is."""
        chosen = self.params["evaluation"]["dimension"]
        return chosen and {key: chosen[key] for key in ("rows", "neighbours")}

    @property
    def pages(self) -> list[str]:
        """The runs that a page of latent cards is written of."""
        return list((self.params["evaluation"].get("latents") or {"runs": []})["runs"])

    def latents(self) -> dict[str, int]:
        """What a page of latent cards shows."""
        chosen = self.params["evaluation"]["latents"]
        return {key: value for key, value in chosen.items() if key != "runs"}

    @property
    def interpreted(self) -> list[str]:
        """The runs whose latents are probed."""
        chosen = self.params["evaluation"].get("interpretability") or {"runs": []}
        return list(chosen["runs"])

    def interpretability(self) -> dict[str, Any]:
        """How latents are probed."""
        chosen = self.params["evaluation"]["interpretability"]
        return {key: value for key, value in chosen.items() if key != "runs"}

    def labelled_set(self, name: str) -> dict[str, Any]:
        return dict(self.params["evaluation"]["labelled_sets"][name])

    def pca_ranks(self) -> list[int]:
        return list(self.params["evaluation"]["pca_ranks"])

    @property
    def mark(self) -> str:
        """What is printed across figures and at the head of pages; empty for nothing."""
        return str(self.params["figures"].get("mark", ""))

    def figure(self) -> dict[str, Any]:
        return {k: v for k, v in self.params["figures"].items() if k != "names"}

    # Keys, from the start of the chain to its end.

    @_once
    def key_model(self, source: str) -> str:
        code: tuple[str, ...] = (*_SHARED, "sources/models", "sources/layouts")
        if "trained" in self.model(source)["model"]:
            code += ("sources/clip_training", "sources/scenes")
        return job_key("model", self.model(source), code=code, libraries=_MODEL, after=[])

    def _after_model(self, source: str) -> list[str]:
        return [self.key_model(source)] if self.has_model(source) else []

    @_once
    def key_inputs(self, source: str) -> str:
        slice_ = [self._without_hooks(source), self.rows(source)]
        code = (*_SHARED, "sources")
        after = self._after_model(source)
        return job_key("inputs", slice_, code=code, libraries=_MODEL, after=after)

    def _without_hooks(self, source: str) -> dict[str, Any]:
        return {k: v for k, v in self.source(source).items() if k != "hook_points"}

    @_once
    def key_store(self, source: str, split: str) -> str:
        code = (*_SHARED, "sources", "stores")
        after = [self.key_inputs(source), *self._after_model(source)]
        if split == "evaluation":
            slice_ = {k: v for k, v in self.store(source).items() if k != "train_rows"}
        else:
            slice_ = {k: v for k, v in self.store(source).items() if k != "evaluation_rows"}
        slice_ |= {"split": split, "source": self.source(source)}
        return job_key("store", slice_, code=code, libraries=_STORE, after=after)

    @_once
    def key_scores(self, source: str, complexity: str) -> str:
        code = (*_SHARED, "sources", "complexity/scorers")
        slice_ = [self.scoring(complexity), self.source(source)]
        after = [self.key_inputs(source), *self._after_model(source)]
        return job_key("scores", slice_, code=code, libraries=(*_PROBE, "textstat"), after=after)

    @_once
    def key_probe(self, source: str, hook_point: str, complexity: str) -> str:
        code = (*_SHARED, "stores", "complexity")
        after = [self.key_store(source, split) for split in ("train", "evaluation")]
        after += [self.key_scores(source, complexity)]
        slice_ = [hook_point, self.scoring(complexity)]
        return job_key("probe", slice_, code=code, libraries=_PROBE, after=after)

    @_once
    def key_import(self, run: str) -> str:
        one = self.imports[run]
        code = (*_SHARED, "exchange", "saes", "operators")
        return job_key("import", asdict(one), code=code, libraries=_NUMERIC, after=[])

    @_once
    def key_sae(self, run: str) -> str:
        if run in self.imports:
            return self.key_import(run)
        code = (*_SHARED, "operators", "stores", "saes", "training")
        config, complexity = self.runs[run], self.complexity(run)
        after = [self.key_store(config.source, "train")]
        if complexity:
            after += [self.key_probe(config.source, config.hook_point, complexity)]
        if config.guide:
            after += [self.key_sae(config.guide)]
        slice_ = [self.run(run), self.params["runtime"]["precision"]]
        return job_key("sae", slice_, code=code, libraries=_NUMERIC, after=after)

    @_once
    def key_clean(self, source: str, hook_point: str) -> str:
        code = (*_SHARED, "sources", *_IN_MODEL)
        slice_ = [hook_point, *self._clean_options(source), self.source(source)]
        after = [self.key_inputs(source), *self._after_model(source)]
        after += [self.key_store(source, split) for split in ("train", "evaluation")]
        after += [self.key_labelled(source, name) for name in self.labelled(source)]
        return job_key("clean", slice_, code=code, libraries=_MODEL, after=after)

    def _clean_options(self, source: str) -> list[Any]:
        """The options of `evaluation` that the clean side of a source's model depends on."""
        in_model = self.kind(source).in_model
        return [self.params["evaluation"][name] for name in (in_model.options if in_model else ())]

    @_once
    def key_clean_on(self, source: str, hook_point: str, other: str) -> str:
        code = (*_SHARED, "sources", *_IN_MODEL)
        slice_ = [hook_point, *self._clean_options(other), self.source(other)]
        after = [self.key_inputs(other), *self._after_model(other)]
        after += [self.key_store(source, "train"), self.key_store(other, "evaluation")]
        return job_key("clean", slice_, code=code, libraries=_MODEL, after=after)

    @_once
    def key_labelled(self, source: str, name: str) -> str:
        code = (*_SHARED, "sources")
        after = self._after_model(source)
        slice_ = self.labelled_set(name)
        return job_key("labelled", slice_, code=code, libraries=_MODEL, after=after)

    @_once
    def key_dimension(self, source: str, hook_point: str) -> str:
        code = (*_SHARED, "stores", "evaluation/dimension")
        slice_ = [hook_point, self.dimension()]
        after = [self.key_store(source, "evaluation")]
        libraries = (*_STORE, "scikit-dimension", "scikit-learn", "scipy")
        return job_key("dimension", slice_, code=code, libraries=libraries, after=after)

    def _after_stores(self, source: str, hook_point: str) -> list[str]:
        after = [self.key_store(source, split) for split in ("train", "evaluation")]
        after += [self.key_clean(source, hook_point)] if self.has_model(source) else []
        after += [self.key_dimension(source, hook_point)] if self.has_dimension(source) else []
        return after

    def _after_others(self, source: str, hook_point: str) -> list[str]:
        after = []
        for other in self.others(source):
            after += [self.key_store(other, "evaluation"), self.key_inputs(other)]
            after += [self.key_dimension(other, hook_point)] if self.has_dimension(other) else []
            if not self.kind(other).has_labelled_sets:
                after += [self.key_clean_on(source, hook_point, other)]
        return after

    @_once
    def key_evaluation(self, run: str) -> str:
        code = (*_SHARED, "operators", "sources", "stores", "saes", "evaluation", *_WRITTEN)
        config = self.evaluated[run]
        after = [self.key_sae(run), *self._after_stores(config.source, config.hook_point)]
        after += self._after_others(config.source, config.hook_point)
        slice_ = self.evaluation(config.source)
        return job_key("evaluation", slice_, code=code, libraries=_TABLE, after=after)

    @_once
    def key_latents(self, run: str) -> str:
        code = (
            *_SHARED,
            "operators",
            "sources",
            "stores",
            "saes",
            "evaluation",
            "figures",
            "tables",
        )
        config = self.evaluated[run]
        after = [self.key_sae(run), *self._after_stores(config.source, config.hook_point)]
        slice_ = [self.latents(), self.evaluation(config.source), self.mark]
        libraries = (*_TABLE, "jinja2")
        return job_key("latents", slice_, code=code, libraries=libraries, after=after)

    @_once
    def key_interpretation(self, run: str) -> str:
        code = (*_SHARED, "operators", "sources", "stores", "saes", "evaluation", *_WRITTEN)
        config = self.evaluated[run]
        after = [self.key_sae(run), *self._after_stores(config.source, config.hook_point)]
        slice_: list[Any] = [self.interpretability(), self.row_policy()]
        own = scorer_file(self.interpretability())
        slice_ += [file_digest(own)] if own else []
        return job_key("interpretation", slice_, code=code, libraries=_PROBE, after=after)

    @_once
    def key_baselines(self, source: str, hook_point: str) -> str:
        code = (*_SHARED, "operators", "sources", "stores", "saes", "evaluation", *_WRITTEN)
        slice_ = [self.evaluation(source), self.pca_ranks()]
        after = self._after_stores(source, hook_point) + self._after_others(source, hook_point)
        return job_key("baselines", slice_, code=code, libraries=_TABLE, after=after)

    @_once
    def key_stability(self, setting: str) -> str:
        code = (*_SHARED, "operators", "sources", "stores", "saes", "evaluation", *_WRITTEN)
        runs = self.seeds[setting]
        source = self.runs[runs[0]].source
        after = [self.key_sae(run) for run in runs]
        after += [self.key_store(source, split) for split in ("train", "evaluation")]
        return job_key("stability", self.row_policy(), code=code, libraries=_TABLE, after=after)

    @_once
    def key_tables(self) -> str:
        code = (*_SHARED, "tables")
        after = [self.key_evaluation(run) for run in self.evaluated]
        after += [self.key_baselines(*store) for store in self.stores]
        after += [self.key_probe(*probe) for probe in self.probes]
        after += [self.key_stability(setting) for setting in self.seeds]
        after += map(self.key_interpretation, self.interpreted)
        return job_key("tables", None, code=code, libraries=_TABLE, after=after)

    @_once
    def key_figure(self, figure: str) -> str:
        code = (*_SHARED, "figures", "tables")
        after = [self.key_tables()]
        return job_key(figure, self.figure(), code=code, libraries=_DRAW, after=after)

    @_once
    def key_report(self) -> str:
        code = (*_SHARED, "figures", "tables")
        after = [self.key_tables(), *map(self.key_figure, self.params["figures"]["names"])]
        after += map(self.key_latents, self.pages)
        return job_key("report", self.params["figures"], code=code, libraries=_DRAW, after=after)
