"""Needs of a parameter file's jobs: rows, disk, memory and hours, from measured rates.

Costs are counted in multiplications and bytes, and divided by what a machine was measured to do (`make bench`
writes it). A forward pass is counted by running the model without memory (torch's fake tensors) up to its
hook points.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saeflow.config import SAEConfig, read_yaml
from saeflow.errors import UserError
from saeflow.files import canonical_json
from saeflow.plan import Plan

NUMBERS = (
    "product_gflops", "forward_gflops", "images_s", "tokens_s", "store_read_gb_s", "store_write_gb_s", "job_s"
)  # fmt: skip
_FLOAT = 4
_WORDS_TRAINED = 4
"""Weights, their gradients and Adam's two moments."""
_PROCESS = 0.6e9
"""Bytes of a Python process that has imported torch and transformers."""


@dataclass(frozen=True)
class Rates:
    """Rates of a machine per second."""

    machine: str
    product_gflops: float
    """Rate of an encoder product."""
    forward_gflops: float
    """Rate of a model's forward pass."""
    images_s: float
    """Images decoded to a model's size in a second."""
    tokens_s: float
    """Tokens made of text in a second."""
    store_read_gb_s: float
    store_write_gb_s: float
    job_s: float
    """Seconds a job takes to start."""
    steps: Mapping[str, Mapping[int, float]]
    """By variant and d_sae: encoder products that a training step costs."""
    arithmetic: tuple[str, ...] = ()
    """Rates that were worked out on paper and not measured."""

    @property
    def device(self) -> str:
        """The machine's name without what follows it: `2 cores` of `2 cores (x86_64), 2026-11-24`."""
        return re.split(r" \(|,", self.machine)[0]

    @classmethod
    def read(cls, path: Path) -> "Rates":
        """Read a file of rates.

        Raises:
            UserError: it is missing or lacks a rate.
        """
        values = read_yaml(path)
        if not isinstance(values, dict) or not isinstance(values.get("steps"), dict):
            raise UserError(f"{path}: expected rates as `make bench` writes them, found none.")
        for name in NUMBERS:
            if not isinstance(values.get(name), int | float) or not values[name] > 0:
                raise UserError(
                    f"{path}: {name}: expected a number above 0, found {values.get(name)!r}."
                )
        steps = {}
        for variant, costs in values["steps"].items():
            steps[variant] = {int(d_sae): float(cost) for d_sae, cost in costs.items()}
        numbers = {name: float(values[name]) for name in NUMBERS}
        machine, assumed = values.get("machine"), values.get("arithmetic", [])
        if not isinstance(machine, str):
            raise UserError(f"{path}: machine: expected the machine's name, found {machine!r}.")
        known = {*NUMBERS, *(f"steps.{variant}" for variant in steps)}
        if not isinstance(assumed, list) or not set(map(str, assumed)) <= known:
            raise UserError(
                f"{path}: arithmetic: expected names of rates ({', '.join(sorted(known))}), found {assumed!r}."
            )
        return cls(machine=machine, steps=steps, arithmetic=tuple(assumed), **numbers)

    def step_products(self, variant: str, d_sae: int) -> float:
        """Encoder products of a step, of the nearest dictionary size that was measured.

        Of a variant that was not measured, those of the most expensive one.
        """
        known = [self.steps[variant]] if variant in self.steps else list(self.steps.values())
        return max(
            costs[min(costs, key=lambda size: abs(math.log(size / d_sae)))] for costs in known
        )


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


@dataclass(frozen=True)
class Pass:
    """One context through a source's model."""

    flops: float
    """Up to the last hook point."""
    flops_whole: float
    weights: float
    """Bytes in float32."""
    widths: Mapping[str, int]
    rows: int
    """Rows that a context gives."""
    input_bytes: float = 0


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
        seconds = self.rates.job_s * (2 + len(figures))
        what = f"tables, {_count(len(figures), 'figure')}, the report"
        yield Need("draw", what, 2 + len(figures), 0, _PROCESS, seconds / 3600)

    @property
    def merging_disk(self) -> float:
        """Bytes beside all results while the parts of the largest source are merged into its stores."""
        return max((need.disk for need in self.steps() if need.step == "extract"), default=0)

    def _stores(self, source: str) -> Iterator[Need]:
        """Fetching, preparing and extracting."""
        params, one = self.plan.params["sources"][source], self.passes[source]
        store, splits = self.plan.params["stores"][source], self.plan.rows(source)
        n_labelled = len(self.plan.labelled(source))
        contexts = sum(math.ceil(rows / one.rows) for rows in splits.values())
        weights = one.weights if self.plan.has_model(source) else 0
        seconds, kind = 0.0, self.plan.kind(source)
        if kind.has_images:
            seconds = contexts / self.rates.images_s
        elif kind.has_tokens:
            seconds = contexts * params["context_length"] / self.rates.tokens_s
        yield Need(
            "prepare", f"{source}: {contexts:,} contexts", 1 + n_labelled + (weights > 0),
            weights + contexts * one.input_bytes, _PROCESS + 2 * weights,
            (seconds + (1 + (weights > 0)) * self.rates.job_s) / 3600,
        )  # fmt: skip
        rows, width = sum(splits.values()), sum(one.widths.values())
        disk = rows * width * _itemsize(store["dtype"])
        seconds = contexts * one.flops / self.rates.forward_gflops / 1e9
        seconds += 2 * disk / self.rates.store_write_gb_s / 1e9
        jobs = len(splits) * (self.plan.params["runtime"]["extraction_jobs"] + 1)  # and their merge
        block = store["block_contexts"] * one.rows * width * _FLOAT
        batch = params.get("forward_batch", 1) * one.rows * max(one.widths.values()) * _FLOAT * 20
        yield Need(
            "extract", f"{source}: {rows:,} rows x {width} {store['dtype']}", jobs, disk,
            _PROCESS + weights + 2 * block + batch,
            (seconds + jobs * self.rates.job_s) / 3600,
        )  # fmt: skip

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

    def _groups_of(self, place: str, groups: list[list[str]]) -> int:
        """Jobs that train or evaluate the runs of a store, of such groups."""
        return sum(group[0].startswith(place) for group in groups)

    def _training(self, source: str, hook_point: str) -> Need:
        runs, width = self._of_store(source, hook_point), self.passes[source].widths[hook_point]
        jobs = self._groups_of(f"{source}/{hook_point}/", self.plan.training_groups)
        row_bytes = width * _itemsize(self.plan.params["stores"][source]["dtype"])
        ranks = self.plan.params["runtime"]["ranks"]
        disk = memory = seconds = 0.0
        for run in runs:
            weights = 2 * width * run.d_sae * _FLOAT
            batch = run.training.batch_size * (2 * run.d_sae + 8 * width) * _FLOAT
            by_split = {"batch": (1, ranks["count"]), "latents": (ranks["count"], ranks["count"])}
            weight_parts, batch_parts = by_split[ranks["split"]]
            product = 2 * width * run.d_sae / self.rates.product_gflops / 1e9
            cost = self.rates.step_products(run.variant, run.d_sae)
            rows = run.training.steps * run.training.batch_size
            seconds += rows * (cost * product + row_bytes / self.rates.store_read_gb_s / 1e9)
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
        for name in (source, *others):
            whole, to_hook = self.passes[name].flops_whole, self.passes[name].flops
            each = plan.kind(name).rows_per_context(plan.params["sources"][name]) or 1
            chosen = (asked or -(-plan.rows(name)["evaluation"] // each)) if in_model else 0
            contexts += chosen
            rows += plan.rows(name)["evaluation"]
            through_model = chosen * (whole + len(runs) * (whole - to_hook))
            seconds += through_model / self.rates.forward_gflops / 1e9
        for run in runs:
            seconds += 3 * rows * 2 * width * run.d_sae / self.rates.product_gflops / 1e9
        dimensions = [name for name in (source, *others) if plan.has_dimension(name)]
        clean_sides = [side for side in plan.clean_sides() if side[:2] == (source, hook_point)]
        place = f"{source}/{hook_point}/"
        apart = [*plan.seeds, *plan.pages, *plan.interpreted]
        jobs = self._groups_of(place, plan.evaluation_groups) + 1 + has_model + len(clean_sides)
        jobs += len(dimensions) + sum(name.startswith(place) for name in apart)
        largest = max((run.d_sae for run in runs), default=0)
        memory = _PROCESS + (one.weights if has_model else 0) + 2 * width * largest * _FLOAT
        what = f"{_saes(runs)} on {rows:,} rows" + (
            f" of {', '.join((source, *others))}" if others else ""
        )
        what += f", {contexts:,} contexts through the model" if contexts else ""
        seconds += jobs * self.rates.job_s
        return Need("evaluate", what, jobs, 0, memory, seconds / 3600)


def _saes(runs: list[SAEConfig]) -> str:
    return _count(len(runs), "SAE")


def _count(number: int, of: str) -> str:
    return f"{number:,} {of}{'s' if number != 1 else ''}"


def _itemsize(dtype: str) -> int:
    return {"float32": 4, "float16": 2, "bfloat16": 2}[dtype]


def count_passes(plan: Plan, results: Path) -> dict[str, Pass]:
    """One context's way through the model of each source; see `one_pass`."""
    counted: dict[str, Pass] = {}
    found = {}
    for name in plan.sources:
        source = plan.params["sources"][name]
        alike = canonical_json({k: v for k, v in source.items() if k not in ("text", "images")})
        if alike not in counted:
            counted[alike] = one_pass(source, name, results)
        found[name] = counted[alike]
    return found


def one_pass(source: Mapping[str, Any], name: str, results: Path) -> Pass:
    """Count one context's way through a source's model.

    Args:
        source: its parameters.
        name: its name, for its folder and messages.
        results: the results folder, where its model may have been fetched.

    Raises:
        UserError: the model's config.json is not at hand.
    """
    if "model" not in source:
        widths = dict.fromkeys(source["hook_points"], int(source["d_in"]))
        return Pass(0, 0, 0, widths, 1)
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM, CLIPModel

    from saeflow.sources.hook_points import capture

    config = _config(source["model"], name, results)
    is_clip = config.model_type == "clip"
    with FakeTensorMode():  # shapes only, no memory
        architecture: Any = CLIPModel._from_config if is_clip else AutoModelForCausalLM.from_config
        model = architecture(
            config, attn_implementation="eager"
        ).eval()  # whose products are counted
        if is_clip:
            side = config.vision_config.image_size
            inputs = torch.zeros(1, 3, side, side)
        else:
            inputs = torch.zeros(1, source["context_length"], dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            found = capture(model, source["hook_points"], inputs)
        with torch.no_grad(), FlopCounterMode(display=False) as whole:
            model.get_image_features(inputs) if is_clip else model(inputs, use_cache=False)
    widths = {point: x.shape[-1] for point, x in found.items()}
    positions = next(iter(found.values())).shape[1] if next(iter(found.values())).ndim > 2 else 1
    rows = positions - bool(source.get("skip_first"))
    if is_clip:
        rows = {"all": positions, "cls": 1, "patches": positions - 1}[source["tokens"]]
    weights = sum(p.numel() for p in model.parameters()) * _FLOAT
    input_bytes = inputs.numel() * (1 if is_clip else np.dtype(np.int32).itemsize)
    flops, flops_whole = (float(c.get_total_flops()) for c in (counter, whole))
    return Pass(flops, flops_whole, weights, widths, rows, input_bytes)


def _config(model: Mapping[str, Any], name: str, results: Path) -> Any:
    """Configuration of a model: by its pin, as fetched, from its folder, or the one file from the hub."""
    from transformers import AutoConfig

    if "trained" in model:
        from saeflow.sources.clip_training import clip_config

        return clip_config(model["trained"])
    from saeflow.sources.shapes import pinned_config

    pinned = pinned_config(model)
    if pinned is not None:
        return AutoConfig.for_model(**pinned)
    fetched = results / "sources" / name / "model"
    if (fetched / "provenance.json").exists():
        from saeflow.sources.models import model_folder

        place = model_folder(fetched, weights=False)
    elif "folder" in model:
        place = Path(model["folder"])
    elif "hub" in model:
        from saeflow.sources import hub

        place = hub.config_file(model["hub"], model["revision"]).parent
    else:
        raise UserError(
            f"sources.{name}.model: its shape is known once it was fetched. Run `snakemake --cores 1 "
            f"{fetched}/provenance.json` first."
        )
    from saeflow.sources.models import config_in

    return config_in(place)


def as_text(*needs: Needs) -> str:
    """A table of the steps and their sum, for a terminal.

    Args:
        needs: of the same parameters, on one machine or several.
    """
    machines = [list(one.steps()) for one in needs]
    sums = []
    for steps in machines:
        jobs, disk = sum(s.jobs for s in steps), sum(s.disk for s in steps)
        memory, hours = max(s.memory for s in steps), sum(s.hours for s in steps)
        sums.append(Need("sum", "one job after the other", jobs, disk, memory, hours))
    times = (
        ["time of one device"]
        if len(needs) == 1
        else [f"time, {one.rates.device}" for one in needs]
    )
    lines = [("step", "of what", "jobs", "disk", "memory of a process", *times)]
    for alike in [*zip(*machines, strict=True), sums]:
        need = alike[0]
        row = (need.step, need.what, f"{need.jobs:,}", _bytes(need.disk), _bytes(need.memory))
        lines.append((*row, *(_time(one.hours) for one in alike)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    notes = [
        f"While a source's parts are merged into its stores, they take up to {_bytes(needs[0].merging_disk)} more of disk."
    ]
    for one in needs:
        assumed = ", ".join(one.rates.arithmetic)
        notes.append(
            f"At the rates of: {one.rates.machine}."
            + (f" Arithmetic, not measured: {assumed}." if assumed else "")
        )
    return "\n".join([*table, "", *notes])


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            return (
                f"{number:,.{0 if unit == 'B' or number >= 10 else 1}f} {unit}" if number else "-"
            )
        number /= 1000
    raise AssertionError


def _time(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:,.0f} h"
