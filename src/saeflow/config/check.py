"""Check parameters before any job: the schema, and what a schema cannot say."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from saeflow.config.blocks import written_out
from saeflow.config.explain import listed
from saeflow.config.runs import ImportConfig, SAEConfig, expand_runs, imports
from saeflow.config.schema import conform
from saeflow.config.sweep import problems
from saeflow.config.variants import variants, with_options
from saeflow.config.yaml_file import read_yaml
from saeflow.errors import UserError
from saeflow.plugins import module_file

RESERVED = {"baselines", "clean", "dimension", "identity", "mean", "on", "pca"}
"""Names that the evaluation gives to its own rows and folders."""
_FOLDERS = ("interpretability", "latents", "rivals", "stability", "sweeps")
"""Folders of the evaluation that lie beside those of sources."""


def load_params(path: Path) -> dict[str, Any]:
    """Read and validate a parameter file.

    Raises:
        UserError: all that is wrong, a line each.
    """
    params = read_yaml(path)
    try:
        return validate(params)
    except UserError as error:
        raise error.within(path) from None


def check_params(params: Any, files: Iterable[Path | str]) -> dict[str, Any]:
    """Check parameters that came from some files, perhaps with values from a command line on top.

    Returns:
        The parameters as `validate` gives them.

    Raises:
        UserError: all that is wrong, a line each.
    """
    names = ", ".join(str(path) for path in files)
    for path in files:
        read_yaml(Path(path))  # says what YAML itself would pass over, such as a name given twice
    try:
        return validate(params)
    except UserError as error:
        raise error.within(names) from None


def validate(params: Any) -> dict[str, Any]:
    """Check params against the schema, and what a schema cannot say.

    Returns:
        The parameters with presets and defaults put in and each number in its one form (see `conform`).

    Raises:
        UserError: all that is wrong, a line each. What a mistake makes pointless to check is left out.
    """
    params, found = conform(with_options(written_out(params)))
    for check in (
        _check_names,
        _check_sources,
        problems,
        _check_runs,
        _check_measured,
        _check_shown,
    ):
        if found:
            raise UserError(*dict.fromkeys(found))
        found = list(check(params))
    if found:
        raise UserError(*dict.fromkeys(found))
    return dict(params)


def _check_names(params: Mapping[str, Any]) -> Iterator[str]:
    """Names that are taken, and sources without stores or the other way round."""
    for name in params["sources"]:
        if name in _FOLDERS:
            yield f"sources: the name {name} is a folder of the evaluation's. Choose another."
        if name not in params["stores"]:
            yield f"stores: expected an entry for source {name!r}, found none. Add it."
    for name in params["stores"]:
        if name not in params["sources"]:
            yield f"stores.{name}: no such source. Known: {listed(params['sources'])}."
    for name in sorted(RESERVED & set(params["evaluation"]["labelled_sets"])):
        yield f"evaluation.labelled_sets: the name {name} is a folder of the evaluation's. Choose another."
    if taken := RESERVED & set(params["saes"]):
        yield f"saes: the name {listed(taken)} is a baseline's. Choose another."


def _check_sources(params: Mapping[str, Any]) -> Iterator[str]:
    """Sources and stores, each by itself, and what of `evaluation` names them."""
    for name, store in params["stores"].items():
        if store["shard_rows"] % store["chunk_rows"]:
            yield (
                f"stores.{name}.shard_rows: expected a multiple of chunk_rows "
                f"({store['chunk_rows']}), found {store['shard_rows']}."
            )
    for name, source in params["sources"].items():
        yield from _check_source(name, source)
        if "forward_batch" in source:
            batch, block = source["forward_batch"], params["stores"][name]["block_contexts"]
            if block % batch:
                yield (
                    f"stores.{name}.block_contexts: expected a multiple of the source's "
                    f"forward_batch ({batch}), found {block}."
                )
    dimension = params["evaluation"]["dimension"]
    for name in dimension["sources"] if dimension else []:
        if name not in params["sources"]:
            yield (
                f"evaluation.dimension.sources: no such source: {name}. Known: {listed(params['sources'])}."
            )
    for name, labelled in params["evaluation"]["labelled_sets"].items():
        for split in ("train", "test"):
            folder = labelled[split].get("folder")
            if folder is not None and not Path(folder).is_dir():
                yield (
                    f"evaluation.labelled_sets.{name}.{split}.folder: no such folder: {folder}. Fix the path."
                )


def _check_runs(params: Mapping[str, Any]) -> Iterator[str]:
    """Every run that is trained, and every SAE that is taken over."""
    try:
        runs = expand_runs(params)
    except UserError as error:
        yield str(error)
        return
    guides = {run.name: run.guide for run in runs}
    for run in runs:
        yield from _check_run(run, params)
        if run.guide is not None and guides.get(run.guide, "another's") is not None:
            yield (
                f"saes.{run.entry}.options.k.mean_l0_of: expected ENTRY/LABEL of a run of {run.source}/"
                f"{run.hook_point} that has its own k, found {run.guide.split('/', 2)[2]}. Fix it."
            )
    stores = _stores(params)
    for one in imports(params):
        where = f"saes.{one.entry}"
        if one.store not in stores:
            yield f"{where}.store: no such store: {one.store}. Known: {listed(stores)}."
        if not Path(one.folder).is_dir():
            yield (
                f"{where}.import.folder: no such folder: {one.folder}. Give what {one.library} saved."
            )
    for name, scoring in params["complexity"].items():
        for store in scoring.get("probe_at", ()):
            if store not in stores:
                yield f"complexity.{name}.probe_at: no such store: {store}. Known: {listed(stores)}."


def _check_measured(params: Mapping[str, Any]) -> Iterator[str]:
    """The splits that are read, and the sources on which SAEs are measured."""
    saes: list[SAEConfig | ImportConfig] = [*expand_runs(params), *imports(params)]
    probed_at = {
        store.partition("/")[0]
        for scoring in params["complexity"].values()
        for store in scoring.get("probe_at", ())
    }
    yield from _check_on(params, {(sae.source, sae.hook_point) for sae in saes}, probed_at)


def _check_shown(params: Mapping[str, Any]) -> Iterator[str]:
    """The runs whose latents are shown or probed."""
    runs, evaluation = expand_runs(params), params["evaluation"]
    probed = evaluation.get("interpretability") or {"runs": []}
    try:
        scorer_file(probed)
    except UserError as error:
        yield str(error)
    detection = probed.get("detection") or {"scorer": "tokens", "judge": None}
    if (detection["scorer"] == "judge") != (detection["judge"] is not None):
        yield (
            f"{SCORER}: expected judge where evaluation.interpretability.detection.judge is given, and only there, found "
            f"{detection['scorer']!r}. Give both or neither."
        )
    pages = evaluation.get("latents") or {"runs": []}
    known = {run.name for run in runs} | {one.name for one in imports(params)}
    for where, name in [
        *(("latents", name) for name in pages["runs"]),
        *(("interpretability", name) for name in probed["runs"]),
    ]:
        if name not in known:
            yield (
                f"evaluation.{where}.runs: expected the name of a run, SOURCE/HOOK_POINT/ENTRY/LABEL, as below "
                f"results/saes, found {name!r}. Fix it."
            )


SCORER = "evaluation.interpretability.detection.scorer"


def scorer_file(interpretability: Mapping[str, Any]) -> Path | None:
    """Return the file of the scorer of evaluation.interpretability, if it is one of the user's own.

    Raises:
        UserError: there is no such file.
    """
    detection = interpretability.get("detection")
    if detection is None or ":" not in detection["scorer"]:
        return None
    return module_file(detection["scorer"], SCORER)


def _check_source(name: str, source: Mapping[str, Any]) -> Iterator[str]:
    where = f"sources.{name}"
    if "model" in source:
        model = source["model"]
        paths = [(f"{where}.model.{key}", model[key]) for key in ("folder", "gguf") if key in model]
        paths += [(f"{where}.text.files", p) for p in source.get("text", {}).get("files", [])]
        trained = model.get("trained")
        if trained and not trained["batch_size"] <= min(trained["examples"] // 2, trained["pairs"]):
            yield (
                f"{where}.model.trained.batch_size: expected at most half of the examples and all of the pairs "
                f"({trained['examples'] // 2}, {trained['pairs']}), found {trained['batch_size']}."
            )
        if "folder" in source.get("images", {}):
            paths.append((f"{where}.images.folder", source["images"]["folder"]))
        for key, path in paths:
            if not Path(path).exists():
                yield (f"{key}: no such file or folder: {path}. Fix the path.")
    for name, scenes in _scenes(source):
        if scenes["smallest"] > scenes["largest"]:
            yield (
                f"{where}.{name}.scenes.smallest: expected at most largest ({scenes['largest']}), found "
                f"{scenes['smallest']}."
            )
    hook_points = source["hook_points"]
    if len(set(hook_points)) < len(hook_points):
        yield (f"{where}.hook_points: one is given twice: {listed(hook_points)}.")


def _check_on(
    params: Mapping[str, Any], places: set[tuple[str, str]], probed: set[str]
) -> Iterator[str]:
    """Check `evaluation.also_on`, and that sources have the splits that are read.

    Args:
        places: (source, hook point) of every SAE.
        probed: sources that probes are fitted on.
    """
    on, own = params["evaluation"].get("also_on", {}), {source for source, _ in places}
    for name, others in on.items():
        where = f"evaluation.also_on.{name}"
        if name not in own:
            yield (f"{where}: expected a source that has SAEs ({listed(own)}), found {name}.")
            continue
        source = params["sources"][name]
        for other in others:
            if other == name or other not in params["sources"]:
                known = listed(set(params["sources"]) - {name})
                yield f"{where}: expected another source ({known}), found {other}."
                continue
            found = params["sources"][other]
            if "model" not in source or source["model"] != found.get("model"):
                yield (
                    f"{where}: expected a source of the same model as {name}, found {other}, whose rows another "
                    f"model (or none) makes. Give sources.{other} the model of sources.{name}, or take it out."
                )
            points = {hook_point for held, hook_point in places if held == name}
            if lacking := points - set(found["hook_points"]):
                yield (
                    f"{where}: expected a source with the hook points of the SAEs of {name}, found {other} without "
                    f"{listed(lacking)}. Add it to sources.{other}.hook_points."
                )
    for name in sorted(own | probed):
        if params["stores"][name]["train_rows"] < 2:
            yield (
                f"stores.{name}.train_rows: expected 2 or more, which SAEs, probes and the baselines (PCA, the mean) are "
                f"made of, found {params['stores'][name]['train_rows']}. Raise it."
            )
        if params["sources"][name].get("evaluation_share") == 1:
            yield (
                f"sources.{name}.evaluation_share: expected below 1, as SAEs or probes learn from the rest, found 1."
            )
    only_evaluated = {other for others in on.values() for other in others} - own - probed
    for name in sorted(only_evaluated & set(params["stores"])):
        if params["stores"][name]["train_rows"]:
            yield (
                f"stores.{name}.train_rows: expected 0, as nothing learns from {name}, found "
                f"{params['stores'][name]['train_rows']}."
            )


def _scenes(source: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each place where a source asks for generated scenes, with the scenes."""
    for name, holder in (("images", source.get("images")), ("model", source.get("model"))):
        inside = holder.get("trained", holder) if holder else {}
        if "scenes" in inside:
            yield name, inside["scenes"]


def _stores(params: Mapping[str, Any]) -> list[str]:
    """SOURCE/HOOK_POINT of every store."""
    return [f"{name}/{hook}" for name, s in params["sources"].items() for hook in s["hook_points"]]


def _check_run(run: SAEConfig, params: Mapping[str, Any]) -> Iterator[str]:
    where = f"saes.{run.entry}"
    source = params["sources"].get(run.source, {})
    if run.hook_point not in source.get("hook_points", ()):
        yield (
            f"{where}.store: no such store: {run.source}/{run.hook_point}. Known: {listed(_stores(params))}."
        )
    options = variants()[run.variant].of(run.options)
    for problem in options.problems(run.d_sae):
        yield f"{where}.options.{problem}"
    for problem in options.misfits(source, run.training.input_scale):
        yield f"{where}.{problem}"
    name = run.options.get("complexity")
    if name is not None and name not in params["complexity"]:
        yield (
            f"{where}.options.complexity: no such entry: {name}. Known: {listed(params['complexity'])}."
        )
