"""Jobs, disk, memory and hours of every step of a parameter file, on one machine."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from saeflow.config import SAEConfig, trial_of
from saeflow.config.explain import counted
from saeflow.needs.passes import FLOAT, Pass
from saeflow.needs.rates import Rates
from saeflow.plan import Plan

_WORDS_TRAINED = 4
"""Weights, their gradients and Adam's two moments."""
_FORWARD_AND_BACKWARD = 3
_BASELINES = 2
"""Identity and mean, beside a PCA of each rank."""
_CONTROLS = 3
"""Further passes over rows and contexts for an SAE that chooses its k (`saeflow.evaluation.controls`)."""
_CHOOSES_K = ("soft_topk", "adaptive_k")
_PROCESS = 0.6e9
"""Bytes of a Python process that has imported torch and transformers."""


@dataclass
class Need:
    """Needs of the jobs of one step."""

    step: str
    what: str
    jobs: int = 0
    disk: float = 0
    """Bytes of all results."""
    memory: float = 0
    """Bytes of the largest process."""
    hours: float = 0
    """Hours of all jobs, one after the other."""


@dataclass
class Needs:
    """The needs of a parameter file on one machine."""

    plan: Plan
    rates: Rates
    passes: Mapping[str, Pass]
    """The passes of each source, see `count_passes`."""

    def steps(self) -> Iterator[Need]:
        """Yield the needs of each step in the order in which they run."""
        for source in self.plan.sources:
            yield from self._stores(source)
        for source, complexity in sorted({(s, c) for s, _, c in self.plan.probes}):
            yield self._scores(source, complexity)
        for source, hook_point in self.plan.stores:
            yield self._training(source, hook_point)
            yield self._evaluation(source, hook_point)
        figures = self.plan.params["figures"]["names"]
        jobs = bool(self.plan.rivals) + bool(self.plan.sweeps) + 1 + len(figures) + 1
        what = f"tables, {counted(len(figures), 'figure')}, the report"
        yield Need("draw", what, jobs, 0, _PROCESS, jobs * self.rates.job_s / 3600)

    def hours(self) -> float:
        """Hours of all jobs, one after the other."""
        return sum(need.hours for need in self.steps())

    def peak(self) -> float:
        """Bytes of the disk at the worst moment: all that is kept, and a window of the largest source that is merged."""
        found = sum(need.disk for need in self.steps() if need.step != "extract")
        merging = []
        for source in self.plan.sources:
            rows, row = self.plan.rows(source), self._row_bytes(source)
            windows = self.plan.windows(source, "train")
            window = row * rows.get("train", 0) / windows
            kept = windows
            if self.plan.is_streamed(source):
                kept = min(windows, self.plan.params["stores"][source]["keep_windows"])
            found += row * rows["evaluation"] + kept * window
            merging.append(window + row * rows["evaluation"])
        return found + max(merging, default=0)

    def _passes_over(self, source: str) -> float:
        """Times that the training split is extracted: of a stream, once for every epoch of either pass."""
        if not self.plan.is_streamed(source):
            return 1
        return self.plan.extracted_draws(source) / self.plan.windows(source, "train")

    def _row_bytes(self, source: str) -> int:
        """Bytes of a row in the stores of all hook points of a source."""
        dtype = self.plan.params["stores"][source]["dtype"]
        return sum(_row_bytes(dtype, each) for each in self.passes[source].widths.values())

    def _stores(self, source: str) -> Iterator[Need]:
        """Fetching, preparing and extracting."""
        params, one = self.plan.params["sources"][source], self.passes[source]
        store, splits = self.plan.params["stores"][source], self.plan.rows(source)
        n_labelled = len(self.plan.labelled(source))
        contexts = sum(math.ceil(rows / one.rows) for rows in splits.values())
        weights = one.weights if self.plan.has_model(source) else 0
        seconds, kind = self._fetching(params.get("model", {}), one), self.plan.kind(source)
        if kind.has_images:
            seconds += contexts / self.rates.images_s
        elif kind.has_tokens:
            seconds += contexts * params["context_length"] / self.rates.tokens_s
        yield Need(
            "prepare", f"{source}: {contexts:,} contexts", 1 + n_labelled + (weights > 0),
            weights + contexts * one.input_bytes, _PROCESS + 2 * weights,
            (seconds + (1 + (weights > 0)) * self.rates.job_s) / 3600,
        )  # fmt: skip
        rows, width = sum(splits.values()), sum(one.widths.values())
        disk = rows * self._row_bytes(source)
        passes = self._passes_over(source)
        share = (splits.get("train", 0) * passes + splits["evaluation"]) / rows
        seconds = share * contexts * one.flops / self.rates.forward_gflops / 1e9
        seconds += share * 2 * disk / self.rates.store_write_gb_s / 1e9
        if self.plan.is_streamed(source):
            disk = splits["evaluation"] * self._row_bytes(source)
        jobs = 0
        for split in splits:
            windows = self.plan.windows(source, split)
            made = round(windows * passes) if split == "train" else windows
            jobs += made * (self.plan.params["runtime"]["extraction_jobs"] + 1)  # and the merge
            jobs += windows > 1  # they are put together
        block = store["block_contexts"] * one.rows * width * FLOAT
        batch = params.get("forward_batch", 1) * one.rows * max(one.widths.values()) * FLOAT * 20
        yield Need(
            "extract", f"{source}: {rows:,} rows x {width} {store['dtype']}", jobs, disk,
            _PROCESS + weights + 2 * block + batch,
            (seconds + jobs * self.rates.job_s) / 3600,
        )  # fmt: skip

    def _fetching(self, model: Mapping[str, Any], one: Pass) -> float:
        """Seconds of making a model: a GGUF file is written again, a CLIP of scenes is rendered for and trained."""
        if "trained" in model:
            chosen = model["trained"]
            passes = _FORWARD_AND_BACKWARD * chosen["pairs"] * one.flops_whole
            return float(
                chosen["examples"] / self.rates.images_s + passes / self.rates.forward_gflops / 1e9
            )
        if {"gguf", "wheel"} & model.keys():
            return 2 * one.weights / self.rates.store_write_gb_s / 1e9
        return 0.0

    def _scores(self, source: str, complexity: str) -> Need:
        """Scoring contexts and fitting probes to the scores."""
        one, scoring = self.passes[source], self.plan.params["complexity"][complexity]
        contexts = sum(math.ceil(rows / one.rows) for rows in self.plan.rows(source).values())
        contexts = min(contexts, scoring["contexts"] or contexts)
        probes = [p for p in self.plan.probes if p[0] == source and p[2] == complexity]
        flops = contexts * one.flops_whole if scoring["kind"] == "surprisal" else 0
        seconds = flops / self.rates.forward_gflops / 1e9 + (1 + len(probes)) * self.rates.job_s
        what = f"{source}: {complexity} of {contexts:,} contexts"
        return Need("score", what, 1 + len(probes), 0, _PROCESS, seconds / 3600)

    def _of_store(self, source: str, hook_point: str) -> list[SAEConfig]:
        runs = self.plan.runs.values()
        return [run for run in runs if (run.source, run.hook_point) == (source, hook_point)]

    @staticmethod
    def _groups_of(place: str, groups: list[list[str]]) -> list[list[str]]:
        """Those of the groups whose runs are of a store."""
        return [group for group in groups if group[0].startswith(place)]

    def _training(self, source: str, hook_point: str) -> Need:
        runs, width = self._of_store(source, hook_point), self.passes[source].widths[hook_point]
        place = f"{source}/{hook_point}/"
        groups = self._groups_of(place, self.plan.training_groups)
        if self.plan.is_streamed(source):  # a job each window, and one each SAE
            jobs = len(runs) + sum(self.plan.draws(source, group) for group in groups)
        else:
            jobs = sum(map(_jobs_of, groups))
        row_bytes = _row_bytes(self.plan.params["stores"][source]["dtype"], width)
        ranks = self.plan.params["runtime"]["ranks"]
        disk = memory = seconds = 0.0
        for run in runs:
            weights = 2 * width * run.d_sae * FLOAT
            batch = run.training.batch_size * (2 * run.d_sae + 8 * width) * FLOAT
            by_split = {"batch": (1, ranks["count"]), "latents": (ranks["count"], ranks["count"])}
            weight_parts, batch_parts = by_split[ranks["split"]]
            product = 2 * width * run.d_sae / self.rates.product_gflops / 1e9
            cost = self.rates.step_products(run.variant, run.d_sae)
            rows = run.training.steps * run.training.batch_size
            seconds += rows * (cost * product + row_bytes / self.rates.store_read_gb_s / 1e9)
            seconds += run.training.steps * self.rates.step_s
            disk += weights
            trained = _WORDS_TRAINED * weights / weight_parts + batch / batch_parts
            memory = max(memory, _PROCESS + trained)
        what = f"{_saes(runs)} on {source}/{hook_point}"
        seconds += jobs * self.rates.job_s
        return Need("train", what, jobs, disk, memory, seconds / 3600)

    def _evaluation(self, source: str, hook_point: str) -> Need:
        """Every SAE and the baselines; the model's clean side runs once for all of them."""
        plan, runs, one = self.plan, self._of_store(source, hook_point), self.passes[source]
        others = plan.others(source)
        has_model, in_model = plan.has_model(source), plan.kind(source).predicts_contexts
        width = one.widths[hook_point]
        asked = plan.evaluation(source)["ce_contexts"]
        rows, contexts, seconds = 0, 0, 0.0
        has_controls = plan.evaluation(source)["bootstrap"] is not None
        measured = [
            run
            for run in runs
            for _ in range(1 + _CONTROLS * (has_controls and run.variant in _CHOOSES_K))
        ]
        place = f"{source}/{hook_point}/"
        read_again = [*plan.pages, *plan.interpreted]
        measured += [
            plan.runs[name] for name in read_again if name.startswith(place) and name in plan.runs
        ]
        baselines = _BASELINES + len(plan.params["evaluation"]["pca_ranks"])
        for name in (source, *others):
            whole, to_hook = self.passes[name].flops_whole, self.passes[name].flops
            each = plan.kind(name).rows_per_context(plan.params["sources"][name]) or 1
            chosen = (asked or -(-plan.rows(name)["evaluation"] // each)) if in_model else 0
            contexts += chosen
            rows += plan.rows(name)["evaluation"]
            through_model = chosen * (whole + (len(measured) + baselines) * (whole - to_hook))
            seconds += through_model / self.rates.forward_gflops / 1e9
        for run in measured:
            seconds += 3 * rows * 2 * width * run.d_sae / self.rates.product_gflops / 1e9
        dimensions = [name for name in (source, *others) if plan.has_dimension(name)]
        clean_sides = [side for side in plan.clean_sides() if side[:2] == (source, hook_point)]
        apart = [*plan.seeds, *plan.pages, *plan.interpreted]
        groups = self._groups_of(place, plan.evaluation_groups)
        jobs = sum(map(_jobs_of, groups)) + 1 + has_model + len(clean_sides)
        jobs += len(dimensions) + sum(name.startswith(place) for name in apart)
        largest = max((run.d_sae for run in runs), default=0)
        memory = _PROCESS + (one.weights if has_model else 0) + 2 * width * largest * FLOAT
        imported = sum(one.store == f"{source}/{hook_point}" for one in plan.imports.values())
        others_too = f" and {imported} of other libraries" if imported else ""
        what = f"{_saes(runs)}{others_too} on {rows:,} rows" + (
            f" of {', '.join((source, *others))}" if others else ""
        )
        what += f", {contexts:,} contexts through the model" if contexts else ""
        seconds += jobs * self.rates.job_s
        return Need("evaluate", what, jobs, 0, memory, seconds / 3600)


def _saes(runs: list[SAEConfig]) -> str:
    tried = sum(trial_of(run.name) is not None for run in runs)
    return counted(len(runs), "SAE") + (f" ({counted(tried, 'trial')} of a sweep)" if tried else "")


def _jobs_of(group: list[str]) -> int:
    """Jobs of a group: one each run, which takes what another one has made where there are several runs."""
    return len(group) + (len(group) > 1)


def _row_bytes(dtype: str, width: int) -> int:
    """Bytes of a stored row; int8 keeps a float32 scale behind it."""
    each = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}[dtype]
    return width * each + (FLOAT if dtype == "int8" else 0)
