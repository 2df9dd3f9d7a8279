"""Worlds that `sae_lens.synthetic` saved: synthetic_model_config.json, synthetic_model.safetensors and hierarchy.json.

The files hold the dictionary, the firing probabilities, the correlations and the hierarchy. Means and deviations of coefficients are
not in them: SAELens draws them again from the config's seed when it loads a model, and so does this module.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from saeflow.errors import UserError
from saeflow.files import read_json
from saeflow.sources.gated_firing import World

CONFIG, WEIGHTS, HIERARCHY = (
    "synthetic_model_config.json", "synthetic_model.safetensors", "hierarchy.json",
)  # fmt: skip
_SEED_OF_STDS, _SEED_OF_MEANS = 1, 2
"""Added to the config's seed by SAELens."""
_TENSORS = {"features": "feature_vectors", "bias": "bias", "probabilities": "firing_probabilities"}
_CORRELATION = ("correlation_factor", "correlation_diag")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config of a saved world.

    Raises:
        UserError: it is not there, or is not one.
    """
    path = folder / CONFIG
    config = read_json(path)
    wanted = ("num_features", "hidden_dim")
    if not isinstance(config, dict) or any(type(config.get(key)) is not int for key in wanted):
        raise UserError(
            f"{path}: expected the config of a SyntheticModel of SAELens, with {' and '.join(wanted)}, found another "
            "file. Give the folder that its save wrote."
        )
    return config


def read_world(folder: Path) -> World:
    """Read a world as `SyntheticModel.load_from_disk` does.

    Raises:
        UserError: a file is missing, damaged or does not fit the others, or the coefficients cannot be drawn again.
    """
    config = read_config(folder)
    n, d_in = config["num_features"], config["hidden_dim"]
    arrays = _arrays(folder / WEIGHTS, n, d_in)
    parents, groups, is_scaled = _hierarchy(folder, config, n)
    means, stds = (
        _magnitudes(folder / CONFIG, config, name, added)
        for name, added in (
            ("mean_firing_magnitudes", _SEED_OF_MEANS),
            ("std_firing_magnitudes", _SEED_OF_STDS),
        )
    )
    if (means[parents[is_scaled]] <= 0).any():
        raise UserError(
            f"{folder / CONFIG}: mean_firing_magnitudes: expected numbers above 0 for parents that scale their children, "
            "found others. SAELens refuses them too."
        )
    return World.of(
        arrays
        | {"parents": parents, "groups": groups, "is_scaled": is_scaled}
        | {"means": means, "stds": stds}
    )


def _arrays(path: Path, n: int, d_in: int) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = {name: part.float().numpy() for name, part in load_file(path).items()}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Save the world again.") from None
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}). Save the world again.") from None
    names = dict(_TENSORS)
    shapes: dict[str, tuple[int, ...]] = {"features": (n, d_in), "bias": (d_in,), "probabilities": (n,)}  # fmt: skip
    if _CORRELATION[0] in stored:
        names |= dict(zip(("loadings", "own"), _CORRELATION, strict=True))
        shapes |= {"loadings": (n, stored[_CORRELATION[0]].shape[-1]), "own": (n,)}
    found = {}
    for name, theirs in names.items():
        if theirs not in stored or stored[theirs].shape != shapes[name]:
            shape = list(stored[theirs].shape) if theirs in stored else "nothing"
            raise UserError(
                f"{path}: {theirs}: expected shape {list(shapes[name])}, found {shape}. Save the world again."
            )
        if not np.isfinite(stored[theirs]).all():
            raise UserError(f"{path}: {theirs} is not finite. Save the world again.")
        found[name] = stored[theirs]
    if "own" in found:
        found["own"] = np.sqrt(found["own"])
    return found


def _hierarchy(
    folder: Path, config: Mapping[str, Any], n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parents, exclusive groups, and which features are scaled by their parent."""
    parents, groups = np.full(n, -1, dtype=np.int32), np.full(n, -1, dtype=np.int32)
    is_scaled = np.zeros(n, dtype=bool)
    path = folder / HIERARCHY
    if not path.is_file():
        if config.get("hierarchy") is not None:
            raise UserError(
                f"{path}: no such file, {CONFIG} has a hierarchy. Save the world again."
            )
        return parents, groups, is_scaled
    read = read_json(path)
    seen: set[int] = set()
    try:
        for number, (node, parent, scales) in enumerate(_nodes(read["roots"])):
            own = node["feature_index"]
            children = [child["feature_index"] for child in node["children"]]
            if node["mutually_exclusive_children"]:
                groups[[child for child in children if child is not None]] = number
            if own is None:
                continue
            if own in seen or not 0 <= own < n:
                raise UserError(
                    f"{path}: feature_index: expected each of 0..{n - 1} at most once, found {own}. Save the world again."
                )
            seen.add(own)
            parents[own], is_scaled[own] = parent, scales
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{path}: expected a hierarchy of SAELens, found another file ({error!r}). Save the world again."
        ) from None
    return parents, groups, is_scaled


def _nodes(roots: list[Any]) -> Iterator[tuple[Mapping[str, Any], int, bool]]:
    """Nodes, the feature above each (-1 for none), and whether what is above scales it.

    A node without a feature passes on the feature above it.
    """
    waiting = [(root, -1, False) for root in roots]
    while waiting:
        node, parent, scales = waiting.pop()
        yield node, parent, scales and parent >= 0
        own = node["feature_index"]
        below = parent if own is None else int(own)
        waiting.extend(
            (child, below, node["scale_children_by_parent"]) for child in node["children"]
        )


def _magnitudes(path: Path, config: Mapping[str, Any], name: str, added: int) -> np.ndarray:
    """(n,) float32 means or deviations of coefficients.

    Raises:
        UserError: a law that is not known, or random ones without a seed.
    """
    import torch

    n, law, seed = config["num_features"], config.get(name), config.get("seed")
    law = {"generator_name": "constant", "value": law} if isinstance(law, int | float) else law
    match law:
        case {"generator_name": "constant", "value": value}:
            drawn = torch.full((n,), float(value))
        case {"generator_name": "linear", "start": start, "end": end}:
            drawn = torch.linspace(start, end, n)
        case {"generator_name": "exponential", "start": start, "end": end}:
            drawn = start * (end / start) ** torch.linspace(0, 1, n)
        case {"generator_name": "folded_normal", "mean": mean, "std": std, **rest}:
            if not isinstance(seed, int):
                raise UserError(
                    f"{path}: seed: expected a number, since the file holds no {name} and they are random, found "
                    f"{seed!r}. Save a world that has a seed."
                )
            generator = torch.Generator().manual_seed(seed + added)
            drawn = (mean + torch.randn(n, generator=generator) * std).abs()
            bounds = rest.get("min_value"), rest.get("max_value")
            drawn = drawn if bounds == (None, None) else drawn.clamp(*bounds)
        case _:
            raise UserError(
                f"{path}: {name}: expected a number or the law constant, linear, exponential or folded_normal, found "
                f"{law!r}."
            )
    result: np.ndarray = drawn.numpy()
    return result
