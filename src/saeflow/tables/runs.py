"""The identity of runs in tables: their id columns, settings and schedules."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from saeflow.config.variants import variants

BASELINES = ("identity", "mean", "pca")
RANDOM_DECODER = "random-decoder"
"""An entry whose name holds this is a baseline, whatever its variant."""

_LABELS = {
    "relu": "ReLU", "gated": "Gated", "jumprelu": "JumpReLU", "p_anneal": "P-anneal", "topk": "TopK",
    "batch_topk": "BatchTopK", "matryoshka": "Matryoshka", "soft_topk": "SoftSAE", "adaptive_k": "AdaptiveK",
    "sparsemax": "Sparsemax", "entmax": "Entmax", "top_afa": "Top-AFA", "abs_topk": "AbsTopK",
    "matching_pursuit": "Matching pursuit", "feature_choice": "Feature Choice", RANDOM_DECODER: "Random decoder", "pca": "PCA", "mean": "Mean",
    "identity": "Identity",
}  # fmt: skip


def variant_label(variant: str, entry: str = "") -> str:
    """Return the name of a variant or baseline as people write it."""
    name = RANDOM_DECODER if RANDOM_DECODER in entry else variant
    return _LABELS.get(name) or variant.replace("_", " ")


def identify(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the id columns of a trained SAE.

    Args:
        config: its config.json.
    """
    options = config["options"]
    return {
        "run": config["name"],
        "source": config["source"],
        "hook_point": config["hook_point"],
        "entry": config["entry"],
        "variant": config["variant"],
        "schedule": describe_schedule(options),
        "d_sae": config["d_sae"],
        "k": options.get("k"),
        "seed": config["seed"],
        "tokens": config["training"]["tokens"],
    }


def describe_schedule(options: Mapping[str, Any]) -> str:
    """Return `constant`, or the schedule among the options, such as `linear 576 until 0.01`."""
    schedules = [options[key] for key in sorted(options) if key.endswith("_schedule")]
    changing = [schedule for schedule in schedules if schedule and schedule["kind"] != "constant"]
    return " + ".join(_describe(schedule) for schedule in changing) or "constant"


def _describe(schedule: Mapping[str, Any]) -> str:
    steps = f" in {schedule['steps']} steps" if "steps" in schedule else ""
    return f"{schedule['kind']} {schedule['from']:g} until {schedule['until']:g}{steps}"


def setting_of(run: str) -> str:
    """Return a run's name without its place and its seed: runs of one setting differ in the seed only."""
    return re.sub(r"-?seed\d+$", "", run.rsplit("/", 1)[-1])


@functools.cache
def _swept() -> re.Pattern[str]:
    """An option of any variant as settings name it, with the start of its value; its _ is a - in the name of another run."""
    names = {field.name for options in variants().values() for field in dataclasses.fields(options)}
    names.add("trial")  # of a sweep
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return re.compile(
        rf"(?:^|-)({'|'.join(re.escape(name).replace('_', '[-_]') for name in longest_first)})(?=[\d.])"
    )


_WRITTEN = {"target_l0": "target L0"}
"""Options that people write otherwise."""


def settings_words(settings: Sequence[str]) -> list[str]:
    """Return settings of one table as people write them, with their numbers of latents where these differ."""
    found = [re.match(r"d(\d+)", setting) for setting in settings]
    sizes = [int(size[1]) if size else None for size in found]
    differ = len(set(sizes)) > 1
    return [
        sized_words(setting, size if differ else None)
        for size, setting in zip(sizes, settings, strict=True)
    ]


def sized_words(setting: str, d_sae: int | None) -> str:
    """Return a setting as people write it, after its number of latents unless that is None."""
    size = "" if d_sae is None else f"{d_sae:,} latents"
    return ", ".join(filter(None, (size, setting_words(setting))))


_GUIDED = re.compile(r"(?:^|-)k-of-(?P<entry>.+?)-(?P<label>d\d+(?:-.*)?)-seed\d+$")
"""A k that is the mean L0 of another run, as `saeflow.config.runs` names it."""


def setting_words(setting: str) -> str:
    """Return a setting as people write it, without its number of latents: d1536-target_l016 is target L0 = 16.

    A k that another SAE found names that SAE's entry: d1536-k-of-soft-topk-d1536-k32-seed0 is k = L0 of soft-topk, k = 32.
    """
    rest = re.sub(r"^d\d+-?", "", setting)
    if guided := _GUIDED.search(rest):
        own = rest[: guided.start()]
        of = ", ".join(filter(None, (guided["entry"], setting_words(guided["label"]))))
        return ", ".join(filter(None, (setting_words(own), f"k = L0 of {of}")))
    words = _swept().sub(lambda found: f", {_written(found[1])} = ", rest)
    return words.removeprefix(", ")


def _written(option: str) -> str:
    """Return an option's name as people write it."""
    name = option.replace("-", "_")
    return _WRITTEN.get(name, name)


def measurement(row: Mapping[Any, Any]) -> str:
    """Return the name of a measurement: the run's, with the source where that is not its own."""
    own = row["evaluated_on"] == row["source"]
    return str(row["run"]) if own else f"{row['run']} on {row['evaluated_on']}"


def is_baseline(row: Mapping[Any, Any]) -> bool:
    """Tell whether a row is of a baseline that needs no training."""
    return row["variant"] in BASELINES


def with_target(ids: Mapping[str, Any]) -> dict[str, Any]:
    """Return id columns for a table that has a k of its own: the target k is `k_target`."""
    return {"k_target" if name == "k" else name: value for name, value in ids.items()}
