"""Plan of a parameter file: runs, stores, probes and evaluations; `saeflow.jobs` makes jobs of it."""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

from saeflow.config import (
    ImportConfig,
    SAEConfig,
    draw_of,
    expand_runs,
    imports,
    n_windows,
    trial_of,
    without_trial,
)
from saeflow.sources import SourceKind, kind_of


def setting_of(run: str) -> str:
    """A run's whole name without its seed."""
    return re.sub(r"-seed\d+$", "", run)


def _label(setting: str) -> str:
    return setting.rpartition("/")[2]


_OF_IMAGES = ("labelled_sets", "concept_cards")


class Plan:
    """Plan of one parameter file."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.params = params
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

    def splits_of_sources(self) -> list[tuple[str, str]]:
        """(source, split) of everything that is extracted."""
        return [(source, split) for source in self.sources for split in self.splits(source)]

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
        """By setting (a run's name without its seed): its runs, where there are several; rivals at a found L0 left out."""
        found: dict[str, list[str]] = {}
        for name, run in self.runs.items():
            if run.guide is not None:
                continue
            found.setdefault(setting_of(name), []).append(name)
        return {setting: runs for setting, runs in found.items() if len(runs) > 1}

    @cached_property
    def rivals(self) -> list[dict[str, Any]]:
        """Settings that find their own k, each with one that is trained at the mean L0 it found.

        `pairs` are the runs of both, seed by seed. None where evaluations keep no sums (`evaluation.bootstrap`).
        """
        if self.params["evaluation"]["bootstrap"] is None:
            return []
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for run in self.runs.values():
            if run.guide is None:
                continue
            own = self._same_seed(run.guide, run.seed)
            guide = self.evaluated[run.guide]
            places = (setting_of(run.guide), setting_of(run.name))
            comparison = found.setdefault(
                places,
                {
                    "source": run.source, "hook_point": run.hook_point, "d_sae": run.d_sae,
                    "entry": guide.entry, "variant": getattr(guide, "variant", guide.entry), "setting": _label(places[0]),
                    "rival_entry": run.entry, "rival_variant": run.variant, "rival_setting": _label(places[1]), "pairs": [],
                },
            )  # fmt: skip
            if own is not None:
                comparison["pairs"].append([own, run.name])
        return [one for _, one in sorted(found.items()) if one["pairs"]]

    def _same_seed(self, guide: str, seed: int) -> str | None:
        """The run of a guide's setting with a seed, if there is one."""
        name = f"{setting_of(guide)}-seed{seed}"
        return name if name in self.evaluated else None

    @cached_property
    def sweeps(self) -> list[dict[str, Any]]:
        """Settings of entries with `ranges`: of each its trials, with the runs of all seeds."""
        found: dict[str, dict[str, Any]] = {}
        for run in self.runs.values():
            number = trial_of(run.name)
            if number is None:
                continue
            setting = setting_of(run.name)
            ids = {
                "source": run.source, "hook_point": run.hook_point, "d_sae": run.d_sae, "entry": run.entry,
                "variant": run.variant,
            }  # fmt: skip
            trials = found.setdefault(without_trial(setting), ids | {"trials": {}})["trials"]
            known = {"trial": number, "setting": _label(setting), "drawn": self._drawn(run)}
            trials.setdefault(number, known | {"runs": []})["runs"].append(run.name)
        return [
            one | {"trials": [one["trials"][number] for number in sorted(one["trials"])]}
            for _, one in sorted(found.items())
        ]

    def _drawn(self, run: SAEConfig) -> str:
        """Values that a trial has for the keys of its entry's ranges."""
        values = {key: run.settings[key] for key in self.params["saes"][run.entry]["ranges"]}
        return ", ".join(
            f"{key} {value:g}" if isinstance(value, int | float) else f"{key} {value}"
            for key, value in values.items()
        )

    @property
    def tried(self) -> list[str]:
        """The runs that `sweeps` names."""
        return [
            run for setting in self.sweeps for trial in setting["trials"] for run in trial["runs"]
        ]

    @property
    def compared(self) -> list[str]:
        """The runs that `rivals` names, each once."""
        pairs = itertools.chain.from_iterable(one["pairs"] for one in self.rivals)
        return sorted(set(itertools.chain.from_iterable(pairs)))

    def complexity(self, run: str) -> str | None:
        """The scores that a run's options name, where its variant uses any."""
        return self.runs[run].options.get("complexity")

    def has_model(self, source: str) -> bool:
        """Return whether the source reads a model (and so has a model in the loop)."""
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
        """Return whether the local intrinsic dimension of the source's rows is asked for."""
        dimension = self.params["evaluation"]["dimension"]
        return dimension is not None and source in dimension["sources"]

    @property
    def with_dimension(self) -> list[tuple[str, str]]:
        """(source, hook point) of every measured store whose local intrinsic dimension is asked for."""
        measured = {(s, h) for own, h in self.stores for s in (own, *self.others(own))}
        return sorted(place for place in measured if self.has_dimension(place[0]))

    def labelled(self, source: str) -> list[str]:
        """The labelled sets that the model of a source with SAEs classifies."""
        has_saes = any(source == own for own, _ in self.stores)
        sets = self.params["evaluation"]["labelled_sets"]
        return list(sets) if has_saes and self.kind(source).has_labelled_sets else []

    # The slices of the parameters that each job sees.

    def source(self, source: str) -> dict[str, Any]:
        return dict(self.params["sources"][source])

    def rows(self, source: str) -> dict[str, int]:
        """Rows asked for, by split."""
        store = self.params["stores"][source]
        return {split: store[f"{split}_rows"] for split in self.splits(source)}

    def windows(self, source: str, split: str) -> int:
        """Number of windows that a split of a source is cut into."""
        return n_windows(self.params["stores"][source], split)

    def goes_by_window(self, source: str) -> bool:
        """Tell whether SAEs of a source are trained on one window after the other."""
        return self.params["stores"][source]["keep_windows"] is not None

    def is_streamed(self, source: str) -> bool:
        """Tell whether windows of a source's training split are deleted once SAEs were trained on them."""
        return isinstance(self.params["stores"][source]["keep_windows"], int)

    def readers_of_rows(self, source: str) -> list[str]:
        """Name all that reads rows of a source's training split when training is over, which a stream cannot serve."""
        interpreted = [name for name in self.interpreted if self.evaluated[name].source == source]
        return [f"evaluation.interpretability.runs with {name}" for name in interpreted]

    def draws(self, source: str, runs: Iterable[str]) -> int:
        """Number of draws of windows that runs of a streamed source are trained on, see `draw_of`."""
        store, found = self.params["stores"][source], [0]
        for name in runs:
            training = self.runs[name].training
            found.append(1 + draw_of(training.steps - 1, training.batch_size, store))
        return max(found)

    def first_draw(self, run: str) -> int:
        """Number of the draw that training of a run of a streamed source begins with.

        SAEs whose k another SAE finds are trained after all others, in a pass of its own that begins with window 0.
        """
        source, windows = self.runs[run].source, self.windows(self.runs[run].source, "train")
        if self.runs[run].guide is None:
            return 0
        return -(-self.draws(source, self._of_pass(source, guided=False)) // windows) * windows

    def extracted_draws(self, source: str) -> int:
        """Number of windows that are extracted of a streamed source, again in each epoch and pass."""
        first, second = (
            self.draws(source, self._of_pass(source, guided=guided)) for guided in (False, True)
        )
        return max(first, self.windows(source, "train")) + second

    def _of_pass(self, source: str, *, guided: bool) -> list[str]:
        every = (run for run in self.runs.values() if run.source == source)
        return [run.name for run in every if (run.guide is not None) is guided]

    def scoring(self, complexity: str) -> dict[str, Any]:
        chosen = self.params["complexity"][complexity]
        return {key: value for key, value in chosen.items() if key != "probe_at"}

    def evaluation(self, source: str) -> dict[str, Any]:
        """Return the part of `evaluation` that concerns the SAEs of a source: images only where it sees any."""
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

    def dimension(self) -> dict[str, Any] | None:
        """Return the settings of local intrinsic dimension, where it is estimated."""
        chosen = self.params["evaluation"]["dimension"]
        return chosen and {key: chosen[key] for key in ("rows", "neighbours")}

    @property
    def pages(self) -> list[str]:
        """The runs that a page of latent cards is written of."""
        return list((self.params["evaluation"].get("latents") or {"runs": []})["runs"])

    def latents(self) -> dict[str, int]:
        """Return the settings of a page of latent cards."""
        chosen = self.params["evaluation"]["latents"]
        return {key: value for key, value in chosen.items() if key != "runs"}

    @property
    def interpreted(self) -> list[str]:
        """The runs whose latents are probed."""
        chosen = self.params["evaluation"].get("interpretability") or {"runs": []}
        return list(chosen["runs"])

    def interpretability(self) -> dict[str, Any]:
        """Return the settings of probes of latents."""
        chosen = self.params["evaluation"]["interpretability"]
        return {key: value for key, value in chosen.items() if key != "runs"}

    @property
    def mark(self) -> str:
        """Return the mark that is printed across figures and at the head of pages; empty for none."""
        return str(self.params["figures"].get("mark", ""))

    def figure(self) -> dict[str, Any]:
        return {k: v for k, v in self.params["figures"].items() if k != "names"}
