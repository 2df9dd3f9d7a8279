"""A mistake in params.yaml is one clear line before any job."""

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from saeflow.config import SAEConfig, TrainingConfig, expand_runs, load_params, read_yaml, validate
from saeflow.config.schema import params_schema
from saeflow.errors import UserError
from saeflow.figures import check_figures
from saeflow.figures.needs import TRAINED
from saeflow.figures.registry import find
from saeflow.plan import Plan

ROOT = Path(__file__).parents[1]
PARAMS = read_yaml(ROOT / "params.yaml")
SCHEMA = params_schema()
FILES = [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]


def changed(path: str, value: Any) -> dict[str, Any]:
    """The default parameters with one value set (or deleted, for ...)."""
    params = copy.deepcopy(PARAMS)
    *parents, last = path.split("/")
    node = params
    for key in parents:
        node = node[key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return params


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_parameters_are_valid(path: Path) -> None:
    assert load_params(path)["sources"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("saess", {}, "unknown key saess"),
        ("evaluation/batch", 3, "evaluation: unknown key batch. Known keys: also_on, batch_size"),
        ("sources/smollm2/layer", 3, "sources.smollm2: unknown key layer"),
        ("sources/smollm2/text", {"bundled": "english", "x": 1}, "sources.smollm2.text"),
        (
            "stores/smollm2/dtype",
            "float8",
            "stores.smollm2.dtype: expected one of bfloat16, float16",
        ),
        ("training/lr", "3e-4x", "training.lr: "),
        ("training/lr", float("nan"), "training.lr: expected a number or auto, found nan"),
        ("training/lr", float("inf"), "training.lr: expected a number or auto, found inf"),
        (
            "training/grad_clip",
            float("inf"),
            "training.grad_clip: expected a number or null, found inf",
        ),
        (
            "training/grad_clip",
            "1e999",
            "training.grad_clip: expected a number or null, found '1e999'",
        ),
        ("training/tokens", 1.5, "training.tokens: expected a whole number, found 1.5"),
        ("training/tokens", "3e-05", "training.tokens: expected a whole number, found '3e-05'"),
        ("training/tokens", True, "training.tokens: expected a whole number, found True"),
        ("training/tokens", ..., "training: the key tokens is missing"),
        ("training/tokens", "many", "training.tokens: expected a whole number, found 'many'"),
        ("saes/topk/variant", "topq", "saes.topk.variant: expected one of"),
        ("saes/topk/options/kk", 3, "saes.topk.options: unknown key kk"),
        ("saes/topk/options/k", 5000, "saes.topk.options.k: expected 1..1536 (d_sae), found 5000"),
        ("saes/topk/options/k", [8, 0], "saes.topk.options.k"),
        ("saes/topk/options/k_schedule", {"kind": "zigzag"}, "saes.topk.options.k_schedule"),
        (
            "saes/topk/options/k_schedule",
            {"kind": "linear", "from": 9999, "until": 0.1},
            "saes.topk.options.k_schedule.from: expected 1..1536 (d_sae), found 9999",
        ),
        (
            "saes/topk/store",
            "smollm2/blocks.3.resid_pre",
            "no such store: smollm2/blocks.3.resid_pre",
        ),
        ("saes/topk/seed", [1, 1], "two runs have one name"),
        (
            "training/input_scale",
            "sqrt",
            "training.input_scale: expected one of centred, dimension, raw, unit, found 'sqrt'",
        ),
        (
            "saes/sparsemax/input_scale",
            "centred",
            "saes.sparsemax.input_scale: centred takes the mean row away",
        ),
        (
            "sources/scenes/images",
            {"folder": "nowhere"},
            "sources.scenes.images.folder: no such file",
        ),
        (
            "sources/scenes/tokens",
            "none",
            "sources.scenes.tokens: expected one of all, cls, patches",
        ),
        (
            "sources/scenes/images/scenes",
            {"seed": 1, "smallest": 4, "largest": 3},
            "sources.scenes.images.scenes.smallest: expected at most largest (3), found 4",
        ),
        (
            "sources/scenes/model/trained/batch_size",
            6001,
            "expected at most half of the examples and all of the pairs (6000, 21600), found 6001",
        ),
        (
            "saes/adaptive-k",
            PARAMS["saes"]["adaptive-k"]
            | {
                "store": "scenes/vision.blocks.2.resid_post",
                "d_sae": 512,
                "options": PARAMS["saes"]["adaptive-k"]["options"] | {"form": "per_context"},
            },
            "saes.adaptive-k.options.form: per_context trains on one row a context, of images the CLS",
        ),
        (
            "evaluation/also_on",
            {"smollm2": ["scenes"]},
            "evaluation.also_on.smollm2: expected a source of the same model as smollm2, found scenes",
        ),
        (
            "evaluation/also_on",
            {"synthetic": ["varying"]},
            "also_on.synthetic: expected a source of the same model as synthetic, found varying, whose rows",
        ),
        (
            "evaluation/also_on",
            {"smollm2": ["elsewhere"]},
            "evaluation.also_on.smollm2: expected another source (python, scenes, synthetic, varying), found",
        ),
        (
            "evaluation/also_on",
            {"elsewhere": ["smollm2"]},
            "evaluation.also_on.elsewhere: expected a source that has SAEs (python, scenes, smollm2",
        ),
        (
            "stores/smollm2/train_rows",
            0,
            "stores.smollm2.train_rows: expected 2 or more, which SAEs, probes and the baselines (PCA, the mean) are made of, found 0",
        ),
        (
            "sources/smollm2/evaluation_share",
            1,
            "sources.smollm2.evaluation_share: expected below 1, as SAEs or probes learn from the rest",
        ),
        ("sources/scenes/hook_points", ["blocks.2.resid_post"], "sources.scenes.hook_points"),
        (
            "evaluation/dimension/sources",
            ["scene"],
            "evaluation.dimension.sources: no such source: scene",
        ),
        (
            "evaluation/labelled_sets/single-objects/test",
            {"folder": "nowhere"},
            "labelled_sets.single-objects.test.folder: no such folder: nowhere",
        ),
        ("sources/smollm2/model", {"folder": "nowhere"}, "no such file or folder: nowhere"),
        (
            "sources/smollm2/model",
            {"hub": "openai-community/gpt2", "revision": "main"},
            "sources.smollm2.model.revision",
        ),
        ("sources/smollm2/text", {"files": ["nowhere.txt"], "column": "text"}, "nowhere.txt"),
        (
            "sources/smollm2/text",
            {"files": ["texts"], "column": "text"},
            "sources.smollm2.text.files.0: expected a file that ends in .txt",
        ),
        (
            "sources/smollm2/hook_points",
            ["blocks.x.resid"],
            "sources.smollm2.hook_points.0: expected blocks.N.PLACE",
        ),
        ("stores/smollm2/shard_rows", 1000, "expected a multiple of chunk_rows"),
        ("stores/smollm2/block_contexts", 3, "expected a multiple of the source's forward_batch"),
        ("stores/smollm2", ..., "expected an entry for source 'smollm2'"),
        ("saes/mean", PARAMS["saes"]["topk"], "saes: the name mean is a baseline's"),
        (
            "saes/entmax/options/alpha",
            1,
            "saes.entmax.options.alpha: expected above 1, found 1",
        ),
        (
            "saes/soft-topk/options/k_max",
            20,
            "saes.soft-topk.options.k_max: expected a number in 32..1536 (k and d_sae), found 20",
        ),
        (
            "saes/soft-topk/options/k_max",
            {"times_k": 50},
            "saes.soft-topk.options.k_max.times_k: expected a number in 32..1536 (k and d_sae), found 1600",
        ),
        ("saes/jumprelu/options/form", "paper", "saes.jumprelu.options.form: expected one of"),
        ("saes/relu/options/initialisation", "zeros", "saes.relu.options.initialisation"),
        ("saes/sparsemax/options/beta2", 1, "saes.sparsemax.options.beta2"),
        ("saes/soft-topk/options/reach", 104, "saes.soft-topk.options.reach"),
        ("saes/soft-topk/options/k", [16, 9999], "expected 1..1536 (d_sae), found 9999"),
        (
            "saes/jumprelu/options/target_l0",
            2000,
            "saes.jumprelu.options.target_l0: expected 1..1536",
        ),
        (
            "saes/jumprelu/options/target_schedule",
            {"kind": "linear", "from": 0.5, "until": 0.1},
            "saes.jumprelu.options.target_schedule.from: expected 1..1536 (d_sae), found 0.5",
        ),
        ("saes/adaptive-k/options/k_min", 99, "k_min: expected at most k_max (60), found 99"),
        (
            "saes/adaptive-k/options/complexity",
            "none",
            "complexity: no such entry: none. Known: compression",
        ),
        ("saes/adaptive-k/options/form", "per_word", "saes.adaptive-k.options.form"),
        ("saes/sparsemax/options/score_scale", "1/d", "saes.sparsemax.options.score_scale"),
        (
            "saes/sparsemax/options",
            {"preset": "sparsemax"},
            "saes.sparsemax.options.preset: expected one of",
        ),
        ("saes/sparsemax-scores/options/k", 3, "saes.sparsemax-scores.options: unknown key k"),
        (
            "complexity/readability/formula",
            "easy",
            "complexity.readability.formula: expected one of",
        ),
        ("complexity/compression/contexts", 0, "complexity.compression.contexts"),
        ("training", ..., "the key training is missing"),
        ("training", {}, "training: the keys batch_size, tokens are missing. Add them (see"),
        ("figures/names", ["fvu-l0"], "figures.names.0: "),
        ("runtime/device", "gpu", "runtime.device"),
    ],
)
def test_a_mistake_is_named_in_one_line(path: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        validate(changed(path, value))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_where_nothing_is_trained_no_figure_shows_training() -> None:
    params = read_yaml(ROOT / "tests/workflow/synthetic.yaml")
    taken = {"import": {"library": "saelens", "folder": "."}, "store": "synthetic/features"}
    params |= {"saes": {"taken": taken}, "complexity": {}}
    del params["figures"], params["training"]
    usual = params_schema()["properties"]["figures"]["properties"]["names"]["default"]
    of_any = [name for name in usual if find(name).needs is not TRAINED]
    assert 2 <= len(of_any) < len(usual)
    assert validate(params)["figures"]["names"] == of_any
    trained = {
        "saes": {**params["saes"], "own": {"variant": "topk", "store": "synthetic/features"}}
    }
    with pytest.raises(UserError, match="the key training is missing"):
        validate(params | trained)
    for name in ("training", "schedules", "learning", "table_training_cost"):
        checked = validate(params | {"figures": {"names": [name]}})
        with pytest.raises(UserError, match=f"{name} needs an entry of saes that is trained"):
            check_figures(checked, expand_runs(checked))
    checked = validate(params | {"figures": {"names": ["recovery"]}})
    check_figures(checked, expand_runs(checked))


@pytest.mark.parametrize(
    ("path", "given", "meant"),
    [
        ("training/tokens", 1.0e6, 1_000_000),  # YAML's 1.0e+6
        ("training/tokens", "1e6", 1_000_000),  # DVC's and JSON's, which YAML 1.1 reads as text
        ("training/batch_size", 256.0, 256),
        ("training/lr", "3e-05", 0.00003),
        (
            "training/train_decoder",
            "false",
            False,
        ),  # all that `--config` gives inside {...} is text
        ("training/betas", ["0.9", "9.9e-1"], [0.9, 0.99]),
        ("seeds", ["0", 1.0, "2"], [0, 1, 2]),
        ("seeds", "null", None),
        ("saes/sized-topk/d_sae", [384.0, "768"], [384, 768]),
        ("saes/varying-topk/options/k", 16.0, 16),
        ("saes/topk/lr", "1e-3", 0.001),
        ("sources/scenes/model/trained/patch_size", 8.0, 8),
        ("stores/smollm2/seed", 0.0, 0),
        ("evaluation/max_norm_multiple", "null", None),
    ],
)
def test_a_number_has_one_form_however_it_is_written(path: str, given: Any, meant: Any) -> None:
    found: Any = validate(changed(path, given))
    for key in path.split("/"):
        found = found[key]
    assert found == meant
    assert repr(found) == repr(meant)  # 256, not 256.0


def test_text_that_looks_like_a_number_stays_text_where_text_belongs() -> None:
    params = changed("evaluation/labelled_sets/single-objects/class_names", ["1e5", "null"])
    sets = params["evaluation"]["labelled_sets"]
    assert validate(params)["evaluation"]["labelled_sets"] == sets


@pytest.mark.parametrize(("text", "read"), [("010", 8), ("1:30", 90), ("-017", -15)])
def test_a_number_that_yaml_reads_as_another_is_refused(
    text: str, read: int, tmp_path: Path
) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(f"training:\n  tokens: {text}\n")
    message = f"line 2: expected a number, found {text}, which YAML 1.1 reads as {read}"
    with pytest.raises(UserError, match=re.escape(message)):
        load_params(path)


def test_seeds_take_the_place_of_every_entry_s_own() -> None:
    own, given = expand_runs(PARAMS), expand_runs(PARAMS | {"seeds": [0, 5, 7]})
    settings = {run.name.rpartition("-seed")[0] for run in own}
    assert {run.name for run in given} == {f"{s}-seed{n}" for s in settings for n in (0, 5, 7)}
    assert {run.name for run in expand_runs(PARAMS | {"seeds": None})} == {r.name for r in own}
    with pytest.raises(UserError, match="seeds"):
        validate(PARAMS | {"seeds": [1, 1]})


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("saes:\n  topk: 1\n  topk: 2\n")
    with pytest.raises(UserError, match="line 3: the name 'topk' is given twice"):
        load_params(path)


@pytest.mark.parametrize("text", ["a: [1", "\0", "- 1\n- 2"])
def test_what_is_not_a_mapping_in_yaml_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_params(path)


def test_a_missing_parameter_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_params(tmp_path / "none.yaml")


def test_a_sweep_is_the_product_of_its_lists() -> None:
    params = changed("saes/topk/d_sae", [1024, 2048])
    params["saes"]["topk"] |= {"seed": [3, 4]}
    params["saes"]["topk"]["options"]["k"] = [8, 16]
    runs = [run for run in expand_runs(params) if run.entry == "topk"]
    found = {(run.d_sae, run.options["k"], run.seed) for run in runs}
    assert found == {(d, k, s) for d in (1024, 2048) for k in (8, 16) for s in (3, 4)}
    assert len({run.name for run in runs}) == 8
    assert runs[0].name == "smollm2/blocks.19.resid_post/topk/d1024-k8-seed3"


def test_an_entry_overrides_the_shared_budget() -> None:
    params = changed("saes/topk/tokens", 4096)
    tokens = {run.entry: run.training.tokens for run in expand_runs(params)}
    assert tokens["topk"] == 4096
    shared = params["training"]["tokens"]
    own = {name: entry.get("tokens", shared) for name, entry in params["saes"].items()}
    assert shared in own.values()
    assert tokens == own


def test_the_dataclass_and_the_schema_name_the_same_fields() -> None:
    fields = {field.name for field in dataclasses.fields(TrainingConfig)}
    assert fields == set(SCHEMA["properties"]["training"]["properties"])
    training = SCHEMA["properties"]["training"]
    without_default = {name for name, one in training["properties"].items() if "default" not in one}
    assert without_default == set(training["required"])


def test_a_run_survives_json() -> None:
    run = expand_runs(PARAMS)[0]
    assert SAEConfig.from_dict(dataclasses.asdict(run)) == run


def test_a_source_that_is_only_evaluated_on_has_the_hook_points_and_no_training_rows() -> None:
    params = copy.deepcopy(PARAMS)
    params["sources"]["news"] = params["sources"]["python"] | {"evaluation_share": 1}
    params["stores"]["news"] = params["stores"]["python"] | {"train_rows": 0}
    params["evaluation"]["also_on"] = {"smollm2": ["news"]}
    validate(params)
    assert Plan(params).splits("news") == ["evaluation"]
    params["stores"]["news"]["train_rows"] = 100
    with pytest.raises(
        UserError, match=r"stores\.news\.train_rows: expected 0, as nothing learns from"
    ):
        validate(params)
    params["stores"]["news"]["train_rows"] = 0
    params["sources"]["news"]["hook_points"] = ["blocks.3.resid_post"]
    with pytest.raises(UserError, match=r"found news without blocks\.19\.resid_post"):
        validate(params)


def test_too_many_runs_are_counted_and_not_expanded() -> None:
    """A sweep of 300 billion SAEs; expanding them would take days."""
    params = copy.deepcopy(PARAMS)
    entry = params["saes"]["topk"]
    entry |= {"d_sae": [512 + i for i in range(1000)], "seed": list(range(1000))}
    entry["options"] = {
        **entry["options"],
        "k": list(range(1, 301)),
        "auxk_weight": [0.01 * i for i in range(1000)],
    }
    with pytest.raises(
        UserError, match=r"expected at most 20,000 SAEs, found 300,\d+,\d+,\d+, .* of saes\.topk"
    ):
        validate(params)
