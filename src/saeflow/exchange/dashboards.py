"""Latents of an SAE in the formats of SAEDashboard and Neuronpedia, from the page of latent cards that a run made.

Written are `batch-N.json`, as SAEDashboard 0.8.0 writes its batches (`NeuronpediaDashboardBatch`), and `features-N.json`, lists of
what Neuronpedia's client 1.2.1 uploads (`Feature`, with its `Logit`s and `Activation`s). What a page does not hold stays empty:
correlated neurons and latents, and the histogram of logits.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from saeflow.errors import UserError
from saeflow.evaluation.latents import BINS, LATENTS, LOWEST
from saeflow.files import atomic_file
from saeflow.provenance import read_record
from saeflow.saes.files import load, read_config

_AT_ONCE = 128
"""Latents of a file: as many as Neuronpedia takes in a request, and SAEDashboard's default."""
_ALIGNED = 3
"""Entries of the decoder row that SAEDashboard shows as aligned neurons."""


def write(page: Path, library: str, folder: Path) -> None:
    """Write all latents of a page into an existing folder.

    Values of an example are in steps of 1/255 of the latent's maximum, as the page holds them; the strongest one is exact.

    Args:
        page: the folder that `saeflow latents` made, results/evaluations/latents/RUN, below the working directory of its run.
        library: sae_dashboard or neuronpedia.
        folder: gets the files.

    Raises:
        UserError: it is another folder, its images have no tokens, or its hook point is no block's.
    """
    from safetensors.numpy import load_file

    record = read_record(page)
    if record["job"] != "latents":
        raise UserError(
            f"{page}: expected a page of latent cards (evaluation.latents, results/evaluations/latents/RUN), found what "
            f"`saeflow {record['job']}` made. Give such a page."
        )
    made_from = {read_record(Path(path))["job"]: Path(path) for path in record["inputs"]}
    sae_folder = made_from.get("train") or made_from["import"]
    config, sae = read_config(sae_folder), load(sae_folder)
    block = re.fullmatch(r"blocks\.(\d+)\..+", config["hook_point"])
    arrays = load_file(page / LATENTS)
    if "token" not in arrays:
        raise UserError(
            f"{page}: expected latents of text, found those of images. Give another page."
        )
    if block is None:
        raise UserError(
            f"{page}: expected a hook point of a block, which these formats number, found {config['hook_point']}."
        )
    read = np.load(made_from["prepare"] / "evaluation.npy", mmap_mode="r").shape
    place = {
        "model": config["source"], "layer": int(block[1]), "set": config["entry"], "contexts": read[0], "length": read[1],
        "text": ", ".join(read_record(made_from["prepare"])["external"]),
    }  # fmt: skip
    described = _described(arrays, sae, _strings(made_from["fetch"]))
    form = _batch if library == "sae_dashboard" else _features
    name = "batch" if library == "sae_dashboard" else "features"
    held: list[dict[str, Any]] = []
    number = 0
    for one in described:
        held.append(one)
        if len(held) == _AT_ONCE or one["index"] == len(arrays["fired"]) - 1:
            with atomic_file(folder / f"{name}-{number}.json") as staged:
                staged.write_text(json.dumps(form(held, place), allow_nan=False), encoding="utf-8")
            held, number = [], number + 1


def _strings(model: Path) -> Callable[[int], str]:
    """Return the text of a token, special ones with their names."""
    from saeflow.sources.models import load_tokenizer
    from saeflow.sources.tokenizers import token_texts

    tokenizer = load_tokenizer(model)
    inside = token_texts(tokenizer)
    return lambda token: inside(token) or str(tokenizer.decode([token]))


def _described(
    arrays: dict[str, np.ndarray], sae: Any, text: Callable[[int], str]
) -> Iterator[dict[str, Any]]:
    """Describe each latent, in words that no format is bound to."""
    directions = sae.directions().detach().float().numpy()
    edges = 2.0 ** (LOWEST + np.arange(BINS + 1) / 2)
    middles = np.sqrt(edges[1:] * edges[:-1])
    for index in range(len(arrays["fired"])):
        row = directions[index]
        aligned = np.argsort(-row)[:_ALIGNED]
        counts = arrays["histogram"][index]
        there = np.flatnonzero(counts)
        yield {
            "index": index,
            "density": float(arrays["fired"][index] / int(arrays["rows"][0])),
            "aligned": aligned.tolist(),
            "aligned_values": row[aligned].tolist(),
            "aligned_l1": (np.abs(row[aligned]) / max(np.abs(row).sum(), 1e-30)).tolist(),
            "bars": middles[there].tolist(),
            "heights": counts[there].tolist(),
            "logits": {
                way: [
                    (text(int(token)), float(value))
                    for token, value in zip(arrays[way][index], arrays[f"{way}_by"][index], strict=True)
                ]
                for way in ("raised", "lowered")
                if way in arrays
            },
            "examples": list(_examples(arrays, index, text)),
        }  # fmt: skip


def _examples(
    arrays: dict[str, np.ndarray], index: int, text: Callable[[int], str]
) -> Iterator[dict[str, Any]]:
    """Examples of a latent, the strongest first; tokens beyond the ends of a context are left out."""
    maximum = float(arrays["maximum"][index])
    for example, value in enumerate(arrays["value"][index]):
        tokens, shades = arrays["token"][index, example], arrays["shades"][index, example]
        if arrays["context"][index, example] < 0:
            return
        values = shades.astype(float) / 255 * maximum
        strongest = int(np.abs(values - float(value)).argmin())
        values[strongest] = float(value)
        inside = tokens >= 0
        yield {
            "tokens": [text(int(token)) for token in tokens[inside]],
            "values": values[inside].tolist(),
            "strongest": int(inside[:strongest].sum()),
            "value": float(value),
        }


def _batch(latents: list[dict[str, Any]], place: dict[str, Any]) -> dict[str, Any]:
    """Return latents as a NeuronpediaDashboardBatch of SAEDashboard."""
    empty: dict[str, list[float]] = {
        name: []
        for name in (
            "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices",
            "correlated_features_l1", "correlated_features_pearson", "logits_hist_data_bar_heights",
            "logits_hist_data_bar_values", "decoder_weights_dist", "vector",
        )
    }  # fmt: skip
    features = []
    for one in latents:
        words = {way: one["logits"].get(way, []) for way in ("raised", "lowered")}
        top = max((example["value"] for example in one["examples"]), default=0.0)
        features.append(
            {
                "feature_index": one["index"],
                "neuron_alignment_indices": one["aligned"],
                "neuron_alignment_values": one["aligned_values"],
                "neuron_alignment_l1": one["aligned_l1"],
                **empty,
                "pos_str": [token for token, _ in words["raised"]],
                "pos_values": [value for _, value in words["raised"]],
                "neg_str": [token for token, _ in words["lowered"]],
                "neg_values": [value for _, value in words["lowered"]],
                "frac_nonzero": one["density"],
                "freq_hist_data_bar_values": one["bars"],
                "freq_hist_data_bar_heights": one["heights"],
                "n_prompts_total": place["contexts"],
                "n_tokens_in_prompt": place["length"],
                "dataset": place["text"],
                "activations": [
                    {
                        "bin_min": -1, "bin_max": top, "bin_contains": -1,  # as SAEDashboard's "top activations"
                        "tokens": example["tokens"], "values": example["values"],
                        "qualifying_token_index": example["strongest"],
                    }
                    for example in one["examples"]
                ],
            }
        )  # fmt: skip
    return {
        "model_id": place["model"], "layer": place["layer"], "sae_set": place["set"], "sae_id_suffix": None,
        "features": features,
    }  # fmt: skip


def _features(latents: list[dict[str, Any]], place: dict[str, Any]) -> list[dict[str, Any]]:
    """Return latents as Features of Neuronpedia's client; a source there is LAYER-SET."""
    source = {"modelId": place["model"], "source": f"{place['layer']}-{place['set']}"}
    return [
        {
            **source,
            "index": one["index"],
            "density": one["density"],
            **{
                name: [{"token": token, "value": value} for token, value in one["logits"][way]] if way in one["logits"] else None
                for name, way in (("top_logits", "raised"), ("bottom_logits", "lowered"))
            },
            "explanations": None,
            "activations": [
                {**source, "index": one["index"], "tokens": example["tokens"], "values": example["values"]}
                for example in one["examples"]
            ],
        }
        for one in latents
    ]  # fmt: skip
