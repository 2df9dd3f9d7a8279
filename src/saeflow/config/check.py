"""Check parameters before any job: the schema, and what a schema cannot say."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from saeflow.config.options import with_options
from saeflow.config.runs import SAEConfig, expand_runs, imports
from saeflow.config.schema import conform, listed
from saeflow.config.yaml_file import read_yaml
from saeflow.errors import UserError
from saeflow.figure_needs import check_figures
from saeflow.plugins import module_file

RESERVED = {"baselines", "clean", "dimension", "identity", "mean", "on", "pca"}
"""Names that the evaluation gives to its own rows and folders."""


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
