"""Real stores and SAEs to tables about latents: text, samples of a known dictionary, and images."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from saeflow.errors import UserError
from saeflow.evaluation import Setup
from saeflow.evaluation.detection import Window
from saeflow.evaluation.interpret import interpret
from saeflow.evaluation.probing import balanced
from saeflow.files import write_json
from saeflow.saes import load, read_config
from saeflow.sources.base import Block
from saeflow.sources.models import load_tokenizer
from saeflow.sources.scenes import CLASSES
from saeflow.stores import finalise, write_part

from .conftest import EVALUATION, HOOK_POINT, STORE, setup_in, train_sae

SETTINGS: dict[str, Any] = {
    "rows": 500, "probing": {"k": [1, 2, 5], "rows": 200, "seed": 0},
    "detection": {
        "scorer": "tokens", "latents": 6, "examples": 8, "windows": 5, "before": 3, "after": 1,
        "threshold": 0.7, "seed": 0, "judge": None,
    },
    "absorption": None,
}  # fmt: skip
IMAGES, PATCHES, WIDTH = {"train": 120, "evaluation": 70}, 4, 8
PIXELS = "vision.blocks.0.resid_post"


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def text(results: Path) -> tuple[Any, dict[str, Any], Setup]:
    folder = train_sae(results, "tiny", HOOK_POINT, "topk")
    setup = setup_in(results, "tiny", HOOK_POINT, EVALUATION, "cpu")
    return load(folder), read_config(folder), setup


class Planted(torch.nn.Module):
    """Latents are the positive part of a linear map of the activations."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = matrix
        self.rows = 0

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        self.rows += len(x)
        return (x @ self.matrix - 1e-3).relu()


def config_of(source: str, hook_point: str, width: int) -> dict[str, Any]:
    return {
        "name": f"{source}/{hook_point}/planted/d{width}-seed0", "source": source, "hook_point": hook_point,
        "entry": "planted", "variant": "relu", "d_in": width, "d_sae": width, "seed": 0, "options": {},
        "training": {"tokens": 0},
    }  # fmt: skip


def test_a_probe_of_text_is_that_of_a_plain_loop(text: Any, tmp_path: Path) -> None:
    """The rows, tokens and latents of one question taken from the stores once more, all dense."""
    sae, config, setup = text
    interpret(sae, config, setup, SETTINGS, tmp_path)
    lines = lines_of(tmp_path / "probing.csv")
    questions = {line["task"] for line in lines}
    assert {"starts a word", "letters without a space before"} <= questions
    assert "white space" not in questions  # one token of fifty
    data = []
    for store in (setup.train, setup.held_out):
        count = min(500, store.rows)
        with torch.no_grad():
            z = sae.encode(store.read(0, count).float()).numpy()
        token = store.column("token", 0, count)
        says = (token >= 2) & (token < 22)  # those that begin with a space and go on with letters
        rows = balanced(says, 200, seed=len(data))
        data.append((z[rows], says[rows]))
    (z, y), (z_test, y_test) = data
    gaps = [abs(z[y, i].mean() - z[~y, i].mean()) for i in range(24)]
    best = sorted(range(24), key=lambda i: -gaps[i])[:2]
    mean, spread = z[:, best].mean(0), z[:, best].std(0)
    model = LogisticRegression(solver="newton-cholesky", tol=1e-6)
    model.fit((z[:, best] - mean) / spread, y)
    right = model.predict((z_test[:, best] - mean) / spread) == y_test
    line = next(
        line for line in lines
        if (line["task"], line["method"], line["k"]) == ("starts a word", "latents", "2")
    )  # fmt: skip
    assert float(line["accuracy"]) == pytest.approx(right.mean())
    assert (line["train_rows"], line["test_rows"]) == (str(len(y)), str(len(y_test)))
    assert (line["run"], line["k_target"]) == (config["name"], "4")


def test_windows_stand_in_the_text_of_their_own_split(text: Any, tmp_path: Path) -> None:
    sae, config, setup = text
    given: list[tuple[Sequence[Window], Sequence[Window]]] = []

    def scorer(examples: Sequence[Window], asked: Sequence[Window]) -> list[float]:
        given.append((examples, asked))
        return [float(one.tokens[one.mark]) - 20 for one in asked]

    interpret(sae, config, setup, SETTINGS, tmp_path, scorer)
    lines = lines_of(tmp_path / "detection.csv")
    assert 0 < len(given) == len(lines) <= 6
    split_of = {
        tuple(padded[at : at + 5].tolist()): split
        for split in ("train", "evaluation")
        for line in setup.inputs.tokens(split)
        for padded in [np.pad(line, 4, constant_values=-1)]
        for at in range(len(padded) - 4)
    }
    strings = load_tokenizer(setup.folders.model)
    for shown, asked in given:
        assert {split_of[one.tokens] for one in shown} == {"train"}
        assert {split_of[one.tokens] for one in asked} == {"evaluation"}
        window = asked[0]
        assert window.texts == tuple(
            "" if token <= 0 else strings.decode([token]) for token in window.tokens
        )
    with torch.no_grad():
        z = sae.encode(setup.held_out.read(0, setup.held_out.rows).float())
    for line in lines:
        assert int(line["firing"]) == int((z[:, int(line["latent"])] != 0).sum())


def test_the_same_settings_give_the_same_bytes(text: Any, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        interpret(*text, SETTINGS, tmp_path / name)
    for name in ("probing.csv", "detection.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert len(lines_of(tmp_path / "a" / name)) > 3


def test_an_sae_of_another_store_is_refused_and_nothing_is_written(
    results: Path, text: Any, tmp_path: Path
) -> None:
    sae, config, _ = text
    setup = setup_in(results, "synthetic", "features", EVALUATION, "cpu")
    with pytest.raises(UserError, match=rf"activations of tiny/{HOOK_POINT}.*found synthetic"):
        interpret(sae, config, setup, SETTINGS, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_scorer_that_is_not_there_is_refused_before_anything_is_encoded(
    results: Path, tmp_path: Path
) -> None:
    setup = setup_in(results, "synthetic", "features", EVALUATION, "cpu")
    sae = Planted(torch.eye(12))
    settings = SETTINGS | {"detection": SETTINGS["detection"] | {"scorer": "not.there:score"}}
    with pytest.raises(UserError, match=r"detection.scorer: no such module: not.there"):
        interpret(sae, config_of("synthetic", "features", 12), setup, settings, tmp_path)
    assert sae.rows == 0


def test_the_true_code_answers_which_features_are_active(results: Path, tmp_path: Path) -> None:
    """As many features as dimensions and no noise: the inverse of the dictionary is the code."""
    setup = setup_in(results, "synthetic", "features", EVALUATION, "cpu")
    features = load_file(results / "sources/synthetic/inputs/dictionary.safetensors")["features"]
    sae = Planted(torch.linalg.inv(features))
    interpret(sae, config_of("synthetic", "features", 12), setup, SETTINGS, tmp_path)
    lines = lines_of(tmp_path / "probing.csv")
    assert {line["task"] for line in lines} == {f"feature {i}" for i in range(8)}
    single = [line for line in lines if (line["method"], line["k"]) == ("latents", "1")]
    assert [float(line["accuracy"]) for line in single] == [1.0] * 8
    neurons = [float(line["accuracy"]) for line in lines if line["method"] == "neurons" and line["k"] == "1"]  # fmt: skip
    assert np.mean(neurons) < 0.9
    assert (tmp_path / "detection.csv").read_text().count("\n") == 1  # its columns' names
    assert sae.rows == 2 * 500  # five batches of 100 a split, whatever the store holds


class Scenes:
    """Images of four patches with and without objects, on dimension 0 and red ones on 1; CLS tokens fill both."""

    hook_points = [PIXELS]  # noqa: RUF012
    d_in = {PIXELS: WIDTH}  # noqa: RUF012
    rows_per_context = 1 + PATCHES
    columns = {  # noqa: RUF012
        name: (np.dtype(np.int64), ()) for name in ("context", "position", "label", "cover")
    }

    def n_contexts(self, split: str) -> int:
        return IMAGES[split]

    def block(self, split: str, start: int, stop: int) -> Block:
        rng = np.random.default_rng(len(split))
        shape = (IMAGES[split], 1 + PATCHES)
        cover = np.where(rng.random(shape) < 0.5, rng.integers(0, len(CLASSES), shape), -1)
        cover[:, 0] = -1
        x = np.abs(rng.normal(size=(*shape, WIDTH)))
        red = np.array([" red " in name for name in [*CLASSES, ""]])[cover]
        x[..., 0], x[..., 1] = 3 * (cover >= 0), 3 * red
        x[:, 0, :2] = 3
        context, position = np.mgrid[: shape[0], : shape[1]]
        columns = {
            "context": context, "position": position, "cover": cover, "label": context % 2,
        }  # fmt: skip
        part = slice(start, stop)
        x = torch.tensor(x[part], dtype=torch.float32).reshape(-1, WIDTH)
        return Block({PIXELS: x}, {name: values[part].ravel() for name, values in columns.items()})


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    params = {
        "kind": "vision", "hook_points": [PIXELS], "tokens": "all", "max_norm_multiple": 10,
    }  # fmt: skip
    for split in IMAGES:
        part, folder = root / split, root / "stores/scenes" / split
        part.mkdir()
        folder.mkdir(parents=True)
        write_part(Scenes(), split, 0, 1, STORE, part)
        finalise([part], "scenes", params, split, STORE, {}, folder)
    (root / "sources/scenes/inputs").mkdir(parents=True)
    write_json(root / "sources/scenes/inputs/images.json", {"classes": CLASSES, "unreadable": 0})
    return root


def test_patches_are_asked_what_they_show_and_images_have_no_detection(
    scenes: Path, tmp_path: Path
) -> None:
    setup = setup_in(scenes, "scenes", PIXELS, EVALUATION, "cpu")
    sae, config = Planted(torch.eye(WIDTH)), config_of("scenes", PIXELS, WIDTH)
    interpret(sae, config, setup, SETTINGS | {"rows": 5000}, tmp_path)
    lines = lines_of(tmp_path / "probing.csv")
    found = {(line["task"], line["method"], line["k"]): float(line["accuracy"]) for line in lines}
    assert found["an object", "latents", "1"] == 1  # CLS tokens would be taken for objects
    assert found["an object", "activation", ""] == 1
    assert {int(line["train_rows"]) for line in lines} <= set(range(100, 201))
    text = (tmp_path / "detection.csv").read_text()
    assert text.startswith("run,source,")
    assert text.count("\n") == 1


def test_without_detection_there_is_a_table_without_lines(text: Any, tmp_path: Path) -> None:
    interpret(*text, SETTINGS | {"detection": None}, tmp_path)
    assert (tmp_path / "detection.csv").read_text().count("\n") == 1
    assert lines_of(tmp_path / "probing.csv")


def test_a_store_whose_rows_are_all_left_out_is_refused(text: Any, tmp_path: Path) -> None:
    sae, config, setup = text
    strict = setup_in(setup.folders.train.parents[2], "tiny", HOOK_POINT, EVALUATION | {"max_norm_multiple": 1e-6}, "cpu")  # fmt: skip
    with pytest.raises(UserError, match="none of its 600 rows is left"):
        interpret(sae, config, strict, SETTINGS, tmp_path)


def test_latents_stay_sparse_between_batches(text: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """No more of the d_sae columns than those of a probe are ever dense for all rows."""
    dense: list[tuple[int, ...]] = []
    toarray = sparse.csr_array.toarray

    def watched(self: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        dense.append(self.shape)
        return toarray(self, *args, **kwargs)

    monkeypatch.setattr(sparse.csr_array, "toarray", watched)
    interpret(*text, SETTINGS, tmp_path)
    assert dense
    assert max(columns for _, columns in dense) == 5
