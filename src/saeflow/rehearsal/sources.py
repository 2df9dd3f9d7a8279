"""Models and data of a rehearsal: every one is replaced by a small stand-in, and stores hold few rows."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saeflow.config import expand_runs, n_windows
from saeflow.errors import UserError
from saeflow.files import json_digest
from saeflow.shapes import known_shape
from saeflow.sources import kind_of, scenes
from saeflow.sources.layouts import HookPoint

WIDTH = 32
"""d_in of every stand-in for a model."""
CONTEXT, TRAIN_ROWS, EVALUATION_ROWS = 32, 1024, 512
MOST_WINDOWS = 3
PATCH_SIZE = 16
PATCHES = (scenes.SIDE // PATCH_SIZE) ** 2
FEATURES = 256
"""True features of a synthetic world."""
_LAWS: dict[str, Any] = {
    "firing": {"exponent": 0.5, "p_max": 0.4, "p_min": 5e-4}, "hierarchy": None, "correlation": None, "orthogonalise": None,
    "coefficient": {"mean": {"first": 5.0, "last": 4.0}, "std": {"mean": 0.5, "std": 0.5}}, "bias_norm": 0,
}  # fmt: skip
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


def replace_sources(params: dict[str, Any]) -> dict[str, StandIn]:
    """Replace models and data of parameters, in place, by paths of stand-ins, and scale what is taken of them.

    Returns:
        What must be written, by path.
    """
    return _Sources(params).replace()


class _Sources:
    """Models and data of `params`, and the stand-ins that were ordered for them so far."""

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
            if "world" in source:
                source |= {"d_in": WIDTH, "world": _world(source["world"])}
            if "text" in source:
                source["context_length"] = min(source["context_length"], CONTEXT)
                source["text"] = self._text(name, source["text"])
            is_row = "images" in source and _rows_per_context(source) == 1
            windows = min(n_windows(store, "train"), MOST_WINDOWS)
            store |= {  # a row an image: fewer of them, for each must be drawn
                "train_rows": min(store["train_rows"], TRAIN_ROWS // (1 + is_row)),
                "evaluation_rows": min(store["evaluation_rows"], EVALUATION_ROWS // (1 + is_row)),
                "chunk_rows": min(store["chunk_rows"], 128),
                "block_contexts": 2 * source.get("forward_batch", 8),
            }
            store["shard_rows"] = 4 * store["chunk_rows"]
            if windows > 1:
                store["window_rows"] = -(-store["train_rows"] // windows)
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
                "saeflow/shapes/shapes.yaml, or fetch its config.json once."
            )
        # One block more than the hook points need, so that a hook point before the last block stays one.
        parsed = list(map(HookPoint.parse, points))
        needed = 2 + max((point.block for point in parsed if point.is_in_block), default=0)
        has_modules = any(point.module for point in parsed)  # which may be in any block
        blocks = shape.n_blocks or needed
        blocks = blocks if has_modules else min(blocks, needed)
        recipe: dict[str, Any] = {"model_type": shape.model_type, "blocks": blocks}
        if shape.is_of_images:  # a CLIP has every hook point of an image tower
            recipe |= {"model_type": "clip", "texts": texts}
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


def _world(world: Mapping[str, Any]) -> dict[str, Any]:
    """A world of few features under the same laws; a simple one stands in for one that was saved."""
    if "n_features" not in world:
        return {"n_features": FEATURES, **_LAWS}
    scale = min(1.0, FEATURES / world["n_features"])
    small = {**world, "n_features": round(world["n_features"] * scale)}
    if world["hierarchy"] is not None:
        shape = dict(world["hierarchy"])
        shape["roots"] = max(1, int(shape["roots"] * scale))
        small["hierarchy"] = shape | {key: min(shape[key], 3) for key in ("branching", "depth")}
    return small


def _rows_per_context(source: Mapping[str, Any]) -> int:
    """Rows that a context of a source of stand-ins gives."""
    known = kind_of(source).rows_per_context(source)
    return PATCHES + (source["tokens"] == "all") if known is None else known


def _contexts_needed(source: Mapping[str, Any], store: Mapping[str, Any]) -> int:
    """Images that give both splits their rows, with room for how evenly their digests divide them."""
    shares = {"train": 1 - source["evaluation_share"], "evaluation": source["evaluation_share"]}
    wanted = max(store[f"{split}_rows"] / share for split, share in shares.items() if share > 0)
    wanted /= _rows_per_context(source)
    result: int = math.ceil(wanted + 6 * math.sqrt(wanted)) + 8
    return result


def _name(model: Mapping[str, Any]) -> str:
    return str(next(model[key] for key in ("hub", "wheel", "gguf", "folder") if key in model))


def _class_names(labelled: Mapping[str, Any]) -> list[str]:
    """The classes of a labelled set's stand-in: those of the parameters, or a few."""
    named: list[str] | None = labelled["class_names"]
    return named or default_classes()


def default_classes() -> list[str]:
    """Names of the classes of images whose real ones are not in the parameters."""
    return [f"class {number}" for number in range(CLASSES)]
