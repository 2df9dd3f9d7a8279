"""Expand the entries of `saes` into runs: one SAE, one seed each."""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saeflow.config.explain import as_list
from saeflow.config.sweep import trials
from saeflow.config.variants import with_options
from saeflow.errors import UserError

SPLITS = ("train", "evaluation")
IMPORTED = "imported-"
"""Start of the label of a run that another library trained."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Optimiser and budget of one run; `training` in params.yaml describes each field."""

    tokens: int
    batch_size: int
    input_scale: str
    lr: float | str
    betas: tuple[float, float]
    lr_warmup_steps: int
    lr_decay_fraction: float
    grad_clip: float | None
    dead_after_tokens: int
    train_decoder: bool
    log_every_steps: int

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return max(1, self.tokens // self.batch_size)


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """One run of a sweep: one SAE, one seed.

    `guide` is the run whose mean L0 becomes k, where options.k is `{mean_l0_of: ENTRY/LABEL}`.
    """

    name: str
    entry: str
    variant: str
    source: str
    hook_point: str
    d_sae: int
    seed: int
    options: Mapping[str, Any]
    training: TrainingConfig
    guide: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Keys of `training` and options of the variant, each with its value."""
        return {**vars(self.training), **self.options}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SAEConfig":
        """Read back what `dataclasses.asdict` wrote."""
        training = dict(values["training"])
        training["betas"] = tuple(training["betas"])
        return cls(**{**values, "training": TrainingConfig(**training)})


@dataclass(frozen=True)
class ImportConfig:
    """An SAE of another library, taken from where it lies."""

    name: str
    entry: str
    source: str
    hook_point: str
    library: str
    folder: str

    @property
    def store(self) -> str:
        """SOURCE/HOOK_POINT of the activations it is evaluated on."""
        return f"{self.source}/{self.hook_point}"


def expand_runs(params: Mapping[str, Any]) -> list[SAEConfig]:
    """Every run of every `saes` entry: lists under store, d_sae, seed and options are swept, and each trial is a run.

    `seeds`, where it is given, takes the place of every entry's own.

    Raises:
        UserError: two runs would have one name, or there are more than MOST_RUNS.
    """
    runs: dict[str, SAEConfig] = {}
    trained = {k: v for k, v in with_options(params)["saes"].items() if "import" not in v}
    _check_number(trained, params)
    for entry, values in trained.items():
        shared = {key: params["training"][key] for key in params["training"]}
        training = {key: values.get(key, shared[key]) for key in shared}
        training["betas"] = tuple(training["betas"])
        axes = {key: as_list(values[key]) for key in ("store", "d_sae", "seed")}
        axes["seed"] = params["seeds"] or axes["seed"]
        options = {key: as_list(value) for key, value in values["options"].items()}
        swept = [key for key, value in values["options"].items() if isinstance(value, list)]
        tried = trials(params["sweep"], entry, values)
        for store, d_sae, seed, (trial, drawn), *chosen in itertools.product(
            *axes.values(), tried, *options.values()
        ):
            picked = dict(zip(options, chosen, strict=True))
            settings = [f"{key}{slug(picked[key])}" for key in swept]
            settings += [] if trial is None else [f"trial{trial}"]
            label = "-".join([f"d{d_sae}", *settings, f"seed{seed}"])
            picked |= {key: value for key, value in drawn.items() if key in picked}
            source, _, hook_point = store.partition("/")
            name = f"{source}/{hook_point}/{entry}/{label}"
            if name in runs:
                raise UserError(f"saes.{entry}: two runs have one name, {name}. Fix the sweep.")
            runs[name] = SAEConfig(
                name=name,
                entry=entry,
                variant=values["variant"],
                source=source,
                hook_point=hook_point,
                d_sae=d_sae,
                seed=seed,
                options=picked,
                training=TrainingConfig(**{key: drawn.get(key, training[key]) for key in training}),
                guide=_guide(store, picked.get("k")),
            )
    return list(runs.values())


MOST_RUNS = 20_000
"""SAEs of one parameter file: with more, Snakemake would plan for hours before the first job."""


def _check_number(entries: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Refuse sweeps of more SAEs than can be planned, before they are expanded."""
    counts = {}
    for entry, values in entries.items():
        axes = [values["store"], values["d_sae"], params["seeds"] or values["seed"]]
        axes += values["options"].values()
        tried = params["sweep"]["trials"] if "ranges" in values else 1
        counts[entry] = tried * math.prod(len(as_list(axis)) for axis in axes)
    if (total := sum(counts.values())) > MOST_RUNS:
        entry = max(counts, key=lambda name: counts[name])
        raise UserError(
            f"saes: expected at most {MOST_RUNS:,} SAEs, found {total:,}, most of them the {counts[entry]:,} of "
            f"saes.{entry}. Shorten its lists, lower sweep.trials, or divide the sweep among several parameter files."
        )


def imports(params: Mapping[str, Any]) -> list[ImportConfig]:
    """The entries of `saes` that are taken from other libraries."""
    found = []
    for entry, values in params["saes"].items():
        if "import" in values:
            store, chosen = values["store"], values["import"]
            source, _, hook_point = store.partition("/")
            name = f"{store}/{entry}/{IMPORTED}{chosen['library']}"
            found.append(ImportConfig(name, entry, source, hook_point, **chosen))
    return found


def _guide(store: str, k: Any) -> str | None:
    """The run that k is taken from, of the same store."""
    return f"{store}/{k['mean_l0_of']}" if isinstance(k, Mapping) else None


def slug(value: Any) -> str:
    """A value as part of a folder's name."""
    if isinstance(value, Mapping) and "mean_l0_of" in value:
        return f"-of-{slug(value['mean_l0_of'])}"
    if isinstance(value, Mapping):
        return "-".join(f"{key}{slug(part)}" for key, part in value.items())
    return re.sub(r"[^A-Za-z0-9.]+", "-", str(value))
