"""Synthetic activations: sums of known features, of which a known number is active in each sample.

Near to SynthSAEBench (arXiv 2602.14687): Zipf firing rates, low-rank correlations of firing, a
hierarchy with exclusive children, noise. Beyond it, the number of active features can follow a law of its
own, constant or varying, and is stored with each row; and the norm of a row can be made to tell nothing of it.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from saeflow.errors import UserError
from saeflow.files import read_json, write_json
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
from saeflow.sources.firing import (
    Hierarchy,
    arrival_times,
    firing_rates,
    first_arrivals,
    largest_l0,
    loadings,
    sample_l0,
)
from saeflow.sources.kinds import SourceKind
from saeflow.sources.true_dictionary import true_dictionary

_CALIBRATION_CONTEXTS = 16


def check(name: str, params: Mapping[str, Any], folder: Path) -> None:
    """Refuse parameters that no data can have.

    Raises:
        UserError: the first that is wrong.
    """
    where, law, n_features = f"sources.{name}", params["l0_law"], params["n_features"]
    check_hook_points(where, params)
    room, why = n_features, "n_features"
    hierarchy = _hierarchy(params)
    if hierarchy is not None:
        if hierarchy.size > n_features:
            raise UserError(
                f"{where}.hierarchy: it has {hierarchy.size} features, n_features is {n_features}. Make "
                "it smaller or raise n_features."
            )
        if hierarchy.exclusive:
            room += hierarchy.roots * (hierarchy.depth + 1) - hierarchy.size
            why = "features that can fire together, with exclusive siblings"
    if largest_l0(law) > room:
        raise UserError(
            f"{where}.l0_law: expected at most {room} active features ({why}), found {largest_l0(law)}."
        )
    for low, high in (("smallest", "largest"), ("low", "high"), ("p_min", "p_max")):
        if low in law and law[low] > law[high]:
            raise UserError(f"{where}.l0_law: {low} ({law[low]}) is above {high} ({law[high]}).")
    if law["kind"] == "bernoulli":
        least, most = n_features * law["p_min"], n_features * law["p_max"]
        if not least < law["mean"] < most:
            raise UserError(
                f"{where}.l0_law.mean: expected between {least:g} and {most:g} (n_features times p_min "
                f"and p_max), found {law['mean']}."
            )


def external_inputs(params: Mapping[str, Any]) -> dict[str, str]:
    """Nothing comes from outside."""
    return {}


def open_source(params: Mapping[str, Any], folder: Path, device: str) -> "SyntheticSource":
    """Open the dictionary in `folder`; sampling runs on the CPU."""
    return SyntheticSource(params, folder / "inputs")


def prepare_inputs(
    params: Mapping[str, Any],
    rows: Mapping[str, int],
    model: Path,
    folder: Path,
    workers: int = 1,
) -> dict[str, Any]:
    """Draw the true dictionary and the structure of its firing.

    Args:
        params: a synthetic source.
        rows: rows asked for by split, rounded up to whole contexts.
        model: not used.
        folder: written: dictionary.safetensors with `features` (n_features, d_in) unit rows,
            `rates` (n_features,), `parents` (n_features,) with -1 for none and, where firing is
            correlated, `loadings` (n_features, rank); structure.json with the contexts of each split.

    Returns:
        Nothing for the record: nothing is read.
    """
    from safetensors.numpy import save_file

    check(folder.parent.name, params, folder)
    rng = generator(params["seed"], STRUCTURE_STREAM, 0)
    n_features, correlation = params["n_features"], params["correlation"]
    features = true_dictionary(n_features, params["d_in"], params["coherence"], rng)
    rates = firing_rates(n_features, params["frequency_exponent"], params["l0_law"])
    parents = np.full(n_features, -1, dtype=np.int32)
    hierarchy = _hierarchy(params)
    if hierarchy is not None:
        rates, parents = hierarchy.arrange(rates, rng), hierarchy.parents(n_features)
    tensors = {"features": features, "rates": rates.astype(np.float32), "parents": parents}
    if correlation is not None:
        tensors["loadings"] = loadings(
            n_features, correlation["rank"], correlation["strength"], rng
        )
    save_file(tensors, folder / DICTIONARY)
    contexts = {split: math.ceil(n / ROWS_PER_CONTEXT) for split, n in rows.items()}
    until = _until(params, tensors, hierarchy, rng)
    write_json(folder / STRUCTURE, {"contexts": contexts, "fires_until": until})
    return {}


def _hierarchy(params: Mapping[str, Any]) -> Hierarchy | None:
    return None if params["hierarchy"] is None else Hierarchy(**params["hierarchy"])


def _until(
    params: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    hierarchy: Hierarchy | None,
    rng: np.random.Generator,
) -> float | None:
    """The time before which features fire under `bernoulli`; None under the other laws.

    It is 1, but a hierarchy lets fewer fire: then the time at which the law's mean number have arrived.
    """
    law = params["l0_law"]
    if law["kind"] != "bernoulli":
        return None
    if hierarchy is None:
        return 1.0
    earliest, keep = [], 4 * ROWS_PER_CONTEXT * math.ceil(law["mean"])
    for _ in range(_CALIBRATION_CONTEXTS):
        times = arrival_times(ROWS_PER_CONTEXT, tensors["rates"], tensors.get("loadings"), rng)
        hierarchy.delay(times)
        earliest.append(np.sort(times, axis=None)[:keep])
    fire = round(law["mean"] * ROWS_PER_CONTEXT * _CALIBRATION_CONTEXTS)
    return float(np.sort(np.concatenate(earliest))[fire])


def coefficients(
    law: Mapping[str, Any], shape: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray:
    """Positive float32 coefficients of active features.

    Args:
        law: {kind: normal, mean, std} (its absolute value) or {kind: lognormal, mean, std}.
        shape: of the result.
        rng: source of randomness.
    """
    drawn: np.ndarray
    normal = rng.standard_normal(shape, dtype=np.float32)
    if law["kind"] == "normal":
        drawn = np.abs(law["mean"] + law["std"] * normal).astype(np.float32)
        return drawn
    variance = math.log1p((law["std"] / law["mean"]) ** 2)
    location = math.log(law["mean"]) - variance / 2
    drawn = np.exp(location + math.sqrt(variance) * normal).astype(np.float32)
    return drawn


def norm_factors(
    law: Mapping[str, Any], x: np.ndarray, counts: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """(rows,) float32 factors that take away what the norm tells of the count, or add to it what tells nothing.

    Args:
        law: {kind: balanced}: 1 / sqrt(count), so that the mean square of the norm is the same for every count but
            for noise and coherence; {kind: equal}: every row has norm 1; {kind: varying, sigma}: lognormal with mean 1, drawn
            alike for every row.
        x: (rows, d_in), with noise.
        counts: (rows,) active features; a row without any is left as it is under `balanced`.
        rng: source of randomness.
    """
    factors: np.ndarray
    if law["kind"] == "balanced":
        factors = (1 / np.sqrt(np.maximum(counts, 1))).astype(np.float32)
        return factors
    if law["kind"] == "equal":
        norms = np.linalg.norm(x.astype(np.float64), axis=1)
        return (1 / np.where(norms > 0, norms, 1)).astype(np.float32)
    sigma = law["sigma"]
    drawn = rng.standard_normal(len(x))
    factors = np.exp(sigma * drawn - sigma**2 / 2).astype(np.float32)
    return factors


class SyntheticSource(DrawnRows):
    """Samples of a known dictionary, in contexts of ROWS_PER_CONTEXT rows.

    Args:
        params: a synthetic source.
        folder: what `prepare_inputs` wrote.

    Raises:
        UserError: the inputs are not there.
    """

    def __init__(self, params: Mapping[str, Any], folder: Path) -> None:
        from safetensors.numpy import load_file

        structure = read_json(folder / STRUCTURE)
        stored = load_file(folder / DICTIONARY)
        self.params = params
        self.features = stored["features"]  # (n_features, d_in)
        self.rates = stored["rates"]
        self.loadings = stored.get("loadings")
        self.hierarchy = _hierarchy(params)
        self.law = params["l0_law"]
        self.most = largest_l0(self.law)
        self.until = math.inf if structure["fires_until"] is None else structure["fires_until"]
        columns: dict[str, Column] = {
            "true_indices": (np.dtype(np.int32), (self.most,)),
            "true_values": (np.dtype(np.float32), (self.most,)),
        }
        super().__init__(int(params["d_in"]), structure["contexts"], columns)

    def context(self, split: str, number: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Activations, true indices and true values of one context."""
        rng = generator(self.params["seed"], SPLITS[split], number)
        asked = sample_l0(self.law, ROWS_PER_CONTEXT, rng)
        times = arrival_times(ROWS_PER_CONTEXT, self.rates, self.loadings, rng)
        if self.hierarchy is not None:
            self.hierarchy.delay(times)
        indices = first_arrivals(times, asked, self.most, self.until)
        fires = indices >= 0
        values = coefficients(self.params["coefficient"], indices.shape, rng) * fires
        counts = fires.sum(axis=1)
        noise = rng.standard_normal((ROWS_PER_CONTEXT, self.features.shape[1]), dtype=np.float32)
        x = sums(counts, indices[fires], values[fires], self.features)
        x = x + np.float32(self.params["noise_std"]) * noise
        if (law := self.params.get("row_norm")) is not None:
            factor = norm_factors(law, x, counts, rng)[:, None]
            x, values = x * factor, values * factor
        return x, {"true_indices": indices, "true_values": values}

    def counts(self, split: str, number: int) -> np.ndarray:
        """(ROWS_PER_CONTEXT,) active features of the rows of one context."""
        counts: np.ndarray = (self.context(split, number)[1]["true_indices"] >= 0).sum(1)
        return counts


class SyntheticInputs(DrawnInputs):
    """The true dictionary, of unit rows, and the counts of true features."""

    def source(self) -> SyntheticSource:
        """The samples of the dictionary."""
        return SyntheticSource(self.params, self.folder)


KIND = SourceKind(
    check=check,
    external_inputs=external_inputs,
    prepare_inputs=prepare_inputs,
    open=open_source,
    inputs=SyntheticInputs,
    rows_per_context=lambda params: ROWS_PER_CONTEXT,
    has_true_counts=lambda params: True,
    has_true_dictionary=True,
)
