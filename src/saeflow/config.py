"""`params.yaml`: read, refuse what is wrong before any job, expand sweeps into runs and keys.

This module imports no model code: Snakefile and command line read it in a fraction of a second.
"""

import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from saeflow.errors import UserError
from saeflow.figure_needs import check_figures
from saeflow.files import json_digest
from saeflow.local_files import content_digests
from saeflow.options import with_options
from saeflow.plugins import module_file
from saeflow.schema import ROOT, conform, listed

PACKAGE = Path(__file__).parent
SPLITS = ("train", "evaluation")
RESERVED = {"baselines", "clean", "dimension", "identity", "mean", "on", "pca"}
"""Names that the evaluation gives to its own rows and folders."""


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


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which YAML would silently let the last one win."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    own: set[Any] = set()  # keys that are written here; one that `<<` brings along may be replaced
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise UserError(
                f"line {line}: expected text as a name, found {key!r}. Put it in quotes."
            )
        if key in own:
            raise UserError(f"line {line}: the name {key!r} is given twice. Rename or delete one.")
        own.add(key)
    loader.flatten_mapping(node)
    return {
        loader.construct_object(key, deep=True): loader.construct_object(value, deep=True)
        for key, value in node.value
    }


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    """A whole number, unless YAML 1.1 reads another one than is written: 010 as 8, 1:30 as 90."""
    if re.fullmatch(r"[-+]?(0[0-9_]+|[0-9_]+(:[0-9_]+)+)", node.value):
        raise UserError(
            f"line {node.start_mark.line + 1}: expected a number, found {node.value}, which YAML 1.1 reads as "
            f"{loader.construct_yaml_int(node)}. Write the number itself."
        )
    return int(loader.construct_yaml_int(node))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def read_yaml(path: Path) -> Any:
    """Read a YAML file, with one line for what is wrong with it."""
    try:
        with path.open(encoding="utf-8") as file:
            return yaml.load(file, Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Give the path of a parameter file.") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # also a date or text that is none
        text = " ".join(str(error).split())
        raise UserError(f"{path}: expected YAML, found: {text}") from None


def load_params(path: Path) -> dict[str, Any]:
    """Read and validate a parameter file.

    Raises:
        UserError: the first thing that is wrong, in one line.
    """
    params = read_yaml(path)
    try:
        return validate(params)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def check_params(params: Any, files: Iterable[Path | str]) -> dict[str, Any]:
    """Check parameters that came from some files, perhaps with values from a command line on top.

    Returns:
        The parameters as `validate` gives them.

    Raises:
        UserError: the first thing that is wrong, in one line.
    """
    names = ", ".join(str(path) for path in files)
    for path in files:
        read_yaml(Path(path))  # says what YAML itself would pass over, such as a name given twice
    try:
        return validate(params)
    except UserError as error:
        raise UserError(f"{names}: {error}") from None


def validate(params: Any) -> dict[str, Any]:
    """Check params against the schema, and what a schema cannot say.

    Returns:
        The parameters with presets put in and each number in its one form (see `conform`).

    Raises:
        UserError: the first thing that is wrong, in one line.
    """
    params = conform(with_options(params))
    for name in params["sources"]:
        if name in ("interpretability", "latents", "stability"):
            raise UserError(
                f"sources: the name {name} is a folder of the evaluation's. Choose another."
            )
        if name not in params["stores"]:
            raise UserError(f"stores: expected an entry for source {name!r}, found none. Add it.")
    for name, store in params["stores"].items():
        if name not in params["sources"]:
            raise UserError(f"stores.{name}: no such source. Known: {listed(params['sources'])}.")
        if store["shard_rows"] % store["chunk_rows"]:
            raise UserError(
                f"stores.{name}.shard_rows: expected a multiple of chunk_rows "
                f"({store['chunk_rows']}), found {store['shard_rows']}."
            )
    for name, source in params["sources"].items():
        _check_source(name, source)
        if "forward_batch" in source:
            batch, block = source["forward_batch"], params["stores"][name]["block_contexts"]
            if block % batch:
                raise UserError(
                    f"stores.{name}.block_contexts: expected a multiple of the source's "
                    f"forward_batch ({batch}), found {block}."
                )
    dimension = params["evaluation"]["dimension"]
    for name in dimension["sources"] if dimension else []:
        if name not in params["sources"]:
            raise UserError(
                f"evaluation.dimension.sources: no such source: {name}. Known: {listed(params['sources'])}."
            )
    for name, labelled in params["evaluation"]["labelled_sets"].items():
        if name in RESERVED:
            raise UserError(
                f"evaluation.labelled_sets: the name {name} is a folder of the evaluation's. Choose another."
            )
        for split in ("train", "test"):
            folder = labelled[split].get("folder")
            if folder is not None and not Path(folder).is_dir():
                raise UserError(
                    f"evaluation.labelled_sets.{name}.{split}.folder: no such folder: {folder}. Mend the path."
                )
    if taken := RESERVED & set(params["saes"]):
        raise UserError(f"saes: the name {listed(taken)} is a baseline's. Choose another.")
    runs = expand_runs(params)
    guides = {run.name: run.guide for run in runs}
    for run in runs:
        _check_run(run, params)
        if run.guide is not None and guides.get(run.guide, "another's") is not None:
            raise UserError(
                f"saes.{run.entry}.options.k.mean_l0_of: expected ENTRY/LABEL of a run of {run.source}/"
                f"{run.hook_point} that has its own k, found {run.guide.split('/', 2)[2]}. Mend it."
            )
    stores = _stores(params)
    for taken_over in imports(params):
        where = f"saes.{taken_over.entry}"
        if f"{taken_over.source}/{taken_over.hook_point}" not in stores:
            raise UserError(
                f"{where}.store: no such store: {taken_over.source}/{taken_over.hook_point}. Known: {listed(stores)}."
            )
        if not Path(taken_over.folder).is_dir():
            raise UserError(
                f"{where}.import.folder: no such folder: {taken_over.folder}. Give what {taken_over.library} saved."
            )
    if not runs:
        raise UserError("saes: expected an entry that is trained, found none. Add one.")
    places = {(run.source, run.hook_point) for run in runs}
    places |= {(taken.source, taken.hook_point) for taken in imports(params)}
    probed_at = set()
    for name, scoring in params["complexity"].items():
        for store in scoring.get("probe_at", ()):
            if store not in stores:
                raise UserError(
                    f"complexity.{name}.probe_at: no such store: {store}. Known: {listed(stores)}."
                )
            probed_at.add(store.partition("/")[0])
    _check_on(params, places, probed_at)
    check_figures(params, runs)
    pages = params["evaluation"].get("latents") or {"runs": []}
    known = {run.name for run in runs} | {run.name for run in imports(params)}
    probed = params["evaluation"].get("interpretability") or {"runs": []}
    scorer_file(probed)
    for where, name in [
        *(("latents", name) for name in pages["runs"]),
        *(("interpretability", name) for name in probed["runs"]),
    ]:
        if name not in known:
            raise UserError(
                f"evaluation.{where}.runs: expected the name of a run, SOURCE/HOOK_POINT/ENTRY/LABEL, as below "
                f"results/saes, found {name!r}. Mend it."
            )
    return dict(params)


SCORER = "evaluation.interpretability.detection.scorer"


def scorer_file(interpretability: Mapping[str, Any]) -> Path | None:
    """Where the scorer of evaluation.interpretability is, if it is one of the user's own.

    Raises:
        UserError: there is no such file.
    """
    detection = interpretability.get("detection")
    if detection is None or ":" not in detection["scorer"]:
        return None
    return module_file(detection["scorer"], SCORER)


def _check_source(name: str, source: Mapping[str, Any]) -> None:
    where = f"sources.{name}"
    if "model" in source:
        model = source["model"]
        paths = [(f"{where}.model.{key}", model[key]) for key in ("folder", "gguf") if key in model]
        paths += [(f"{where}.text.files", p) for p in source.get("text", {}).get("files", [])]
        trained = model.get("trained")
        if trained and not trained["batch_size"] <= min(trained["examples"] // 2, trained["pairs"]):
            raise UserError(
                f"{where}.model.trained.batch_size: expected at most half of the examples and all of the pairs "
                f"({trained['examples'] // 2}, {trained['pairs']}), found {trained['batch_size']}."
            )
        if "folder" in source.get("images", {}):
            paths.append((f"{where}.images.folder", source["images"]["folder"]))
        for key, path in paths:
            if not Path(path).exists():
                raise UserError(f"{key}: no such file or folder: {path}. Mend the path.")
    for name, scenes in _scenes(source):
        if scenes["smallest"] > scenes["largest"]:
            raise UserError(
                f"{where}.{name}.scenes.smallest: expected at most largest ({scenes['largest']}), found "
                f"{scenes['smallest']}."
            )
    hook_points = source["hook_points"]
    if len(set(hook_points)) < len(hook_points):
        raise UserError(f"{where}.hook_points: one is given twice: {listed(hook_points)}.")


def _check_on(params: Mapping[str, Any], places: set[tuple[str, str]], probed: set[str]) -> None:
    """Check `evaluation.also_on`, and that sources have the splits that are read.

    Args:
        places: (source, hook point) of every SAE.
        probed: sources that probes are fitted on.
    """
    on, own = params["evaluation"].get("also_on", {}), {source for source, _ in places}
    for name, others in on.items():
        where = f"evaluation.also_on.{name}"
        if name not in own:
            raise UserError(
                f"{where}: expected a source that has SAEs ({listed(own)}), found {name}."
            )
        source = params["sources"][name]
        for other in others:
            if other == name or other not in params["sources"]:
                known = listed(set(params["sources"]) - {name})
                raise UserError(f"{where}: expected another source ({known}), found {other}.")
            found = params["sources"][other]
            if "model" not in source or source["model"] != found.get("model"):
                raise UserError(
                    f"{where}: expected a source of the same model as {name}, found {other}, whose rows another "
                    f"model (or none) makes. Give sources.{other} the model of sources.{name}, or take it out."
                )
            points = {hook_point for held, hook_point in places if held == name}
            if lacking := points - set(found["hook_points"]):
                raise UserError(
                    f"{where}: expected a source with the hook points of the SAEs of {name}, found {other} without "
                    f"{listed(lacking)}. Add it to sources.{other}.hook_points."
                )
    for name in sorted(own | probed):
        if params["stores"][name]["train_rows"] < 2:
            raise UserError(
                f"stores.{name}.train_rows: expected 2 or more, as SAEs or probes learn from it, found "
                f"{params['stores'][name]['train_rows']}."
            )
        if params["sources"][name].get("evaluation_share") == 1:
            raise UserError(
                f"sources.{name}.evaluation_share: expected below 1, as SAEs or probes learn from the rest, found 1."
            )
    for name in {other for others in on.values() for other in others} - own - probed:
        if params["stores"][name]["train_rows"]:
            raise UserError(
                f"stores.{name}.train_rows: expected 0, as nothing learns from {name}, found "
                f"{params['stores'][name]['train_rows']}."
            )


def _scenes(source: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where a source asks for generated scenes, and for which."""
    for name, holder in (("images", source.get("images")), ("model", source.get("model"))):
        inside = holder.get("trained", holder) if holder else {}
        if "scenes" in inside:
            yield name, inside["scenes"]


IMPORTED = "imported-"
"""What the label of a run that another library trained starts with."""


def _stores(params: Mapping[str, Any]) -> list[str]:
    """SOURCE/HOOK_POINT of every store."""
    return [f"{name}/{hook}" for name, s in params["sources"].items() for hook in s["hook_points"]]


COUNTS = {"k", "k_schedule", "k_min", "k_max", "target_l0", "target_schedule"}
"""Options that count latents."""


def _check_run(run: SAEConfig, params: Mapping[str, Any]) -> None:
    where = f"saes.{run.entry}"
    source = params["sources"].get(run.source)
    if source is None or run.hook_point not in source["hook_points"]:
        raise UserError(
            f"{where}.store: no such store: {run.source}/{run.hook_point}. Known: {listed(_stores(params))}."
        )
    options = run.options
    for key in COUNTS & set(options):
        for text, k in _numbers(key, options[key]):
            if not 1 <= k <= run.d_sae:
                raise UserError(
                    f"{where}.options.{text}: expected 1..{run.d_sae} (d_sae), found {k}."
                )
    if "k" in options and "k_max" in options:
        k_max, text = options["k_max"], "k_max"
        if isinstance(k_max, Mapping):
            k_max, text = k_max["times_k"] * options["k"], "k_max.times_k"
        if not options["k"] <= k_max <= run.d_sae:
            raise UserError(
                f"{where}.options.{text}: expected a k_max in {options['k']}..{run.d_sae} (k and d_sae), found "
                f"{k_max:g}."
            )
    if "k_min" in options and options["k_min"] > options["k_max"]:
        raise UserError(
            f"{where}.options.k_min: expected at most k_max ({options['k_max']}), found "
            f"{options['k_min']}."
        )
    if options.get("form") == "per_context" and source.get("tokens", "cls") != "cls":
        raise UserError(
            f"{where}.options.form: per_context trains on one row a context, of images the CLS token alone; "
            f"{run.source} has tokens: {source['tokens']}. Take per_token or soft, or a source of tokens: cls."
        )
    if options.get("architecture") == "shared" and run.training.input_scale == "centred":
        raise UserError(
            f"{where}.input_scale: centred takes the mean row away, which a saved SAE gives back in its b_dec; "
            "architecture shared has none. Set unit or raw for this entry, or take architecture mlp."
        )
    name = options.get("complexity")
    if name is not None and name not in params["complexity"]:
        raise UserError(
            f"{where}.options.complexity: no such entry: {name}. Known: {listed(params['complexity'])}."
        )


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The k values an option names: itself, or where its schedule starts."""
    if isinstance(value, Mapping):
        if "from" in value:
            yield f"{name}.from", value["from"]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value


def expand_runs(params: Mapping[str, Any]) -> list[SAEConfig]:
    """Every run of every `saes` entry: lists under store, d_sae, seed and options are swept.

    `seeds`, where it is given, takes the place of every entry's own.

    Raises:
        UserError: two runs would have one name.
    """
    runs: dict[str, SAEConfig] = {}
    for entry, values in with_options(params)["saes"].items():
        if "import" in values:
            continue
        shared = {key: params["training"][key] for key in params["training"]}
        training = {key: values.get(key, shared[key]) for key in shared}
        training["betas"] = tuple(training["betas"])
        axes = {key: _aslisted(values[key]) for key in ("store", "d_sae", "seed")}
        axes["seed"] = params["seeds"] or axes["seed"]
        options = {key: _aslisted(value) for key, value in values["options"].items()}
        swept = [key for key, value in values["options"].items() if isinstance(value, list)]
        for store, d_sae, seed, *chosen in itertools.product(*axes.values(), *options.values()):
            picked = dict(zip(options, chosen, strict=True))
            label = "-".join(
                [f"d{d_sae}", *(f"{key}{slug(picked[key])}" for key in swept), f"seed{seed}"]
            )
            source, _, hook_point = store.partition("/")
            name = f"{source}/{hook_point}/{entry}/{label}"
            if name in runs:
                raise UserError(f"saes.{entry}: two runs have one name, {name}. Mend the sweep.")
            runs[name] = SAEConfig(
                name=name,
                entry=entry,
                variant=values["variant"],
                source=source,
                hook_point=hook_point,
                d_sae=d_sae,
                seed=seed,
                options=picked,
                training=TrainingConfig(**training),
                guide=_guide(store, picked.get("k")),
            )
    return list(runs.values())


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


def _aslisted(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def slug(value: Any) -> str:
    """A value as part of a folder's name."""
    if isinstance(value, Mapping):
        return "-".join(f"{key}{slug(part)}" for key, part in value.items())
    return re.sub(r"[^A-Za-z0-9.]+", "-", str(value))


def source_files(folder: Path) -> list[Path]:
    """Python files and page templates below a folder."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".j2"))


@functools.cache
def source_digest(*parts: str) -> str:
    """SHA-256 of the source files of the named modules and subpackages of saeflow."""
    digest = hashlib.sha256()
    for part in parts:
        path = PACKAGE / part
        files = source_files(path) if path.is_dir() else [path.with_suffix(".py")]
        for file in files:
            digest.update(file.relative_to(PACKAGE).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


@functools.cache
def pins_digest(*packages: str) -> str:
    """SHA-256 of the pinned versions of some packages in the lock."""
    lock = ROOT / "requirements.lock"
    text = lock.read_text(encoding="utf-8") if lock.exists() else ""
    pins = dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", text, flags=re.MULTILINE))
    return json_digest({package: pins.get(package) for package in packages})


def job_key(
    rule: str, params: Any, *, code: tuple[str, ...], libraries: tuple[str, ...], after: list[str]
) -> str:
    """The digest that decides whether a job runs again.

    Args:
        rule: its name.
        params: the job's own slice of the parameters; local files that it names count by their content.
        code: subpackages it runs.
        libraries: packages whose pinned version can change its result.
        after: keys of the jobs it builds on.
    """
    parts = [rule, params, source_digest(*code), pins_digest(*libraries), sorted(after)]
    if contents := content_digests(params):
        parts.append(contents)
    return json_digest(parts)[:20]
