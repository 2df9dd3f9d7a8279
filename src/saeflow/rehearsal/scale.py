"""From a parameter file to its rehearsal: the same entries and figures, everything that costs time made small.

Counts that are compared with each other (dictionary sizes, k, the start of a k-schedule) go through one increasing
map, so that different values stay different and every k stays at or below its d_sae. Names of runs change with their
sizes; what refers to a run follows.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from saeflow.config import expand_runs
from saeflow.config.options import counts_of_latents
from saeflow.config.variants import variants, with_options
from saeflow.errors import UserError
from saeflow.files import json_digest
from saeflow.sources import kind_of, scenes
from saeflow.sources.layouts import HookPoint, known_shape

MARK = "REHEARSAL"
WIDTH = 32
"""d_in of every stand-in for a model."""
D_SAE, PCA_RANK = 512, 24
"""The largest dictionary and the largest rank of a rehearsal."""
CONTEXT, TRAIN_ROWS, EVALUATION_ROWS = 32, 1024, 512
STEPS, BATCH = 24, 64
PATCH_SIZE = 16
PATCHES = (scenes.SIDE // PATCH_SIZE) ** 2
CLASSES = 4
"""Classes of a labelled set whose class names are not in the parameters."""


@dataclass(frozen=True)
class StandIn:
    """Stand-in for a model or for data: a recipe and the path that it is written to."""

    kind: str
    """A key of `stand_ins.MAKERS`."""
    path: str
    """Relative to the rehearsal's folder."""
    recipe: Mapping[str, Any]
    instead_of: str
    """The name of what it stands for."""


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
    stand_ins = _Sources(small).replace()
    _scale_counts(small)
    _scale_training(small)
    _scale_evaluation(small["evaluation"])
    small["runtime"] = _runtime(small["runtime"])
    small["figures"]["mark"] = MARK
    runs = {
        old.name: new.name for old, new in zip(expand_runs(full), expand_runs(small), strict=True)
    }
    return Rehearsal(_renamed(small, runs), list(stand_ins.values()), runs)


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
    shared = params["training"]
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
                small_of = spread(filter(None, _list(options[name])), most)
                options[name] = _each(options[name], partial(_unless_null, small_of))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


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
    absorption = (evaluation.get("interpretability") or {}).get("absorption")
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


# Sources.


class _Sources:
    """Replaces models and data of `params`, in place, by paths of stand-ins."""

    def __init__(self, params: dict[str, Any]) -> None:
        self.params = params
        self.made: dict[str, StandIn] = {}

    def replace(self) -> dict[str, StandIn]:
        """Replace all of them; what must be written, by path."""
        sources, evaluation = self.params["sources"], self.params["evaluation"]
        sets = evaluation["labelled_sets"]
        names = {name: _class_names(labelled) for name, labelled in sets.items()}
        texts = sorted(
            {
                *itertools.chain.from_iterable(names.values()),
                *itertools.chain.from_iterable(one["templates"] for one in sets.values()),
                *((evaluation["concept_cards"] or {}).get("prompts") or ()),
            }
        )
        models = {name: source.get("model") for name, source in sources.items()}
        for name, source in sources.items():
            store = self.params["stores"][name]
            if models[name] is not None:
                points = [
                    point
                    for other, values in sources.items()
                    if models[other] == models[name]
                    for point in values["hook_points"]
                ]
                source["model"] = self._model(name, models[name], points, texts)
                source["forward_batch"] = min(source["forward_batch"], 8)
                source["evaluation_share"] = max(source["evaluation_share"], 0.33)
            if "text" in source:
                source["context_length"] = min(source["context_length"], CONTEXT)
                source["text"] = self._text(name, source["text"])
            is_row = "images" in source and _rows_per_context(source) == 1
            store |= {  # a row an image: fewer of them, for each must be drawn
                "train_rows": min(store["train_rows"], TRAIN_ROWS // (1 + is_row)),
                "evaluation_rows": min(store["evaluation_rows"], EVALUATION_ROWS // (1 + is_row)),
                "chunk_rows": min(store["chunk_rows"], 128),
                "block_contexts": 2 * source.get("forward_batch", 8),
            }
            store["shard_rows"] = 4 * store["chunk_rows"]
            if "images" in source:
                count = _contexts_needed(source, store)
                source["images"] = self._images(source["images"], [], count)
        for name, labelled in sets.items():
            each = 4 if labelled["train"] == labelled["test"] else 2  # one collection is shared out
            for split in ("train", "test"):
                count = each * len(names[name])
                labelled[split] = self._images(labelled[split], names[name], count)
        for name, scoring in self.params["complexity"].items():
            if scoring.get("contexts"):
                scoring["contexts"] = min(scoring["contexts"], 40)
            if scoring["kind"] == "table":
                scoring["file"] = self._table(name, scoring)
        for entry, values in self.params["saes"].items():
            if "import" in values:
                values["import"] = self._import(entry, values)
        return self.made

    def _order(self, kind: str, recipe: dict[str, Any], instead_of: str, suffix: str = "") -> str:
        """The path of a stand-in; the same recipe for the same thing is made once."""
        label = "".join(c if c.isalnum() else "-" for c in instead_of.rpartition("/")[2].lower())
        digest = json_digest([kind, recipe, instead_of])[:8]
        path = f"inputs/{kind}/{label.strip('-')}-{digest}{suffix}"
        self.made[path] = StandIn(kind, path, recipe, instead_of)
        return path

    def _model(
        self, name: str, model: dict[str, Any], points: list[str], texts: list[str]
    ) -> dict[str, Any]:
        if "trained" in model:
            trained = model["trained"]
            small = {
                "examples": 64,
                "pairs": 64,
                "batch_size": 8,
                "width": WIDTH,
                "patch_size": PATCH_SIZE,
            }
            return {"trained": {**trained, **small}}
        shape = known_shape(model)
        if shape is None:
            raise UserError(
                f"sources.{name}.model: the family of {_name(model)} is not known before it is fetched. Add its sizes to "
                "saeflow/sources/shapes.yaml, or fetch its config.json once."
            )
        # One block more than the hook points need, so that a hook point before the last block stays one.
        parsed = [point for point in map(HookPoint.parse, points) if not point.is_embedding]
        blocks = min(shape.n_blocks, 2 + max((point.block for point in parsed), default=0))
        recipe: dict[str, Any] = {"model_type": shape.model_type, "blocks": blocks}
        if shape.model_type == "clip":
            recipe["texts"] = texts
        return {"folder": self._order("models", recipe, _name(model))}

    def _text(self, name: str, text: dict[str, Any]) -> dict[str, Any]:
        if "bundled" in text:
            return text
        if "files" in text:
            files = [
                self._order(
                    "documents", {"column": text["column"]}, file, "." + file.rpartition(".")[2]
                )
                for file in text["files"]
            ]
            return {**text, "files": files}
        recipe = {"column": text["column"], "split": text["split"], "name": text["name"]}
        return {**text, "dataset": self._order("texts", recipe, text["dataset"])}

    def _images(self, images: dict[str, Any], classes: list[str], count: int) -> dict[str, Any]:
        if "scenes" in images:
            return images
        if "folder" in images:
            recipe = {"classes": classes, "count": count}
            return {"folder": self._order("folders", recipe, images["folder"])}
        recipe = {
            **{key: images[key] for key in ("image_column", "label_column", "split", "name")},
            "classes": classes, "count": count,
        }  # fmt: skip
        return {**images, "dataset": self._order("images", recipe, images["dataset"])}

    def _table(self, name: str, scoring: dict[str, Any]) -> str:
        used = {
            run.source for run in expand_runs(self.params) if run.options.get("complexity") == name
        }
        used |= {store.partition("/")[0] for store in scoring.get("probe_at", ())}
        contexts = {"train": 0, "evaluation": 0}
        for source in used:  # each context of a source has its row; a table is of one source
            store = self.params["stores"][source]
            per_context = _rows_per_context(self.params["sources"][source])
            contexts = {s: math.ceil(store[f"{s}_rows"] / per_context) for s in contexts}
        recipe = {
            "column": scoring["column"],
            "range": scoring["range"] or [0, 10],
            "contexts": contexts,
        }
        suffix = "." + scoring["file"].rpartition(".")[2]
        return self._order("tables", recipe, scoring["file"], suffix)

    def _import(self, entry: str, values: dict[str, Any]) -> dict[str, Any]:
        chosen = values["import"]
        recipe = {"library": chosen["library"], "hook_point": values["store"].partition("/")[2]}
        return {**chosen, "folder": self._order("imports", recipe, chosen["folder"])}


def _rows_per_context(source: Mapping[str, Any]) -> int:
    """Rows that a context of a source of stand-ins gives."""
    known = kind_of(source).rows_per_context(source)
    return PATCHES + (source["tokens"] == "all") if known is None else known


def _contexts_needed(source: Mapping[str, Any], store: Mapping[str, Any]) -> int:
    """Images that give both splits their rows, with room for how evenly their digests divide them."""
    shares = {"train": 1 - source["evaluation_share"], "evaluation": source["evaluation_share"]}
    wanted = max(store[f"{split}_rows"] / share for split, share in shares.items() if share > 0)
    wanted /= _rows_per_context(source)
    return math.ceil(wanted + 6 * math.sqrt(wanted)) + 8


def _name(model: Mapping[str, Any]) -> str:
    return str(next(model[key] for key in ("hub", "wheel", "gguf", "folder") if key in model))


def _class_names(labelled: Mapping[str, Any]) -> list[str]:
    """The classes of a labelled set's stand-in: those of the parameters, or a few."""
    named: list[str] | None = labelled["class_names"]
    return named or default_classes()


def default_classes() -> list[str]:
    """Names of the classes of images whose real ones are not in the parameters."""
    return [f"class {number}" for number in range(CLASSES)]
