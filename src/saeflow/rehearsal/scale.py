"""From a parameter file to its rehearsal: the same entries and figures, everything that costs time made small.

Counts that are compared with each other (dictionary sizes, k, the start of a k-schedule) go through one increasing
map, so that different values stay different and every k stays at or below its d_sae. Names of runs change with their
sizes; what refers to a run follows.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from saeflow.config import expand_runs, trial_of
from saeflow.config.explain import as_list
from saeflow.config.options import counts_of_latents
from saeflow.config.sweep import tunable
from saeflow.config.variants import variants, with_options
from saeflow.rehearsal.sources import WIDTH, StandIn, replace_sources

MARK = "REHEARSAL"
D_SAE, PCA_RANK = 512, 24
"""The largest dictionary and the largest rank of a rehearsal."""
STEPS, BATCH = 24, 64


@dataclass(frozen=True)
class Rehearsal:
    """The parameters of a rehearsal, and what must be written before it runs."""

    params: dict[str, Any]
    stand_ins: list[StandIn]
    runs: Mapping[str, str]
    """By name of a run of the parameter file that is rehearsed: its name in the rehearsal."""


def rehearsal_of(params: Mapping[str, Any], *, every_run: bool = False) -> Rehearsal:
    """Scale a valid parameter file down.

    Args:
        params: what `load_params` returns.
        every_run: keep every value of every sweep; by default a sweep of numbers keeps its first and its last
            value and those of runs that others refer to, and one entry of each variant its several seeds.

    Raises:
        UserError: a model whose family cannot be told without fetching it.
    """
    full = copy.deepcopy(dict(with_options(params)))
    if not every_run:
        _thin(full)
    small = copy.deepcopy(full)
    stand_ins = replace_sources(small)
    _scale_counts(small)
    _scale_training(small)
    _scale_ranges(small)
    _scale_evaluation(small["evaluation"])
    small["runtime"] = _runtime(small["runtime"])
    small["figures"]["mark"] = MARK
    runs = _new_names(full, small)
    renamed = _renamed(small, runs)
    last = _new_names(small, renamed)  # a run that is named after its guide has another name again
    runs = {old: last[new] for old, new in runs.items()}
    return Rehearsal(_renamed(renamed, last), list(stand_ins.values()), runs)


def _new_names(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """By name of a run of some parameters: its name in others that have the same runs in the same order."""
    pairs = zip(expand_runs(old), expand_runs(new), strict=True)
    return {before.name: after.name for before, after in pairs}


# Sweeps.


def _thin(params: dict[str, Any]) -> None:
    """Keep the first and the last value of each sweep of numbers, and those that a reference to a run needs.

    Several seeds stay at one entry of each variant.
    """
    named = set(_strings({key: params[key] for key in ("evaluation", "saes")}))
    runs = expand_runs(params)
    referred = [run for run in runs if run.name in named or run.name.split("/", 2)[2] in named]
    if params["seeds"]:
        params["seeds"] = _ends(params["seeds"], {run.seed for run in referred})
    if params["sweep"]:
        last = max((trial_of(run.name) or 0 for run in referred), default=0)
        params["sweep"] = {**params["sweep"], "trials": max(2, last + 1)}
    several: set[str] = set()  # variants of which an entry has several seeds
    for entry, values in params["saes"].items():
        if "import" in values:
            continue
        own = [run for run in referred if run.entry == entry]
        values["d_sae"] = _ends(values["d_sae"], {run.d_sae for run in own})
        seeds = _ends(values["seed"], {run.seed for run in own})
        if isinstance(seeds, list) and values["variant"] in several:
            seeds = [seed for seed in seeds if seed == seeds[0] or seed in {r.seed for r in own}]
        elif isinstance(seeds, list) and len(seeds) > 1:
            several.add(values["variant"])
        values["seed"] = seeds
        options = values["options"]
        for name in options:
            needed = [run.options[name] for run in own]
            options[name] = _ends(options[name], needed)


def _ends(value: Any, needed: Iterable[Any]) -> Any:
    """The first and the last of a list of numbers, and those that are needed; anything else as it is."""
    if not isinstance(value, list) or not all(_is_number(one) for one in value):
        return value
    kept = [value[0], value[-1], *needed]
    return [one for one in value if one in kept]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def _renamed(params: dict[str, Any], runs: Mapping[str, str]) -> dict[str, Any]:
    """The parameters with every reference to a run (SOURCE/HOOK_POINT/ENTRY/LABEL, or ENTRY/LABEL) renamed."""
    new = {**{old.split("/", 2)[2]: name.split("/", 2)[2] for old, name in runs.items()}, **runs}

    def rename(value: Any) -> Any:
        if isinstance(value, str):
            return new.get(value, value)
        if isinstance(value, dict):
            return {key: rename(part) for key, part in value.items()}
        return [rename(part) for part in value] if isinstance(value, list) else value

    return {
        key: rename(part) if key in ("evaluation", "saes") else part for key, part in params.items()
    }


# Counts of latents.


def spread(values: Iterable[float], largest: int, least: int = 1) -> Callable[[float], int]:
    """A strictly increasing map of some numbers to whole ones from `least`, close to proportional.

    The largest value goes to `largest`, or to itself where that is less; where so many values do not fit below it,
    the map goes beyond.
    """
    known = sorted(set(values))
    scale = min(1.0, largest / known[-1]) if known else 1.0
    found: dict[float, int] = {}
    for value in known:
        found[value] = max(round(value * scale), max(found.values(), default=least - 1) + 1)
    return found.__getitem__


def _scale_counts(params: dict[str, Any]) -> None:
    """Scale d_sae, k and what else counts latents in `saes`, and the ranks of PCA."""
    found: list[float] = []

    def collect(value: float) -> int:
        found.append(value)
        return 1

    trained = [values for values in params["saes"].values() if "import" not in values]
    for values in trained:
        _count_latents(copy.deepcopy(values), collect)
    small = spread(found, D_SAE)
    for values in trained:
        _count_latents(values, small)
    ranks = params["evaluation"]["pca_ranks"]
    rank = spread(ranks, PCA_RANK)
    params["evaluation"]["pca_ranks"] = [rank(value) for value in ranks]


def _count_latents(values: dict[str, Any], small: Callable[[float], int]) -> None:
    """Replace every number of latents of an entry of `saes` by what `small` makes of it."""

    def replaced(value: Any) -> Any:
        if isinstance(value, list):
            return [replaced(one) for one in value]
        if isinstance(value, Mapping) and "from" in value:
            return {**value, "from": small(value["from"])}
        return small(value) if _is_number(value) else value

    values["d_sae"] = replaced(values["d_sae"])
    options = values["options"]
    for name in counts_of_latents(variants()[values["variant"]]):
        options[name] = replaced(options[name])


# Training.


def _scale_training(params: dict[str, Any]) -> None:
    """Scale budgets, batches and what counts in steps or tokens; equal budgets stay equal."""
    shared = params.get("training")
    if shared is None:  # every SAE is imported
        return
    before = dict(shared)
    for values in (*params["saes"].values(), shared):
        if "import" in values:
            continue
        own = {**before, **{key: values[key] for key in before if key in values}}
        batch = min(own["batch_size"], BATCH)
        budget = min(max(1, round(STEPS * own["tokens"] / before["tokens"])), 4 * STEPS) * BATCH
        tokens = min(own["tokens"], budget)
        ratio = max(1, tokens // batch) / max(1, own["tokens"] // own["batch_size"])
        small = {
            "batch_size": batch,
            "tokens": tokens,
            "lr_warmup_steps": _share(own["lr_warmup_steps"], ratio),
            "dead_after_tokens": max(4 * batch, _share(own["dead_after_tokens"], ratio)),
            "log_every_steps": max(1, tokens // batch // 8),
        }
        values |= {key: small[key] for key in small if key in values}
        options = values.get("options", {})
        if "threshold_start_step" in options:
            step = options["threshold_start_step"]
            options["threshold_start_step"] = _each(step, partial(_share, ratio=ratio))
        for name, most in {"p_updates": STEPS // 4, "estimator_width": 2 * WIDTH}.items():
            if name in options:
                small_of = spread(filter(None, as_list(options[name])), most)
                options[name] = _each(options[name], partial(_unless_null, small_of))


def _scale_ranges(params: dict[str, Any]) -> None:
    """Bring ranges of whole numbers (k, steps) beside the scaled value of their entry."""
    for values in params["saes"].values():
        for key in values.get("ranges", ()):
            if tunable(values["variant"])[key]:
                value = {**params["training"], **values, **values["options"]}[key]
                own = value if _is_number(value) else 0
                values["ranges"][key] = [max(2, own - 1), max(3, own)]


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """A value, or each value of a sweep, changed."""
    return [change(one) for one in value] if isinstance(value, list) else change(value)


def _unless_null(change: Callable[[Any], Any], value: Any) -> Any:
    return value if value is None else change(value)


def _share(count: int, ratio: float) -> int:
    """A number of steps or tokens at another scale; what was above 0 stays above 0."""
    return max(min(count, 1), round(count * min(1.0, ratio)))


def _runtime(runtime: Mapping[str, Any]) -> dict[str, Any]:
    """One CPU thread a job, many SAEs a job; the precision as it is."""
    return {
        **runtime,
        "device": "cpu",
        "threads": dict.fromkeys(runtime["threads"], 1),
        "extraction_jobs": 1,
        "saes_per_job": max(runtime["saes_per_job"], 64),
        "ranks": {**runtime["ranks"], "count": 1},
        "logging": {"tensorboard": False},
    }


# Evaluation.


def _scale_evaluation(evaluation: dict[str, Any]) -> None:
    """Scale how many rows, contexts, examples and resamples are looked at."""
    for path, most in _MOST.items():
        *parents, last = path.split(".")
        node: Any = evaluation
        for name in parents:
            node = (node or {}).get(name)
        if node and isinstance(node.get(last), int):
            node[last] = min(node[last], most)
    interpretability = evaluation.get("interpretability") or {}
    detection = interpretability.get("detection") or {}
    if detection.get("judge") is not None:  # a rehearsal asks no server
        detection |= {"scorer": "tokens", "judge": None}
    absorption = interpretability.get("absorption")
    if absorption:  # thresholds that a model without knowledge of letters cannot reach
        absorption |= {"min_probe_f1": 0.0, "min_letters": 1}
    if evaluation["dimension"]:
        neighbours = evaluation["dimension"]["neighbours"]
        small = spread(neighbours, 40, least=5)
        evaluation["dimension"]["neighbours"] = [small(value) for value in neighbours]
    for labelled in evaluation["labelled_sets"].values():
        labelled["per_class"] = {split: min(n, 2) for split, n in labelled["per_class"].items()}


_MOST = {
    "batch_size": 256,
    "ce_contexts": 4,
    "contexts_listed": 40,
    "bootstrap.resamples": 100,
    "concept_cards.concepts": 4,
    "concept_cards.images": 2,
    "concept_cards.among": 24,
    "latents.examples": 2,
    "latents.contexts": 16,
    "latents.neighbours": 3,
    "interpretability.rows": 400,
    "interpretability.probing.rows": 100,
    "interpretability.detection.latents": 4,
    "interpretability.detection.examples": 8,
    "interpretability.detection.windows": 4,
    "interpretability.absorption.examples": 2,
    "interpretability.absorption.words": 40,
    "dimension.rows": 200,
}
"""The largest value of a parameter of `evaluation` in a rehearsal."""
