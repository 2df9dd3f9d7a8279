"""A new kind of source is one module and one line of KINDS: planned, extracted, trained on, measured in its model."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from saeflow.errors import UserError
from saeflow.evaluation import evaluate_baselines, evaluate_sae
from saeflow.evaluation.in_model import clean_writer
from saeflow.evaluation.interpret import interpret
from saeflow.files import read_json
from saeflow.saes import load, read_config
from saeflow.sources import KINDS, check_source, kind_of, prepare_inputs
from saeflow.stores import open_store
from saeflow.tables.metrics import METRICS

from .conftest import EVALUATION, make_stores, setup_in, train_sae

HOOK_POINT = "blocks.0.out"
AUDIO = {"kind": "audio", "model": {"folder": "ear"}, "hook_points": [HOOK_POINT], "max_norm_multiple": None}  # fmt: skip
SETTINGS = EVALUATION | {"max_norm_multiple": None, "heard": 8}


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Results of a source of the kind `audio`, which toy_audio.py adds."""
    spec = importlib.util.spec_from_file_location("toy_audio", Path(__file__).with_name("toy_audio.py"))  # fmt: skip
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_audio"] = module
    spec.loader.exec_module(module)
    KINDS["audio"] = "toy_audio"
    root = tmp_path_factory.mktemp("audio")
    folder = root / "sources/tones"
    (folder / "inputs").mkdir(parents=True)
    check_source("tones", AUDIO, folder)
    prepare_inputs(AUDIO, {"train": 1000, "evaluation": 300}, folder / "model", folder / "inputs")
    make_stores(root, "tones", AUDIO)
    clean = root / "evaluations/tones" / HOOK_POINT / "clean"
    clean.mkdir(parents=True)
    mean = open_store(root / f"stores/tones/train/{HOOK_POINT}.zarr").mean
    clean_writer(AUDIO)(AUDIO, folder, HOOK_POINT, mean, SETTINGS, {}, "cpu", clean)
    measured = ("fvu", "nmse", "cosine", "l0")
    own = {f"{name}_{group}" for name in measured for group in ("onset", "rest")} | {
        "loudness_error"
    }
    METRICS.update(
        dict.fromkeys(own, METRICS["mse"])
    )  # what it measures has entries, as any metric
    yield root
    for name in own:
        del METRICS[name]
    del KINDS["audio"], sys.modules["toy_audio"]


def test_a_kind_that_is_not_registered_is_refused() -> None:
    with pytest.raises(
        UserError, match="expected one of synthetic, synthetic_world, text, vision, found 'video'"
    ):
        kind_of({"kind": "video"})


def test_its_saes_and_baselines_are_measured_on_rows_and_in_its_model(
    audio: Path, tmp_path: Path
) -> None:
    """FVU, L0 of groups and the loudness heard, each from the store and the weights once more."""
    sae = train_sae(audio, "tones", HOOK_POINT, "topk")
    setup = setup_in(audio, "tones", HOOK_POINT, SETTINGS, "cpu")
    evaluate_sae(load(sae), read_config(sae), [setup], tmp_path)
    found = pd.read_csv(tmp_path / "metrics.csv").set_index("metric")["value"]
    store = open_store(audio / f"stores/tones/evaluation/{HOOK_POINT}.zarr")
    x = store.read(0, store.rows)
    with torch.no_grad():
        z = load(sae).encode(x)
        x_hat = load(sae).decode(z)
    assert found["rows"] == store.rows == 300
    fvu = (x - x_hat).double().square().sum() / (x - x.mean(0)).double().square().sum()
    assert found["fvu"] == pytest.approx(float(fvu), rel=1e-5)
    onset = store.column("position") == 0
    for name, rows in (("onset", onset), ("rest", ~onset)):
        l0 = (z[torch.from_numpy(rows)] != 0).sum(1).double().mean()
        assert found[f"l0_{name}"] == pytest.approx(float(l0))
    clean = read_json(setup.folders.clean / "clean.json")
    weights = np.load(audio / "sources/tones/model/weights.npy")
    with torch.no_grad():
        heard = load(sae)(torch.tensor(clean["x"])).numpy() @ np.linalg.pinv(weights)
    expected = np.abs(heard[:, 0] - np.array(clean["loudness"])).mean()
    assert found["loudness_error"] == pytest.approx(expected, rel=1e-4)
    (tmp_path / "baselines").mkdir()
    evaluate_baselines([2], [setup], tmp_path / "baselines")
    table = pd.read_csv(tmp_path / "baselines/metrics.csv")
    table = table.pivot(index="variant", columns="metric", values="value")
    assert table.loc["identity", "loudness_error"] == pytest.approx(0, abs=1e-5)
    assert table.loc["pca", "fvu"] == pytest.approx(0, abs=1e-6)  # rows lie in a plane


def test_its_latents_are_probed_for_what_it_knows(audio: Path, tmp_path: Path) -> None:
    sae = train_sae(audio, "tones", HOOK_POINT, "topk")
    setup = setup_in(audio, "tones", HOOK_POINT, SETTINGS, "cpu")
    settings = {
        "rows": 1000, "probing": {"k": [1, 2], "rows": 200, "seed": 0}, "detection": None, "absorption": None,
    }  # fmt: skip
    interpret(load(sae), read_config(sae), setup, settings, tmp_path)
    lines = pd.read_csv(tmp_path / "probing.csv")
    assert set(lines["task"]) == {"loud"}
    whole = lines[lines["method"] == "activation"]
    assert float(whole["accuracy"].iloc[0]) > 0.95  # loudness is linear in the activation


def test_parts_that_it_states_no_facts_for_say_so(audio: Path, tmp_path: Path) -> None:
    from saeflow.complexity.scorers import check_scoring
    from saeflow.evaluation import collect_latents

    sae = train_sae(audio, "tones", HOOK_POINT, "topk")
    setup = setup_in(audio, "tones", HOOK_POINT, SETTINGS, "cpu")
    page = {"examples": 2, "neighbours": 1, "before": 1, "after": 1}
    with pytest.raises(UserError, match=r"latents\.runs: expected SAEs of a model's activations"):
        collect_latents(load(sae), read_config(sae), setup, page, tmp_path)
    with pytest.raises(UserError, match="needs a source of kind text, found audio"):
        check_scoring("hard", {"kind": "compression", "range": None}, AUDIO)
    with pytest.raises(
        UserError, match="true_count needs a source of kind synthetic or synthetic_world or vision"
    ):
        check_scoring("hard", {"kind": "true_count", "range": None}, AUDIO)
