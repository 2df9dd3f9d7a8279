"""Synthetic activations of worlds like SynthSAEBench's: drawn from its laws, or one that SAELens saved (arXiv 2602.14687).

Every feature has a firing probability of its own, so that the number of active features follows from the world; the kind
`synthetic` states that number instead.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from saeflow.errors import UserError
from saeflow.files import folder_digests, json_digest, read_json, write_json
from saeflow.sources import hub, saved_world
from saeflow.sources.base import Column, generator
from saeflow.sources.drawn_rows import (
    DICTIONARY,
    ROWS_PER_CONTEXT,
    SPLITS,
    STRUCTURE,
    STRUCTURE_STREAM,
    DrawnInputs,
    DrawnRows,
    check_hook_points,
    sums,
)
from saeflow.sources.firing import Hierarchy
from saeflow.sources.gated_firing import (
    Entries,
    Firing,
    World,
    compensated,
    random_loadings,
    zipf_probabilities,
)
from saeflow.sources.kinds import SourceKind
from saeflow.sources.near_orthogonal import orthogonalised

_TRIAL_STREAM = 3
_TRIAL_CONTEXTS = 16
_ROOM = 1.5
"""Active features that a row has room for, in multiples of the most that a row of the trial had."""


def check(name: str, params: Mapping[str, Any], folder: Path) -> None:
    """Refuse parameters that no data can have.

    Raises:
        UserError: the first that is wrong.
    """
    where, world = f"sources.{name}", params["world"]
    check_hook_points(where, params)
    if "folder" in world:
        _check_width(where, params, saved_world.read_config(Path(world["folder"])))
    if "n_features" not in world:
        return
    firing, hierarchy = world["firing"], _hierarchy(world)
    if firing["p_min"] >= firing["p_max"]:
        raise UserError(
            f"{where}.world.firing: p_min ({firing['p_min']}) is not below p_max ({firing['p_max']})."
        )
    if hierarchy is not None and hierarchy.size > world["n_features"]:
        raise UserError(
            f"{where}.world.hierarchy: it has {hierarchy.size} features, n_features is {world['n_features']}. Make it "
            "smaller or raise n_features."
        )


def _check_width(where: str, params: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    if config["hidden_dim"] != params["d_in"]:
        raise UserError(
            f"{where}.d_in: expected {config['hidden_dim']}, the width of the saved world, found {params['d_in']}."
        )


def external_inputs(params: Mapping[str, Any]) -> dict[str, str]:
    """Return the digest of a saved world's folder, or the commit of the hub's."""
    world = params["world"]
    if "folder" in world:
        return {world["folder"]: json_digest(folder_digests(Path(world["folder"])))}
    return {f"hub:{world['hub']}": world["revision"]} if "hub" in world else {}


def open_source(params: Mapping[str, Any], folder: Path, device: str) -> "WorldSource":
    """Open the world in `folder`; sampling runs on the CPU."""
    return WorldSource(params, folder / "inputs")


def prepare_inputs(
    params: Mapping[str, Any],
    rows: Mapping[str, int],
    model: Path,
    folder: Path,
    workers: int = 1,
) -> dict[str, Any]:
    """Draw a world, or read one that was saved.

    Args:
        params: a source of this kind.
        rows: rows asked for by split, rounded up to whole contexts.
        model: not used.
        folder: written: dictionary.safetensors with the arrays of `World`; structure.json with the contexts of each split and
            the active features that a row has room for.

    Returns:
        The mean number of active features of the rows that were tried, for the record.

    Raises:
        UserError: a saved world that is damaged, incomplete, or of another width.
    """
    from safetensors.numpy import save_file

    name = folder.parent.name
    check(name, params, folder)
    world = _world(name, params)
    save_file(world.stored(), folder / DICTIONARY)
    firing = Firing(world)
    trial = [
        firing.draw(ROWS_PER_CONTEXT, generator(params["seed"], _TRIAL_STREAM, number))
        for number in range(_TRIAL_CONTEXTS)
    ]
    counts = np.concatenate([_counts(entries) for entries in trial])
    contexts = {split: math.ceil(n / ROWS_PER_CONTEXT) for split, n in rows.items()}
    write_json(
        folder / STRUCTURE, {"contexts": contexts, "room": math.ceil(_ROOM * max(1, counts.max()))}
    )
    return {"true_l0_mean": float(counts.mean())}


def _counts(entries: Entries) -> np.ndarray:
    """(ROWS_PER_CONTEXT,) active features of each row."""
    return np.bincount(entries.rows, minlength=ROWS_PER_CONTEXT)


def _world(name: str, params: Mapping[str, Any]) -> World:
    world = params["world"]
    if "n_features" in world:
        return drawn_world(world, params["d_in"], generator(params["seed"], STRUCTURE_STREAM, 0))
    folder = (
        Path(world["folder"])
        if "folder" in world
        else hub.snapshot(world["hub"], world["revision"], [saved_world.CONFIG, saved_world.WEIGHTS, saved_world.HIERARCHY])
    )  # fmt: skip
    _check_width(f"sources.{name}", params, saved_world.read_config(folder))
    return saved_world.read_world(folder)


def _hierarchy(world: Mapping[str, Any]) -> Hierarchy | None:
    if (given := world["hierarchy"]) is None:
        return None
    shape = {key: given[key] for key in ("roots", "branching", "depth", "exclusive")}
    return Hierarchy(**shape)


def drawn_world(world: Mapping[str, Any], d_in: int, rng: np.random.Generator) -> World:
    """Draw a world from its laws.

    Args:
        world: n_features, firing, hierarchy, correlation, coefficient, orthogonalise and bias_norm, see the schema.
        d_in: width.
        rng: source of randomness.
    """
    n, hierarchy = world["n_features"], _hierarchy(world)
    features = _unit(rng.standard_normal((n, d_in)))
    bias = world["bias_norm"] * _unit(rng.standard_normal((1, d_in)))[0]
    if world["orthogonalise"] is not None:
        features = orthogonalised(features, **world["orthogonalise"])
    parents = np.full(n, -1, dtype=np.int32) if hierarchy is None else hierarchy.parents(n)
    is_exclusive = hierarchy is not None and hierarchy.exclusive
    groups = parents if is_exclusive else np.full_like(parents, -1)
    probabilities = zipf_probabilities(n, **world["firing"])
    if hierarchy is not None and world["hierarchy"]["compensate"]:
        probabilities = compensated(probabilities, parents, groups)
    scales = hierarchy is not None and world["hierarchy"]["scale_children"]
    mean, std = world["coefficient"]["mean"], world["coefficient"]["std"]
    shared: dict[str, np.ndarray] = {}
    if (correlation := world["correlation"]) is not None:
        loadings, own = random_loadings(n, correlation["rank"], correlation["scale"], rng)
        shared = {"loadings": loadings, "own": own}
    arrays = {
        "features": features, "bias": bias, "probabilities": probabilities, "means": np.linspace(mean["first"], mean["last"], n),
        "stds": np.abs(std["mean"] + std["std"] * rng.standard_normal(n)),
    }  # fmt: skip
    found = {key: array.astype(np.float32) for key, array in arrays.items()}
    return World.of(
        found
        | shared
        | {"parents": parents, "groups": groups, "is_scaled": (parents >= 0) & scales}
    )


def _unit(rows: np.ndarray) -> np.ndarray:
    result: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return result


class WorldSource(DrawnRows):
    """Samples of a world, in contexts of ROWS_PER_CONTEXT rows.

    Args:
        params: a source of this kind.
        folder: what `prepare_inputs` wrote.

    Raises:
        UserError: the inputs are not there.
    """

    def __init__(self, params: Mapping[str, Any], folder: Path) -> None:
        from safetensors.numpy import load_file

        structure = read_json(folder / STRUCTURE)
        self.room = int(structure["room"])
        self.world = World.of(load_file(folder / DICTIONARY))
        self.firing = Firing(self.world)
        self.seed = int(params["seed"])
        is_small = len(self.world.features) <= np.iinfo(np.int16).max
        # There are more of them than of anything else.
        self._index = np.dtype(np.int16 if is_small else np.int32)
        columns: dict[str, Column] = {"true_indices": (self._index, (self.room,))}
        super().__init__(int(params["d_in"]), structure["contexts"], columns)

    def active(self, split: str, number: int) -> Entries:
        """Active features of one context.

        Raises:
            UserError: a row has more of them than there is room for.
        """
        entries = self.firing.draw(ROWS_PER_CONTEXT, generator(self.seed, SPLITS[split], number))
        if (most := int(_counts(entries).max())) > self.room:
            raise UserError(
                f"a row of the synthetic world has {most} active features, there is room for {self.room}, {_ROOM} times "
                f"the most of {_TRIAL_CONTEXTS * ROWS_PER_CONTEXT} other rows. Take another seed of the source."
            )
        return entries

    def context(self, split: str, number: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Activations and true indices of one context."""
        entries = self.active(split, number)
        counts = _counts(entries)
        x = sums(counts, entries.features, entries.values, self.world.features) + self.world.bias
        indices = np.full((ROWS_PER_CONTEXT, self.room), -1, dtype=self._index)
        firsts = np.cumsum(counts) - counts
        indices[entries.rows, np.arange(len(entries.rows)) - firsts[entries.rows]] = (
            entries.features
        )
        return x, {"true_indices": indices}

    def counts(self, split: str, number: int) -> np.ndarray:
        """(ROWS_PER_CONTEXT,) active features of the rows of one context."""
        return _counts(self.active(split, number))


class WorldInputs(DrawnInputs):
    """The world's dictionary and its counts."""

    def source(self) -> WorldSource:
        """The rows of the world."""
        return WorldSource(self.params, self.folder)


KIND = SourceKind(
    check=check,
    external_inputs=external_inputs,
    prepare_inputs=prepare_inputs,
    open=open_source,
    inputs=WorldInputs,
    rows_per_context=lambda params: ROWS_PER_CONTEXT,
    has_true_counts=lambda params: True,
    has_true_dictionary=True,
)
